"""How well a parsed scene agrees with the true one."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from scipy.optimize import linear_sum_assignment

from .scenes import Scene, Thing

NEAR = 6.0  # pixels between centres that still count as the same place


def strict(a: Thing, b: Thing) -> bool:
    """Colour, shape and size right, centre within 6 px."""
    return a.name == b.name and a.size == b.size and distance(a, b) <= NEAR


def colour_position(a: Thing, b: Thing) -> bool:
    """Colour right, centre within 6 px."""
    return a.colour == b.colour and distance(a, b) <= NEAR


def colour_place(a: Thing, b: Thing) -> bool:
    """Colour right, and the place word of one is true of the other."""
    return a.colour == b.colour and a.place == b.place


def shape_place(a: Thing, b: Thing) -> bool:
    return colour_place(a, b) and a.shape == b.shape


def distance(a: Thing, b: Thing) -> float:
    return float(np.hypot(a.x - b.x, a.y - b.y))


def matches(truth: Scene, found: Scene, same: Callable[[Thing, Thing], bool]) -> list[tuple[Thing, Thing]]:
    """The largest one-to-one matching of things that are the `same`; among those, the one with the least distance."""
    if not truth.things or not found.things:
        return []
    cost = np.array([[distance(a, b) - 1e4 if same(a, b) else 0.0 for b in found.things] for a in truth.things])
    pairs = zip(*linear_sum_assignment(cost))
    return [(truth.things[i], found.things[j]) for i, j in pairs if same(truth.things[i], found.things[j])]


def f1(truths: Iterable[Scene], founds: Iterable[Scene], same: Callable[[Thing, Thing], bool]) -> float:
    """Micro F1 over all scenes: 2 x matched / (true things + found things)."""
    matched = total = 0
    for truth, found in zip(truths, founds):
        matched += len(matches(truth, found, same))
        total += len(truth.things) + len(found.things)
    return 2 * matched / max(1, total)


def strict_f1(truths: Iterable[Scene], founds: Iterable[Scene]) -> float:
    return f1(truths, founds, strict)
