"""A picture's way through a style model such as Redux: the square that its vision tower sees, and the embedding of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .algebra import with_strength
from .embedding import SemanticEmbedding
from .hierarchy import PRESETS
from .picture import over_white
from .regions import pool_grid


def square(image: Tensor, side: int, size: int) -> Tensor:
    """IMAGE [B, H, W, 3 or 4] in 0..1 of any size -> [B, size, size, 3] float32 in 0..1.

    The whole picture, uncropped and over white, lies in the first `side` rows and columns: those that the tower's patches
    cover. So a grid of its tokens divides the picture into equal cells. SigLIP's 27 patches of 14 pixels read 378 of its
    384; 32 patches of 16 read all 512. The rest, which no patch reads, repeats the edge. Bicubic and antialiased, as core
    resizes.
    """
    pixels = over_white(image.float()).movedim(-1, 1)
    if pixels.shape[2:] != (side, side):
        pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return F.pad(pixels, (0, size - side, 0, size - side), mode="replicate").movedim(1, -1)


def embed(tokens: Tensor, preset: str, factors: Sequence[float] = ()) -> SemanticEmbedding:
    """A style model's square grid of tokens [B, g * g, D] as the embedding of a preset.

    Pooled after the style model's projection, not before (`benchmarks/redux.md` compares the two). factors: strength of
    the levels, coarse to fine (`with_strength`); those of levels that the preset does not have count for nothing.
    """
    grids = PRESETS[preset]
    e = pool_grid(tokens, grids, {"style_model": preset})
    for level, factor in zip(range(len(grids.levels)), factors):
        e = with_strength(e, factor, {level})
    return e
