"""Where two conditionings paint differently.

`latent patch` is Flux's: 2 x 2 cells of the latent. By the frozen model: the squared difference of the velocities that it
predicts under either at noised latents of the source (as DiffEdit, arXiv 2210.11427, finds its mask). By the tokens alone:
`token_change`, which needs no model and knows less, since a token of an unchanged place moves too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .embedding import SemanticEmbedding
from .picture import measure, spread
from .visibility import patch_grid

LOWEST, HIGHEST = 0.5, 0.95  # times between which the map is taken: below them both conditionings paint what is there


def times(count: int) -> list[float]:
    """`count` times from the highest to the lowest; one alone is their middle."""
    if count < 1:
        raise ValueError(f"The change is measured at one noise or more, not {count}.")
    if count == 1:
        return [(LOWEST + HIGHEST) / 2]
    return [HIGHEST + (LOWEST - HIGHEST) * step / (count - 1) for step in range(count)]


def patch_change(one: Tensor, other: Tensor, patch: int = 2) -> Tensor:
    """Two predictions [B, C, H, W] -> [B, rows, cols] float32: squared difference, summed over channels and averaged
    over the cells of each patch that lie in the latent."""
    square = (one.float() - other.float()).square().sum(1, keepdim=True)
    return F.avg_pool2d(square, patch, ceil_mode=True, count_include_pad=False)[:, 0]


def relative(change: Tensor) -> Tensor:
    """[B, rows, cols] >= 0 -> 0..1, of each picture's own maximum; all 0 where nothing changes."""
    return change / change.amax((1, 2), keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)


def changed(change: Tensor, threshold: float, grow: int) -> Tensor:
    """[B, rows, cols] in 0..1 -> 0 or 1: what is above the threshold, and `grow` patches around it."""
    return _widen((change > threshold).float(), grow)


def enlarge(patches: Tensor, height: int, width: int, pixels: int = 16) -> Tensor:
    """[B, rows, cols] -> [B, height, width], every patch a square of `pixels`; what reaches beyond is cut off."""
    rows, cols = patch_grid(height, width, pixels)
    if tuple(patches.shape[1:]) != (rows, cols):
        raise ValueError(f"A picture of {height}x{width} has {rows}x{cols} patches, not {list(patches.shape[1:])}.")
    for axis in (1, 2):
        patches = patches.repeat_interleave(pixels, dim=axis)
    return patches[:, :height, :width]


def soften(mask: Tensor, reach: int) -> Tensor:
    """MASK [B, H, W] of 0 and 1 that falls to 0 within 2 * `reach` pixels outside of the white, which stays white."""
    if reach < 1:
        return mask
    mask = _widen(mask, reach)
    for kernel in ((2 * reach + 1, 1), (1, 2 * reach + 1)):
        padding = tuple(side // 2 for side in kernel)
        mask = F.avg_pool2d(mask[:, None], kernel, 1, padding, count_include_pad=False)[:, 0]
    return mask.clamp(0, 1)


def token_change(edited: SemanticEmbedding, source: SemanticEmbedding, grid: tuple[int, int]) -> Tensor:
    """[B, rows, cols] in 0..1: how far the tokens of the finest level of every place moved, over their length.

    It is what Preview Embedding tints as `change`. ValueError for embeddings of different layouts.
    """
    return spread(edited, measure(edited, "change", source), *grid)


def _widen(mask: Tensor, reach: int) -> Tensor:
    for kernel in ((2 * reach + 1, 1), (1, 2 * reach + 1)):
        mask = F.max_pool2d(mask[:, None], kernel, 1, tuple(side // 2 for side in kernel))[:, 0]
    return mask
