"""Regions of a picture: embeddings confined to a box or a soft mask, put into one another, moved.

Pure functions. A box is (x0, y0, x1, y1) in units of the image; a mask is float32 [256, 256] in 0..1 over the whole
image (`embedding.fit_mask`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .algebra import compose, during, select
from .area import resample, shares, snap_ends, widest_float
from .embedding import MASK_SIDE, SemanticEmbedding, fit_mask, from_hierarchy
from .hierarchy import Hierarchy
from .visibility import BOX_STEP, visible

MODES = ("replace", "join")


def region(
    boxes: Sequence[tuple[float, float, float, float]], mask: Tensor | None = None
) -> tuple[tuple[float, float, float, float], Tensor]:
    """(box, mask [256, 256]) of a region as an artist gives it: boxes, cut to the image, or a MASK of any size instead.

    boxes: (x, y, width, height) in units of the image; several are one region.
    The box of a region is its bounding box. ValueError for boxes or a mask in which there is nothing.
    """
    if mask is not None:
        fitted = fit_mask(mask)
        rows, cols = (fitted > 0).any(1).nonzero(), (fitted > 0).any(0).nonzero()
        if not len(rows):
            raise ValueError("The mask of the region is empty: paint it white where the region is.")
        edges = cols[0], rows[0], cols[-1] + 1, rows[-1] + 1
        return tuple(int(edge) / MASK_SIDE for edge in edges), fitted
    cut = [(max(x, 0.0), max(y, 0.0), min(x + width, 1.0), min(y + height, 1.0)) for x, y, width, height in boxes]
    cut = [box for box in cut if box[2] - box[0] > BOX_STEP and box[3] - box[1] > BOX_STEP]
    if not cut:
        raise ValueError("The box of the region is empty or outside the picture: give it a width and a height, and x and y below 1.")
    left, top, right, bottom = zip(*cut)
    return (min(left), min(top), max(right), max(bottom)), torch.stack([box_mask(box) for box in cut]).amax(0)


def box_mask(box: Sequence[float]) -> Tensor:
    """[256, 256]: the share of every pixel that lies in the box."""
    x0, y0, x1, y1 = (float(side) for side in box)
    edges = torch.arange(MASK_SIDE + 1, dtype=torch.float64) / MASK_SIDE

    def cover(low: float, high: float) -> Tensor:
        return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp_min(0) * MASK_SIDE

    return snap_ends(torch.outer(cover(y0, y1), cover(x0, x1))).float()


def feather(mask: Tensor, width: float) -> Tensor:
    """A MASK of any size as [256, 256] with a soft border of about half of `width` (a share of the image's side).

    The border softens inwards: it rises from 0 at the mask's edge, and what is outside the mask stays outside. A square
    of that width, centred on a straight edge, is half white. So a pixel gets twice what its square holds above a half.
    """
    fitted = fit_mask(mask)
    white = (fitted > 0).to(fitted)
    centres = widest_float(torch.arange(MASK_SIDE, device=fitted.device) + 0.5) / MASK_SIDE
    reach = max(width, 1 / MASK_SIDE) / 2
    window = shares((centres - reach).clamp_min(0), (centres + reach).clamp_max(1), MASK_SIDE)
    return fitted * snap_ends((2 * (window @ widest_float(white) @ window.mT) - 1).clamp_min(0)).float()


def confine(e: SemanticEmbedding, mask: Tensor) -> SemanticEmbedding:
    """`e` seen only through the mask [256, 256]: every token's own mask is multiplied by it.

    Tokens that nothing can see any more are dropped; those whose box the mask leaves whole stay as they are.
    ValueError if no token is left.
    """
    confined = _confined(e, mask)
    if confined is None:
        raise ValueError("No token of the embedding lies in the region: make the region larger or put it elsewhere.")
    return confined


def insert(
    base: SemanticEmbedding | None, other: SemanticEmbedding, mask: Tensor, mode: str = "replace", start: float = 0.0, end: float = 1.0
) -> SemanticEmbedding:
    """`other` inside the mask [256, 256] of `base`: instead of what base shows there ("replace") or beside it ("join").

    start, end: the part of the sampling, shares in 0..1, in which it is there; before and after it base is as it was, which
        takes copies of its tokens. Without a base, or where nothing of it is left, `other` alone, confined to the mask.
    """
    if mode not in MODES:
        raise ValueError(f"There is no insert mode {mode!r}: use 'replace' or 'join'.")
    inside = confine(during(other, start, end), mask)
    if base is None or mode == "join":
        return inside if base is None else compose([base, inside])
    around = _confined(base, 1 - mask)
    times = [(base, 0.0, start), (base, end, 1.0)] if around is None else [(around, start, end), (base, 0.0, start), (base, end, 1.0)]
    below = [part for part in (_during(*each) for each in times) if part is not None]
    return compose([*below, inside]) if below else inside


def move_into(e: SemanticEmbedding, box: Sequence[float]) -> SemanticEmbedding:
    """`e` with the whole image, masks included, moved into the box.

    A mask goes on beyond the box as it is at its edge.
    """
    x0, y0, x1, y1 = (float(side) for side in box)
    size = torch.tensor([x1 - x0, y1 - y0] * 2, dtype=torch.float64)
    boxes = (torch.tensor([x0, y0] * 2, dtype=torch.float64) + e.boxes.cpu().double() * size).float().to(e.boxes.device)
    if e.masks is None:
        return replace(e, boxes=boxes)

    def back(low: float, high: float) -> Tensor:
        # The pixels' edges as seen from inside the box. Beyond the box the outermost pixel goes on, so that only the
        # tokens' boxes end there, not their masks as well.
        edges = (torch.arange(MASK_SIDE + 1, dtype=torch.float64) / MASK_SIDE - low) / (high - low)
        return shares(edges[:-1].clamp(0, 1 - 1 / MASK_SIDE), edges[1:].clamp(1 / MASK_SIDE, 1), MASK_SIDE)

    masks = snap_ends(back(y0, y1) @ e.masks.cpu().double() @ back(x0, x1).mT)
    return replace(e, boxes=boxes, masks=masks.float().to(e.masks.device))


def region_tokens(
    tokens: Tensor, box: Sequence[float], pooled: Tensor | None = None, source: dict[str, Any] | None = None
) -> SemanticEmbedding:
    """Text tokens [B, N, D] that all own one box.

    Level 0 if it covers half of the image or more, 1 from an eighth, else 2.
    """
    x0, y0, x1, y1 = (float(side) for side in box)
    area = (x1 - x0) * (y1 - y0) + BOX_STEP
    level = 0 if area >= 0.5 else 1 if area >= 0.125 else 2
    count, device = tokens.shape[1], tokens.device
    return SemanticEmbedding(
        tokens=tokens,
        boxes=torch.tensor([[x0, y0, x1, y1]], device=device).repeat(count, 1),
        levels=torch.full((count,), level, device=device),
        strengths=torch.zeros(count, device=device),
        pooled=pooled,
        source=dict(source or {}),
    )


def pool_grid(tokens: Tensor, hierarchy: Hierarchy, source: dict[str, Any] | None = None) -> SemanticEmbedding:
    """A square grid of tokens [B, g * g, D], row by row, pooled to a hierarchy.

    A cell of n slots is cut into n equal parts, as square as possible, wider rather than higher. A slot is the mean of
    the tokens under its part, weighted by area, with the mean of their lengths. It owns the box of its whole cell.
    """
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are no square grid: use a style model that gives one, such as Redux (27x27).")
    grid = rearrange(tokens, "b (y x) d -> b d y x", y=side)
    lengths = widest_float(grid).norm(dim=1, keepdim=True)
    pooled = []
    for level in hierarchy.levels:
        down = max(d for d in range(1, math.isqrt(level.tokens) + 1) if level.tokens % d == 0)
        across = level.tokens // down
        rows, cols = level.rows * down, level.cols * across  # the parts of all cells are one grid
        mean = resample(grid, rows, cols)
        mean = mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-12) * resample(lengths, rows, cols)
        pooled.append(rearrange(
            mean, "b d (rows down) (cols across) -> b (rows cols down across) d", rows=level.rows, cols=level.cols
        ))  # fmt: skip
    return from_hierarchy(torch.cat(pooled, dim=1).to(tokens.dtype), hierarchy, None, source)


def _during(e: SemanticEmbedding, start: float, end: float) -> SemanticEmbedding | None:
    """`during` without the tokens that are never seen then, None where no other is left."""
    if start == end:
        return None
    then = during(e, start, end)
    if then.schedule is None:
        return then
    keep = then.schedule[:, 0] < then.schedule[:, 1]
    return select(then, keep) if keep.any() else None


def _confined(e: SemanticEmbedding, mask: Tensor) -> SemanticEmbedding | None:
    """`confine`, None where no token is left."""
    if tuple(mask.shape) != (MASK_SIDE, MASK_SIDE) or not mask.is_floating_point() or not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError(f"A region's mask is floating [{MASK_SIDE}, {MASK_SIDE}] in 0..1, not {list(mask.shape)}: use fit_mask.")
    mask = mask.to(e.boxes)
    if (mask == 1).all():
        return e
    down, across = (visible(e.boxes, grid).float() for grid in ((MASK_SIDE, 1), (1, MASK_SIDE)))

    def reaches(area: Tensor) -> Tensor:
        """bool [T]: is a pixel of the area, bool [256, 256], in the token's box?"""
        return torch.einsum("yt,yx,xt->t", down, area.float(), across) > 0

    cut = reaches(mask < 1)
    before = torch.full_like(e.levels, -1) if e.masked_by is None else e.masked_by
    table = [] if e.masks is None else [*e.masks]
    after, keep = before.clone(), torch.ones_like(cut)
    for row in before[cut].unique().tolist():
        product = mask if row < 0 else e.masks[row] * mask
        chosen = cut & (before == row)
        keep &= ~chosen | reaches(product > 0)
        after[chosen] = len(table)
        table.append(product)
    if not keep.any():
        return None
    return select(replace(e, masks=torch.stack(table), masked_by=after), keep) if cut.any() else e
