"""Checks of a node's widgets when a prompt is queued, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def verdict(*checks: tuple[Callable[..., Any], Any]) -> bool | str:
    """The answer of a node's `validate_inputs`: True, or the sentence of the first check that refuses its value.

    checks: (function that raises ValueError, value of a widget); a value of None is linked and not known yet.
    """
    for check, value in checks:
        try:
            if value is not None:
                check(value)
        except ValueError as error:
            return str(error)
    return True
