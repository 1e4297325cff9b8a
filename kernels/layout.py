"""The layout of region tokens as integer tensors, the form in which it passes through core's conditioning.

Core casts floating conditioning to the model's dtype (bfloat16 would move a box border by a patch) but leaves integers
alone, so a layout travels as int32 [B, T, 9]: x0, y0, x1, y1, level, strength, mask, start, end. Boxes, strengths and the
two ends of the schedule are fixed point in 1/65536; a strength of -inf is the smallest int32; a mask is a row of the masks
or -1. The masks travel beside it as uint8 [B, M, 256, 256], which core does cast; bfloat16 and float16 hold 0 to 255 exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .embedding import SemanticEmbedding

UNIT = 65536
OFF = -(2**31)
_LIMIT = 2**31 - 1


def encode(embedding: SemanticEmbedding) -> tuple[Tensor, Tensor | None]:
    """(int32 [1, T, 9], uint8 [1, M, 256, 256] or None) on the CPU.

    A finite strength keeps 1/131072 and is held within +-32767; a mask keeps 1/510.
    """
    strengths = embedding.strengths.double().cpu()
    fixed = (strengths * UNIT).clamp(-_LIMIT, _LIMIT).round()
    fixed = torch.where(strengths == -torch.inf, float(OFF), fixed)
    boxes = (embedding.boxes.double().cpu() * UNIT).round()
    rows = torch.full_like(embedding.levels, -1) if embedding.masked_by is None else embedding.masked_by
    always = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(embedding.token_count, 2)
    # Rounded down, so that of a step at a region's very end and another's beginning the second has it.
    times = always if embedding.schedule is None else embedding.schedule.double().cpu()
    columns = [*boxes.unbind(-1), embedding.levels.double().cpu(), fixed, rows.double().cpu(), *(times * UNIT).floor().unbind(-1)]
    masks = None if embedding.masks is None else (embedding.masks.cpu() * 255).round().to(torch.uint8)[None]
    return torch.stack(columns, dim=-1).to(torch.int32)[None], masks


def join(first: tuple[Tensor, Tensor | None], then: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Two layouts with their masks as one: the tokens of `first`, then those of `then`. A single one serves a batch."""
    (layout, masks), (other, more) = first, then
    batch = max(len(layout), len(other))
    if masks is not None:
        rows = other[..., 6]
        other = other.clone()
        other[..., 6] = torch.where(rows < 0, rows, rows + masks.shape[1])
    layout = torch.cat([part.expand(batch, -1, -1) for part in (layout, other)], dim=1)
    tables = [table.expand(batch, -1, -1, -1) for table in (masks, more) if table is not None]
    return layout, torch.cat(tables, dim=1) if tables else None


def at_time(
    layout: Tensor, context: Tensor, within: Callable[[float, float], bool]
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layout int32 [B, T, 9] and the context [B, L, D] of one moment, without the tokens whose part of the sampling it is
    not in: within(start, end) tells. What is seen in some rows of the batch alone stays, switched off in the others."""
    parts, of = layout[..., 7:].flatten(0, -2).unique(dim=0, return_inverse=True)
    due = torch.tensor([within(start / UNIT, end / UNIT) for start, end in parts.tolist()], device=layout.device)
    due = due[of].reshape(layout.shape[:-1])
    if due.all():
        return layout, context
    keep = due.any(0)
    if not keep.any() and context.shape[1] == len(keep):
        keep[0] = True  # a text of no tokens is none that a model knows
    layout = layout.clone()
    layout[..., 5] = torch.where(due, layout[..., 5], OFF)
    rest = torch.ones(context.shape[1] - len(keep), dtype=torch.bool, device=keep.device)
    return layout[:, keep], context[:, torch.cat([keep, rest]).to(context.device)]


def decode(layout: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(boxes float32 [T, 4], log-bias strengths float32 [T], masks float32 [M, 256, 256], masked_by int64 [T]).

    The last two are None without masks. All have a leading batch axis where the entries of the layout [B, T, 9] or of
    the masks differ; where all are the same there is none, which lets the attention share its bias. The schedule is not
    among them: `at_time` has obeyed it.
    """
    if all(part is None or len(part) == 1 or bool((part == part[:1]).all()) for part in (layout, masks)):
        layout, masks = layout[0], None if masks is None else masks[0]
    fixed = layout[..., 5]
    strengths = torch.where(fixed == OFF, -torch.inf, fixed.float() / UNIT)
    boxes = layout[..., :4].float() / UNIT
    return (boxes, strengths, None, None) if masks is None else (boxes, strengths, masks.float() / 255, layout[..., 6].long())


def together(sides: list[tuple[Tensor, Tensor | None, Tensor | None]]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Several conditionings as the rows of one batch: (context [R, L, D], layout, masks), each side given as such.

    A shorter text gets zeros before it, off for every query: exactly the shorter text. Where one side has more region
    tokens than another, tokens of the other's text that follow its own own the whole image, which is how text is seen.
    The layout is None where no side has one and all are equally long.
    """
    length = max(context.shape[1] for context, *_ in sides)
    pads = [length - context.shape[1] for context, *_ in sides]
    counts = [pad + (0 if layout is None else layout.shape[1]) for pad, (_, layout, _) in zip(pads, sides)]
    tables = [0 if masks is None else masks.shape[1] for *_, masks in sides]
    contexts = torch.cat([F.pad(context, (0, 0, pad, 0)) for pad, (context, *_) in zip(pads, sides)])
    if not max(counts):
        return contexts, None, None
    layouts, all_masks = [], []
    for pad, count, table, (context, layout, masks) in zip(pads, counts, tables, sides):
        rows, device = len(context), context.device
        own = _everywhere(0, 0, device) if layout is None else layout.to(torch.int32)
        parts = (_everywhere(pad, OFF, device), own, _everywhere(max(counts) - count, 0, device))
        layouts.append(torch.cat([part.expand(rows, -1, -1) for part in parts], dim=1))
        if max(tables):
            shape = (1, 0, *next(masks.shape[2:] for *_, masks in sides if masks is not None))
            own = torch.empty(shape, device=device) if masks is None else masks.float()
            all_masks.append(F.pad(own, (0, 0, 0, 0, 0, max(tables) - table)).expand(rows, -1, -1, -1))
    return contexts, torch.cat(layouts), torch.cat(all_masks) if all_masks else None


def _everywhere(count: int, strength: int, device: torch.device) -> Tensor:
    """int32 [1, count, 9]: tokens that own the whole image."""
    return torch.tensor([0, 0, UNIT, UNIT, 0, strength, -1, 0, UNIT], dtype=torch.int32, device=device).expand(1, count, 9)
