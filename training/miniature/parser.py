"""Reads a scene back from a picture: nearest colour, connected components, best fitting template."""
from __future__ import annotations

from functools import cache

import numpy as np
from scipy import ndimage

from .scenes import COLOURS, GROUNDS, RADII, SHAPES, SIZE, Scene, Thing, coverage

MIN_AREA = 90       # pixels; the smallest shape (a small cross) covers about 230
_PALETTE = np.asarray([*COLOURS.values(), *GROUNDS.values()], np.float32)
_NAMES = [*COLOURS, *GROUNDS]


@cache
def _centroid(shape: str, size: str) -> tuple[float, float]:
    """Offset (x, y) in pixels of a shape's centroid from its centre."""
    y, x = ndimage.center_of_mass(coverage(Thing(shape, "red", size, SIZE / 2, SIZE / 2)))
    return x + 0.5 - SIZE / 2, y + 0.5 - SIZE / 2


def _overlap(mask: np.ndarray, thing: Thing) -> float:
    """Intersection over union of a component with a thing's exact mask."""
    ideal = coverage(thing)
    shared = np.minimum(mask, ideal).sum()
    return float(shared / (mask.sum() + ideal.sum() - shared))


def parse(image: np.ndarray) -> Scene:
    """[128, 128, 3] uint8 -> the scene it shows. A blob of a thing's colour is always reported, as the shape it
    resembles most. The ground is the ground colour that covers most pixels."""
    ground, read = parse_scored(image)
    return Scene(ground, tuple(thing for thing, _ in read))


def parse_scored(image: np.ndarray) -> tuple[str, list[tuple[Thing, float]]]:
    """The ground, and every thing with how well its blob fits the shape: their intersection over union."""
    distance = ((image.astype(np.float32)[:, :, None] - _PALETTE) ** 2).sum(-1)
    label = distance.argmin(-1)
    counts = np.bincount(label.ravel(), minlength=len(_NAMES))
    ground = _NAMES[6 + int(counts[6:].argmax())]
    things = []
    for index, colour in enumerate(COLOURS):
        # Opening by one pixel removes the rims where anti-aliasing between two colours looks like a third.
        opened = ndimage.binary_opening(label == index)
        parts, count = ndimage.label(opened)
        for part in range(1, count + 1):
            mask = parts == part
            if mask.sum() < MIN_AREA:
                continue
            cy, cx = ndimage.center_of_mass(mask)
            best = None
            for shape in SHAPES:
                for size in RADII:
                    ox, oy = _centroid(shape, size)
                    thing = Thing(shape, colour, size, cx + 0.5 - ox, cy + 0.5 - oy)
                    score = _overlap(mask.astype(np.float32), thing)
                    if best is None or score > best[0]:
                        best = (score, thing)
            things.append(best[::-1])
    return ground, things
