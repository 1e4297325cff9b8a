"""One attribute for one thing of a scene: a word, the true edit, and the region in which it may act."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..captions import Edit
from ..scenes import COLOURS, RADII, SHAPES, SIZE, choice, generator, is_free, scene
from .decoder import PATCH

KINDS = ("colour", "shape", "size")
MARGIN = 2  # pixels around a thing's box


def attribute_of(split: str, index: int, seed: int) -> tuple[Edit, str]:
    """(the edit, its word) of a scene: the kinds take turns; a thing with no room to grow takes a colour."""
    truth, rng = scene(split, index, seed), generator(split, index, 41, seed)
    old, kind = choice(rng, truth.things), KINDS[index % len(KINDS)]
    others = tuple(thing for thing in truth.things if thing != old)
    names = {thing.name for thing in others}
    (other,) = (size for size in RADII if size != old.size)
    if kind == "size" and not is_free(old.x, old.y, RADII[other], others):
        kind = "colour"
    if kind == "size":
        word, new, instruction = other, replace(old, size=other), ""
    elif kind == "shape":
        word = choice(rng, [each for each in SHAPES if each != old.shape and f"{old.colour} {each}" not in names])
        new, instruction = replace(old, shape=word), f"replace the {old.name} with a {old.colour} {word}"
    else:
        word = choice(rng, [each for each in COLOURS if each != old.colour and f"{each} {old.shape}" not in names])
        new, instruction = replace(old, colour=word), f"make the {old.name} {word}"
    target = replace(truth, things=tuple(new if thing == old else thing for thing in truth.things))
    return Edit(kind, instruction, truth, target, old, new), word


def region_of(change: Edit) -> np.ndarray:
    """[8, 8] bool: the patches that the subject's box touches, before or after the edit."""
    radius = max(change.subject.radius, change.result.radius) + MARGIN
    (left, right), (top, bottom) = ((max(0, int((v - radius) // PATCH)), int((v + radius) // PATCH) + 1)
                                    for v in (change.subject.x, change.subject.y))
    region = np.zeros((SIZE // PATCH, SIZE // PATCH), bool)
    region[top:bottom, left:right] = True
    return region


def box_of(region: np.ndarray) -> Tensor:
    """[1, 4]: x0, y0, x1, y1 of a region's patches, as shares."""
    rows, cols = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    height, width = region.shape
    return torch.tensor([[cols[0] / width, rows[0] / height, (cols[-1] + 1) / width, (rows[-1] + 1) / height]]).float()
