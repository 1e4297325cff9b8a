"""Shape: how well does what is painted cover what should be there, pixel by pixel?

The parser names the template that fits best, and so forgives a lumpy circle. This figure does not use it: a pixel's
share of a thing is read off where its colour lies between the ground's and the thing's, and compared with the thing's
exact coverage: both at one half.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..scenes import COLOURS, GROUNDS, SIZE, Scene, Thing, coverage

AROUND = 8.0  # px about a thing that count as its own
FAR = 60.0  # of 255: a colour this far from every mixture of ground and thing is neither
SEEN = 0.3  # a thing that overlaps less than this is missing; F1 counts it


def painted_share(picture: np.ndarray, thing: Thing, ground: str) -> np.ndarray:
    """[128, 128] float32 in 0..1: how much of each pixel the picture gives to a thing of this colour on this ground."""
    low, high = (np.asarray(colour, np.float32) for colour in (GROUNDS[ground], COLOURS[thing.colour]))
    way = high - low
    share = np.clip((picture.astype(np.float32) - low) @ way / (way @ way), 0, 1)
    off = np.linalg.norm(picture - (low + share[..., None] * way), axis=-1)
    return np.where(off < FAR, share, 0).astype(np.float32)


def overlaps(scene: Scene, picture: np.ndarray) -> list[float]:
    """Intersection over union of every thing of the scene with what the picture shows about its place. The places
    of other things do not count."""
    axis, masks = np.arange(SIZE) + 0.5, [coverage(thing) for thing in scene.things]
    found = []
    for number, thing in enumerate(scene.things):
        near = np.hypot(axis[None] - thing.x, axis[:, None] - thing.y) <= thing.radius + AROUND
        others = sum((mask for other, mask in enumerate(masks) if other != number), np.zeros((SIZE, SIZE), np.float32))
        counted = near & (others == 0)
        seen, truth = painted_share(picture, thing, scene.ground)[counted] > 0.5, masks[number][counted] > 0.5
        found.append(float((seen & truth).sum() / (seen | truth).sum()))
    return found


def iou(scenes: Sequence[Scene], pictures: Sequence[np.ndarray]) -> float | None:
    """Mean overlap of the things that are there; None where there is none."""
    found = [each for scene, picture in zip(scenes, pictures) for each in overlaps(scene, picture) if each >= SEEN]
    return float(np.mean(found)) if found else None
