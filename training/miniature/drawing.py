"""Scenes as numbers, and many of them drawn at once on any device: the pictures of `scenes.render`, in batches.

The codes of a batch are things [B, N, 6] float32 (number of shape, number of colour, radius, x, y in pixels, 1 or 0 for
no thing) in drawing order, and grounds [B] int64.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .scenes import COLOURS, GROUNDS, RADII, SHAPES, SIZE, Scene, Thing

MOST = 6  # things of a scene
_COLOURS, _GROUNDS = tuple(COLOURS), tuple(GROUNDS)
_SIZES = {radius: name for name, radius in RADII.items()}


def codes(scenes: Sequence[Scene], most: int = MOST) -> dict[str, Tensor]:
    """{"things": [B, most, 6] float32, "grounds": [B] int64} on the CPU."""
    things = np.zeros((len(scenes), most, 6), np.float32)
    for row, scene in enumerate(scenes):
        for place, t in enumerate(scene.things):
            things[row, place] = (SHAPES.index(t.shape), _COLOURS.index(t.colour), t.radius, t.x, t.y, 1)
    grounds = np.array([_GROUNDS.index(scene.ground) for scene in scenes], np.int64)
    return {"things": torch.from_numpy(things), "grounds": torch.from_numpy(grounds)}


def scene_of(things: np.ndarray, ground: int) -> Scene:
    """The scene of one row of codes, things [N, 6]."""
    return Scene(_GROUNDS[ground], tuple(
        Thing(SHAPES[int(shape)], _COLOURS[int(colour)], _SIZES[float(radius)], round(float(x), 2), round(float(y), 2))
        for shape, colour, radius, x, y, present in things if present))


def coverages(things: Tensor) -> Tensor:
    """How much of each pixel every thing covers: [B, N, 128, 128] float32 in [0, 1] (scenes.coverage)."""
    shape, _, radius, x, y, present = (each[..., None, None] for each in things.unbind(-1))
    axis = torch.arange(SIZE, device=things.device) + 0.5
    dx, dy = axis - x, axis[:, None] - y
    across, down = dx.abs(), dy.abs()
    arm, long = 0.3 * radius, 0.95 * radius
    fields = ((dx.square() + dy.square()).sqrt() - 0.9 * radius,
              torch.maximum(across, down) - 0.78 * radius,
              torch.maximum(dy - 0.5 * radius, 0.8660254 * across - 0.5 * dy - 0.5 * radius),
              torch.minimum(torch.maximum(across - arm, down - long), torch.maximum(across - long, down - arm)))
    field = fields[0]
    for number in range(1, len(SHAPES)):
        field = torch.where(shape == number, fields[number], field)
    return (0.5 - field).clamp(0, 1) * present


def draw(things: Tensor, grounds: Tensor) -> Tensor:
    """The pictures [B, 3, 128, 128] float32 in [-1, 1] with the 256 levels of uint8."""
    colours = torch.tensor(list(COLOURS.values()), device=things.device, dtype=torch.float32)
    plain = torch.tensor(list(GROUNDS.values()), device=things.device, dtype=torch.float32)
    image = plain[grounds][:, :, None, None].expand(-1, -1, SIZE, SIZE)
    for alpha, colour in zip(coverages(things).unbind(1), colours[things[..., 1].long()].unbind(1)):
        image = image + alpha[:, None] * (colour[:, :, None, None] - image)
    return image.round() / 127.5 - 1


def labels(things: Tensor, grounds: Tensor, grid: int = 8) -> Tensor:
    """What each cell of a grid shows: [B, grid * grid, 15] float32, two distributions side by side, the share of the
    cell's area taken by each of (6 colours, 4 grounds) and by each of (4 shapes, no shape)."""
    cell = SIZE // grid
    shares = coverages(things).unflatten(2, (grid, cell)).unflatten(4, (grid, cell)).mean((3, 5)).flatten(2)
    known = torch.zeros(len(things), 15, grid * grid, device=things.device)
    colours = known[:, :6].scatter_add(1, things[..., 1].long()[..., None].expand_as(shares), shares)
    shapes = known[:, :4].scatter_add(1, things[..., 0].long()[..., None].expand_as(shares), shares)
    rest = 1 - shares.sum(1, keepdim=True)
    ground = rest * torch.nn.functional.one_hot(grounds, 4)[..., None]
    return torch.cat([colours, ground, shapes, rest], 1).transpose(1, 2)
