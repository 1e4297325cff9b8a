"""Blend: does the painted scene move evenly from A to B while the embedding does?

There are nine amounts from 0 to 1, slerp (the node's default), and one noise for all nine. Every picture is parsed. Its
scene X has the progress p = (1 + similarity(X, B) - similarity(X, A)) / 2 towards the true scenes A and B. Progress is
rescaled so that the pictures of amounts 0 and 1 lie at 0 and 1. A perfectly even path makes eight steps of 1/8. The
evenness of a pair is 1 - (largest step - 1/8) / (1 - 1/8), kept within 0..1: 1 is perfectly even, 0 is one jump over
the whole way (or more). A pair whose two ends are less than 0.1 of progress apart has not moved and counts 0.

`whole` is the share of the things painted at amount 0.5 that are whole: their blob covers a shape that the world knows by
0.8 (intersection over union). The rest are torn remnants.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ....kernels.algebra import blend
from ....kernels.embedding import SemanticEmbedding
from ..parser import parse_scored
from ..scenes import Scene, Thing
from ..score import distance
from .reconstruction import others, parse_all
from .system import Miniature

AMOUNTS = tuple(k / 8 for k in range(9))
PAIRS = 16
WHOLE = 0.8
SCALE = 32.0  # px: a thing this far away is worth 1/e of one in place


def pairs(count: int) -> int:
    """How many pairs (a scene, the next one) of `count` scenes are measured."""
    return min(count, PAIRS)


def likeness(a: Thing, b: Thing) -> float:
    """0..1: a third each for colour, shape and size, times exp(-distance / 32 px)."""
    alike = (a.colour == b.colour) + (a.shape == b.shape) + (a.size == b.size)
    return alike / 3 * float(np.exp(-distance(a, b) / SCALE))


def similarity(a: Scene, b: Scene) -> float:
    """0..1, 1 only for equal scenes. It is the equality of the grounds and the likeness of the best one-to-one matching
    of things, averaged over the ground and the things of the fuller scene."""
    table = np.array([[likeness(x, y) for y in b.things] for x in a.things]).reshape(len(a.things), len(b.things))
    matched = table[linear_sum_assignment(-table)].sum() if table.size else 0.0
    return float(((a.ground == b.ground) + matched) / (1 + max(len(a.things), len(b.things))))


def evenness(a: Scene, b: Scene, path: Sequence[Scene]) -> float:
    """Evenness of the parsed scenes on the way from a to b, 0..1."""
    progress = np.array([(1 + similarity(x, b) - similarity(x, a)) / 2 for x in path])
    span, ideal = progress[-1] - progress[0], 1 / (len(path) - 1)
    if span < 0.1:
        return 0.0
    largest = np.abs(np.diff(progress)).max() / span
    return float(np.clip(1 - (largest - ideal) / (1 - ideal), 0, 1))


def figures(system: Miniature, scenes: Sequence[Scene], sources: np.ndarray, noise: Tensor) -> dict[str, float | None]:
    """{"evenness", "whole"} over the pairs, embedded by the adapter."""
    return figures_of(system, scenes, system.embed(sources[:pairs(len(scenes)) + 1], "tree128"), noise)


def figures_of(system: Miniature, scenes: Sequence[Scene], own: SemanticEmbedding, noise: Tensor) -> dict[str, float | None]:
    """The same. own: the embeddings of the scenes; one beyond the pairs is enough."""
    count = pairs(len(scenes))
    first = replace(own, tokens=own.tokens[:count])
    then = replace(own, tokens=own.tokens.roll(-1, 0)[:count])
    tokens = torch.stack([blend(first, then, amount, "slerp").tokens for amount in AMOUNTS], 1)  # [pairs, 9, T, D]
    same_noise = noise[:count].repeat_interleave(len(AMOUNTS), 0)
    pictures = system.paint_regions(own, [tokens.flatten(0, 1)], [1.0], same_noise)
    found = parse_all(pictures)
    paths = [found[k:k + len(AMOUNTS)] for k in range(0, len(found), len(AMOUNTS))]
    even = [evenness(a, b, path) for a, b, path in zip(scenes, others(scenes), paths)]
    scores = [score for picture in pictures[len(AMOUNTS) // 2::len(AMOUNTS)] for _, score in parse_scored(picture)[1]]
    return {"evenness": float(np.mean(even)), "whole": float(np.mean(np.array(scores) >= WHOLE)) if scores else None}
