"""Fits that were begun, kept in memory, so that the same fit asked for again goes on where it was."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...kernels.fit import Fit

MOST = 4

# Newest last: (the MODEL, its patches and what the fit is of, the fit). A fit is small: it lives on the CPU.
_kept: list[tuple[weakref.ref, str, Fit]] = []


def fingerprint(tensors: Iterable[Tensor | None], *facts: Any) -> str:
    """Of what a fit is determined by, beside the MODEL."""
    digest = hashlib.sha256(repr(facts).encode())
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.detach().cpu().contiguous()
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def find(model, key: str, steps: int) -> Fit | None:
    """The fit that was kept under this key, if it has not gone beyond `steps`; from now on it is one of so many."""
    for reference, other, fit in _kept:
        if reference() is model and other == key and fit.count <= steps:
            fit.settings = replace(fit.settings, steps=steps)
            return fit
    return None


def keep(model, key: str, fit: Fit) -> None:
    _kept[:] = [each for each in _kept if each[0]() is not None and (each[0]() is not model or each[1] != key)]
    _kept.append((weakref.ref(model), key, fit))
    del _kept[:-MOST]
