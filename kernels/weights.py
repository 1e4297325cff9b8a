"""Weights into networks: every tensor must have its place and its shape, or one sentence says what does not fit."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import schema


def build(make: Callable[[], nn.Module], state_dict: dict[str, Tensor], what: str | os.PathLike) -> nn.Module:
    """The module that `make` builds, with every tensor of `state_dict`; `what` (a path) names the source in the errors.

    It is built on the meta device first, where it takes no memory, and compared: a record may ask for more than its
    file holds.
    """
    with torch.device("meta"):
        _compare(make(), state_dict, what)
    module = make()
    module.load_state_dict(state_dict)
    return module


def fill(module: nn.Module, state_dict: dict[str, Tensor], what: str | os.PathLike) -> None:
    """Load every tensor of `module` from `state_dict`, exactly; `what` (a path) names the source in the errors."""
    _compare(module, state_dict, what)
    module.load_state_dict(state_dict)


def _compare(module: nn.Module, state_dict: dict[str, Tensor], what: str | os.PathLike) -> None:
    own = module.state_dict()
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    if missing or unexpected:
        which = f"lacks {missing[0]!r}" if missing else f"has the unknown tensor {schema.short(unexpected[0])}"
        count = len(missing) + len(unexpected)
        raise ValueError(
            f"{what} {which} ({count} tensors do not match in all): its record and its tensors belong to different "
            "models, export the file again."
        )
    for name, tensor in own.items():
        given = state_dict[name]
        if given.shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(given.shape)} in {what} where its record implies {tuple(tensor.shape)}: "
                "export the file again."
            )
        if given.is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"{name!r} is {given.dtype} in {what} where its record implies {tensor.dtype}: export the file again."
            )
