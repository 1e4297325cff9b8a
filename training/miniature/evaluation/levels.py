"""Levels: does the strength of a level change the picture?

A level's tokens get strength 0 ("off") or 2 ("double") while the others keep 1, from the same noise. The figure is the
share of pixels in which any channel then differs by more than a tenth of the range: at 0 the dial is idle.
"""
from __future__ import annotations

import numpy as np
from torch import Tensor

from ....kernels.algebra import with_strength
from ....kernels.embedding import SemanticEmbedding
from .locality import CHANGED
from .system import Miniature

SCENES = 16
STRENGTHS = {"off": 0.0, "double": 2.0}
LEVELS = 3  # of tree128


def scenes(count: int) -> int:
    return min(SCENES, count)


def run(system: Miniature, own: SemanticEmbedding, noise: Tensor, painted: np.ndarray) -> dict[str, dict[str, float]]:
    """{level: {"off", "double"}}. own: tree128's embeddings of the first scenes, painted: their pictures."""
    figures = {}
    for level in own.levels.unique().tolist():
        figures[str(level)] = {}
        for name, strength in STRENGTHS.items():
            pictures = system.paint(with_strength(own, strength, {level}), "tree128", noise[:len(own.tokens)])
            apart = abs(pictures.astype(np.int16) - painted[:len(pictures)]) > CHANGED
            figures[str(level)][name] = float(apart.any(-1).mean())
    return figures
