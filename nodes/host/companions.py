"""Companions: conditionings that are evaluated in the batch of the painted ones and take part in their attention.

Their rows stand after the painted ones: one for every picture of the batch, shared by whatever is painted of it (positive,
negative). To everything that asks core's `cond_or_uncond` they are one more positive. A wrapper around Flux's own forward
adds them and takes them off the result, so nothing else of core's sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.layout import together
from .conditioning import LAYOUT_KEY, MASKS_KEY
from .flux import WRAPPER_KEY, Settings, layout_wrapper


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


class Row(NamedTuple):
    """One companion for every picture of a batch: at latents x [B, C, H, W], beside the conditioning of that place in the
    batch, whose guidance, references and control it shares."""

    companion: Companion
    x: Tensor
    beside: int = 0


def accompanied(forward: Forward, rows: list[Row], masked: bool) -> Forward:
    """The forward with the companions' rows after its own, in their order.

    masked: whether Masked Attention obeys layouts here. If not, a layout in the result does nothing but hide the padding of
    texts of different lengths: `evaluate` sees to it. ValueError where Masked Attention would hide it in a part only, and for
    texts of another width.
    """
    count = forward.pictures
    widths = {each.shape[-1] for each in (forward.context, *(row.companion.context for row in rows))}
    if len(widths) > 1:
        raise ValueError(
            f"The texts that are compared here have widths {' and '.join(map(str, sorted(widths)))}: encode all of them with the "
            "CLIP of the model that paints."
        )
    kwargs = dict(forward.kwargs)
    own = (forward.context, kwargs.pop(LAYOUT_KEY, None), kwargs.pop(MASKS_KEY, None))

    def like(own: Tensor | None, given: list[Tensor | None] | None = None) -> Tensor | None:
        """Rows of the forward with those of the companions, which are of the conditioning beside them unless given."""
        if own is None:
            return None
        added = [own[row.beside * count :][:count] if more is None else more.to(own)
                 for row, more in zip(rows, given or [None] * len(rows))]  # fmt: skip
        return torch.cat([own, *(more.expand(count, *more.shape[1:]) if len(more) == 1 else more for more in added)])

    def side(companion: Companion) -> tuple[Tensor, Tensor | None, Tensor | None]:
        there = tuple(None if part is None else part.to(own[0].device) for part in companion[:1] + companion[2:])
        context, *rest = (part if part is None or len(part) > 1 else part.expand(count, *part.shape[1:]) for part in there)
        return (context.to(own[0]), *rest)

    sides = [own, *(side(row.companion) for row in rows)]
    if masked and len({text.shape[1] for text, *_ in sides}) > 1:
        _check_everywhere(forward)
    context, layout, masks = together(sides if masked else [(text, None, None) for text, *_ in sides])
    for key, part in ((LAYOUT_KEY, layout), (MASKS_KEY, masks)):
        if part is not None:
            kwargs[key] = part
    for key, value in kwargs.items():
        if key not in (LAYOUT_KEY, MASKS_KEY) and torch.is_tensor(value) and value.ndim and len(value) == len(forward.x):
            kwargs[key] = like(value)
    # An inpainting model's own channels are those of what is painted.
    x = like(forward.x, [torch.cat([row.x, forward.x[row.beside * count :][:count, row.x.shape[1] :]], 1) for row in rows])
    y, pooled = forward.y, [row.companion.pooled for row in rows]
    if y is not None and any(each is not None for each in pooled):  # core reads as much of either as the model is wide
        width = min(each.shape[-1] for each in (y, *pooled) if each is not None)
        y, pooled = y[:, :width], [each if each is None else each[:, :width] for each in pooled]
    options = dict(forward.transformer_options)
    if options.get("cond_or_uncond"):
        options["cond_or_uncond"] = [*options["cond_or_uncond"], *(0 for _ in rows)]
    control = forward.control and {
        key: [None if each is None else like(each) if len(each) == len(forward.x) else each for each in value]
        for key, value in forward.control.items()
    }
    return Forward(
        x, like(forward.timestep), context, like(y, pooled), like(forward.guidance),
        forward.ref_latents and [like(each) for each in forward.ref_latents], control, options, kwargs,
    )  # fmt: skip


def evaluate(forward: Forward, executor: Callable, base_model: Any) -> Tensor:
    """The output [R, C, H, W] of an accompanied forward, all rows. Where no Masked Attention obeys its layout, one of ours does."""
    if LAYOUT_KEY in forward.kwargs and not obeyed(forward):
        inner = layout_wrapper(base_model, Settings(0.0, 0.0, 1.0, "all", None))
        return inner(executor, *forward[:8], **forward.kwargs)
    return forward.run(executor)


def obeyed(forward: Forward) -> bool:
    """Whether Masked Attention is in this model."""
    return WRAPPER_KEY in _wrappers(forward)


def _wrappers(forward: Forward) -> dict:
    return forward.transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})


def _check_everywhere(forward: Forward) -> None:
    settings = [wrapper.settings for wrapper in _wrappers(forward)[WRAPPER_KEY]]
    if any(each.blocks is not None or (each.start, each.end) != (0, 1) for each in settings):
        raise ValueError(
            "Texts of different lengths are compared here, and Masked Attention, which tells them apart, works in some blocks or "
            "steps only: give it all blocks, start 0 and end 1, or make the texts alike."
        )
