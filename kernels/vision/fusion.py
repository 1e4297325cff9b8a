"""Fusion of the vision towers: per-tower norm and MLP to the adapter's width on one shared grid, then summed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .towers import TowerConfig


class Fusion(nn.Module):
    """Patch features of every tower -> one feature per patch of the shared grid."""

    def __init__(self, towers: tuple[TowerConfig, ...], width: int):
        """Raises ValueError where there is no tower, an id appears twice, or two towers have different grids."""
        super().__init__()
        if not towers:
            raise ValueError("An adapter needs at least one vision tower; list at least a DINOv2.")
        first = towers[0]
        for tower in towers[1:]:
            if tower.grid != first.grid:
                raise ValueError(
                    f"Vision towers '{first.id}' ({first.grid[0]}x{first.grid[1]} patches) and '{tower.id}' "
                    f"({tower.grid[0]}x{tower.grid[1]} patches) do not share a grid; choose input sizes with equal patch "
                    f"counts, such as {first.grid[0] * tower.patch} px for '{tower.id}'."
                )
        if len({tower.id for tower in towers}) < len(towers):
            raise ValueError("The same vision tower id is listed twice; list every tower once.")
        self.towers = tuple(towers)
        self.grid = first.grid
        # A list, not a ModuleDict: tower ids may hold dots, which module names may not.
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(tower.width), nn.Linear(tower.width, width), nn.GELU(), nn.Linear(width, width))
            for tower in towers
        )
        # Rotary positions tell attention where to look; this tells a token where what it read had stood.
        self.position = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], width) * 0.02)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """features: tower id -> [B, rows * cols, tower width], any float dtype. Returns [B, rows * cols, width]."""
        count = self.grid[0] * self.grid[1]
        fused = self.position
        for tower, project in zip(self.towers, self.projections):
            if tower.id not in features:
                raise ValueError(
                    f"The patch features of vision tower '{tower.id}' are missing (there are: {', '.join(features) or 'none'}); "
                    "encode the image with the towers that the adapter names."
                )
            patches = features[tower.id]
            if patches.ndim != 3 or tuple(patches.shape[1:]) != (count, tower.width):
                raise ValueError(
                    f"The patch features of vision tower '{tower.id}' have shape {list(patches.shape)} instead of "
                    f"[batch, {count}, {tower.width}]; encode the image with the tower that the adapter names."
                )
            fused = fused + project(patches.to(self.position.dtype))
        return fused
