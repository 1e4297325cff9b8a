"""Companions: conditionings that are evaluated in the batch of the painted ones and take part in their attention.

Their rows stand after the painted ones: one for every picture of the batch, shared by whatever is painted of it (positive,
negative). To everything that asks core's `cond_or_uncond` they are one more positive. A wrapper around Flux's own forward
adds them and takes them off the result, so nothing else of core's sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.layout import together
from .conditioning import LAYOUT_KEY, MASKS_KEY


class Companion(NamedTuple):
    """What a companion's row is told: context [1 or B, T, D], pooled [1 or B, P] or None, layout and masks as the
    conditioning carries them, or None."""

    context: Tensor
    pooled: Tensor | None
    layout: Tensor | None
    masks: Tensor | None


class Forward(NamedTuple):
    """The arguments of one forward of Flux, by core's names."""

    x: Tensor
    timestep: Tensor
    context: Tensor
    y: Tensor | None
    guidance: Tensor | None
    ref_latents: list[Tensor] | None
    control: dict | None
    transformer_options: dict
    kwargs: dict[str, Any]

    def run(self, executor: Callable) -> Tensor:
        return executor(*self[:8], **self.kwargs)

    @property
    def pictures(self) -> int:
        """Pictures of the batch: its rows are those of all conditionings, one after the other."""
        return len(self.x) // len(self.transformer_options.get("cond_or_uncond") or [0])


def companion_of(conditioning: list, what: str) -> Companion:
    """The one entry of a CONDITIONING. ValueError where it has several, which only a sampler can combine."""
    if len(conditioning) != 1:
        raise ValueError(f"{what} takes a conditioning of one entry and this one has {len(conditioning)}: do not combine it.")
    (context, settings) = conditioning[0]
    conds = settings.get("model_conds", {})
    layout, masks = (conds[key].cond if key in conds else None for key in (LAYOUT_KEY, MASKS_KEY))
    return Companion(context, settings.get("pooled_output"), layout, masks)


def accompanied(forward: Forward, companion: Companion, x: Tensor, masked: bool, what: str) -> Forward:
    """The forward with the companion's rows at latents x [B, C, H, W] after its own.

    masked: whether Masked Attention obeys layouts here. ValueError where the companion's text is of another length and
    nothing can hide the difference.
    """
    count = forward.pictures
    kwargs = dict(forward.kwargs)
    own = (forward.context, kwargs.pop(LAYOUT_KEY, None), kwargs.pop(MASKS_KEY, None))
    lengths = own[0].shape[1], companion.context.shape[1]
    if lengths[0] != lengths[1] and not masked:
        raise ValueError(
            f"{what} compares texts of {lengths[0]} and {lengths[1]} tokens, which needs Masked Attention (Flux): put that "
            "before this node, or make both conditionings alike."
        )

    def like(rows: Tensor | None, more: Tensor | None = None) -> Tensor | None:
        """Rows of the forward with those of the companion, which are the first conditioning's unless given."""
        if rows is None:
            return None
        more = rows[:count] if more is None else more.to(rows)
        return torch.cat([rows, more.expand(count, *more.shape[1:]) if len(more) == 1 else more])

    there = tuple(None if part is None else part.to(own[0].device) for part in companion[:1] + companion[2:])
    sides = [own, tuple(part if part is None or len(part) > 1 else part.expand(count, *part.shape[1:]) for part in there)]
    sides[1] = (sides[1][0].to(own[0]), *sides[1][1:])
    context, layout, masks = together(sides)
    for key, part in ((LAYOUT_KEY, layout), (MASKS_KEY, masks)):
        if part is not None:
            kwargs[key] = part
    for key, value in kwargs.items():
        if key not in (LAYOUT_KEY, MASKS_KEY) and torch.is_tensor(value) and value.ndim and len(value) == len(forward.x):
            kwargs[key] = like(value)
    x = torch.cat([x, forward.x[:count, x.shape[1] :]], 1)  # an inpainting model's own channels
    y, pooled = forward.y, companion.pooled
    if y is not None and pooled is not None:  # core reads as much of either as the model is wide
        width = min(y.shape[-1], pooled.shape[-1])
        y, pooled = y[:, :width], pooled[:, :width]
    options = dict(forward.transformer_options)
    if options.get("cond_or_uncond"):
        options["cond_or_uncond"] = [*options["cond_or_uncond"], 0]
    control = forward.control and {
        key: [None if each is None else like(each) if len(each) == len(forward.x) else each for each in value]
        for key, value in forward.control.items()
    }
    return Forward(
        torch.cat([forward.x, x]), like(forward.timestep), context, like(y, pooled), like(forward.guidance),
        forward.ref_latents and [like(each) for each in forward.ref_latents], control, options, kwargs,
    )  # fmt: skip
