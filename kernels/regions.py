"""Regions of a picture: embeddings confined to a box or a soft mask, put into one another, moved, dialled cell by cell.

Pure functions. A box is (x0, y0, x1, y1) in units of the image; a mask is float32 [256, 256] in 0..1 over the whole image
(`embedding.fit_mask`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algebra import compose, of_levels, select, with_strength
from .area import precise, resample, settled, shares
from .embedding import MASK_SIDE, SemanticEmbedding, fit_mask, from_hierarchy
from .hierarchy import Hierarchy
from .visibility import BOX_STEP, visible

MODES = ("replace", "join")
STRONGEST = 2.0


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

    return settled(torch.outer(cover(y0, y1), cover(x0, x1))).float()


def feather(mask: Tensor, width: float) -> Tensor:
    """A MASK of any size as [256, 256] with a soft border of about half of `width` (a share of the image's side).

    The border softens inwards: it rises from 0 at the mask's edge, and what the mask leaves out stays out. The mean of what
    is white at all over a square of that width is a half on a straight edge, so what is above the half counts, twice.
    """
    fitted = fit_mask(mask)
    white = (fitted > 0).to(fitted)
    centres = precise(torch.arange(MASK_SIDE, device=fitted.device) + 0.5) / MASK_SIDE
    reach = max(width, 1 / MASK_SIDE) / 2
    window = shares((centres - reach).clamp_min(0), (centres + reach).clamp_max(1), MASK_SIDE)
    return fitted * settled((2 * (window @ precise(white) @ window.mT) - 1).clamp_min(0)).float()


def confine(e: SemanticEmbedding, mask: Tensor) -> SemanticEmbedding:
    """`e` seen only through the mask [256, 256]: every token's own mask is multiplied by it.

    Tokens that nothing can see any more are dropped; those whose box the mask leaves whole stay as they are.
    ValueError if no token is left.
    """
    confined = _confined(e, mask)
    if confined is None:
        raise ValueError("No token of the embedding lies in the region: make the region larger or put it elsewhere.")
    return confined


def insert(base: SemanticEmbedding | None, other: SemanticEmbedding, mask: Tensor, mode: str = "replace") -> SemanticEmbedding:
    """`other` inside the mask [256, 256] of `base`: instead of what base shows there ("replace") or beside it ("join").

    Without a base, or where nothing of it is left, `other` alone, confined to the mask.
    """
    if mode not in MODES:
        raise ValueError(f"There is no insert mode {mode!r}: use 'replace' or 'join'.")
    inside = confine(other, mask)
    around = base if base is None or mode == "join" else _confined(base, 1 - mask)
    return inside if around is None else compose([around, inside])


def move_into(e: SemanticEmbedding, box: Sequence[float]) -> SemanticEmbedding:
    """`e` with the whole image moved into the box, its masks too; what a mask shows at the image's edge it shows beyond."""
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

    masks = settled(back(y0, y1) @ e.masks.cpu().double() @ back(x0, x1).mT)
    return replace(e, boxes=boxes, masks=masks.float().to(e.masks.device))


def region_tokens(
    tokens: Tensor, box: Sequence[float], pooled: Tensor | None = None, source: dict[str, Any] | None = None
) -> SemanticEmbedding:
    """Text tokens [B, N, D] that all own one box. Its area says the level: 0 from half the image on, 1 from an eighth."""
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

    A cell of n slots is cut into n equal parts (as square as possible, rather wide than high); a slot is the mean of
    the tokens under its part, by area, at the mean of their lengths. It owns the box of its cell, not of its part.
    """
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are no square grid: use a style model that gives one, such as Redux (27x27).")
    grid = tokens.movedim(-1, 1).unflatten(-1, (side, side))  # [B, D, g, g]
    lengths = precise(grid).norm(dim=1, keepdim=True)
    pooled = []
    for level in hierarchy.levels:
        down = max(d for d in range(1, math.isqrt(level.tokens) + 1) if level.tokens % d == 0)
        across = level.tokens // down
        rows, cols = level.rows * down, level.cols * across  # the parts of all cells are one grid
        mean = resample(grid, rows, cols)
        mean = mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-12) * resample(lengths, rows, cols)
        parts = mean.unflatten(-1, (level.cols, across)).unflatten(-3, (level.rows, down))  # [B, D, R, r, C, c]
        pooled.append(parts.permute(0, 2, 4, 3, 5, 1).flatten(1, 4))
    return from_hierarchy(torch.cat(pooled, dim=1).to(tokens.dtype), hierarchy, None, source)


class CellStrength(NamedTuple):
    """One entry of the text form. level None: all tokens; cell (row, column) None: the whole level."""

    level: int | None
    cell: tuple[int, int] | None
    factor: float


_ENTRY = re.compile(r"(?:\*|(\d+)(?:\s*:\s*(\d+)\s*,\s*(\d+))?)\s*=\s*(\d+\.?\d*|\.\d+)")


def parse_cells(text: str) -> list[CellStrength]:
    """`1:0,1=0.5; 2:3,3=0; 2=0.7; *=0.5`: level:row,column=factor, level=factor, everything=factor; factors 0 (off) to 2."""
    found = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        match = _ENTRY.fullmatch(entry)
        if match is None or float(match[4]) > STRONGEST:
            raise ValueError(
                f"The cell strength {entry!r} is not understood: write level:row,column=factor with a factor from 0 to 2, "
                "such as `1:0,1=0.5`, with semicolons between."
            )
        level, row, col, factor = match.groups()
        cell = None if row is None else (int(row), int(col))
        found.append(CellStrength(None if level is None else int(level), cell, float(factor)))
    return found


def strength_cells(e: SemanticEmbedding, text: str) -> SemanticEmbedding:
    """`e` with the factors of the text form (`parse_cells`) on its strengths; a token that several name gets all of them."""
    for level, cell, factor in parse_cells(text):
        boxes = None if cell is None else _cell(e, level, *cell)
        e = with_strength(e, factor, None if level is None else {level}, boxes)
    return e


def cells(e: SemanticEmbedding) -> list[tuple[int, int, int, float, float, float, float]]:
    """Every cell that the text form can name: (level, row, column, x0, y0, x1, y1), coarse to fine, row by row."""
    found = []
    for level in e.levels.unique().tolist():
        boxes, rows, cols = _spans(e, level)
        places = {
            (rows.index([y0, y1]), cols.index([x0, x1]), x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.unique(dim=0).tolist()
        }
        found += [(level, *place) for place in sorted(places)]
    return found


def _spans(e: SemanticEmbedding, level: int) -> tuple[Tensor, list, list]:
    """(boxes [N, 4] of a level, its rows, its columns): the distinct spans of the boxes, from the top left on."""
    boxes = e.boxes[of_levels(e, {level})]
    return boxes, boxes[:, [1, 3]].unique(dim=0).tolist(), boxes[:, [0, 2]].unique(dim=0).tolist()


def _cell(e: SemanticEmbedding, level: int, row: int, col: int) -> Tensor:
    """[1, 4], the box of a cell."""
    boxes, rows, cols = _spans(e, level)
    if row < len(rows) and col < len(cols):
        box = boxes.new_tensor([cols[col][0], rows[row][0], cols[col][1], rows[row][1]])
        if (boxes == box).all(-1).any():
            return box[None]
    raise ValueError(
        f"Level {level} of the embedding has no cell {row},{col}: it has {len(rows)} rows and {len(cols)} columns, counted from 0."
    )


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
    return select(replace(e, masks=torch.stack(table), masked_by=after), keep, "") if cut.any() else e
