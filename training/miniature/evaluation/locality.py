"""Locality: does a token change only its own part of the picture?

For every pair (a scene, the next one) the region tokens of one quadrant - all tokens of level 1 and finer whose box
lies in it - are replaced by the other scene's, and both embeddings are painted from the same noise. A pixel has changed
if any of its channels differs by more than 0.1 of the range. The figure is the share of all changed pixels, over all
pairs, that lie in the quadrant of their pair: 0.25 is chance, 1 is perfect.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ....kernels.algebra import restrict
from ....kernels.embedding import SemanticEmbedding
from ..scenes import SIZE, Scene
from .reconstruction import others
from .system import Miniature

CHANGED = 0.1 * 255
WIDER = 8  # px: half a patch
# One hierarchy with the mask, and the ablation that was trained without it.
VARIANTS = {"masked": "tree64", "unmasked": "tree64_unmasked"}
PAIRS = 64


def pairs(count: int) -> int:
    """Number of scenes, of `count`, that are measured."""
    return min(count, PAIRS)


def quadrant_of(index: int) -> tuple[int, int]:
    """(row, column) of the quadrant that is swapped in pair `index`: all four in turn."""
    return divmod(index % 4, 2)


def swap(embedding: SemanticEmbedding, other: SemanticEmbedding, quadrant: tuple[int, int]) -> SemanticEmbedding:
    """`embedding` with the other's region tokens in one quadrant."""
    mask = torch.zeros(2, 2)
    mask[quadrant] = 1
    fine = set(embedding.levels.unique().tolist()) - {0}
    return restrict(other, embedding, mask, fine)


def changed_pixels(before: np.ndarray, after: np.ndarray, quadrant: tuple[int, int], wider: int = 0) -> tuple[int, int]:
    """(changed pixels in the quadrant and up to `wider` px about it, changed pixels in all) of two pictures [128, 128,
    3] uint8."""
    changed = (abs(before.astype(np.int16) - after) > CHANGED).any(-1)
    rows, columns = (slice(max(0, half * SIZE // 2 - wider), (half + 1) * SIZE // 2 + wider) for half in quadrant)
    return int(changed[rows, columns].sum()), int(changed.sum())


def share(counts: Sequence[tuple[int, int]]) -> float | None:
    """Changed pixels inside over all changed pixels; None where nothing changed."""
    inside, everywhere = (sum(column) for column in zip((0, 0), *counts))
    return inside / everywhere if everywhere else None


def locality(system: Miniature, scenes: Sequence[Scene], sources: np.ndarray, noise: Tensor,
             painted: dict[str, np.ndarray]) -> tuple[dict[str, float | None], ...]:
    """The shares by name of VARIANTS that are loaded: over all pairs; over those whose two scenes have the same ground;
    and over all pairs, of the pixels in the quadrant or within WIDER px of it.

    painted: the reconstructions before the swap, by variant.
    """
    count = pairs(len(scenes))
    alike = [a.ground == b.ground for a, b in zip(scenes, others(scenes))][:count]
    everything, same_ground, widened = {}, {}, {}
    for name, variant in VARIANTS.items():
        if variant not in system.variants:
            continue
        own = system.embed(sources[:count], variant)
        other = system.embed(others(sources)[:count], variant)
        tokens = own.tokens.clone()
        for index in range(min(4, count)):
            tokens[index::4] = swap(own, other, quadrant_of(index)).tokens[index::4]
        after = system.paint(replace(own, tokens=tokens), variant, noise[:count])
        counts = [changed_pixels(painted[variant][i], after[i], quadrant_of(i)) for i in range(count)]
        everything[name] = share(counts)
        same_ground[name] = share([c for c, same in zip(counts, alike) if same])
        widened[name] = share([changed_pixels(painted[variant][i], after[i], quadrant_of(i), WIDER)
                               for i in range(count)])
    return everything, same_ground, widened

