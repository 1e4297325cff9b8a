"""Rotary positions along three axes: x, y and level (Su et al., arXiv 2104.09864, one axis per share of the head).

A position is `(x, y, level)`. x and y are counted in patches of the vision towers' grid, so that neighbouring patches
differ by one at every grid size; the level counts from 0 (the whole image), and image patches stand one level
below the finest tokens. Only differences of positions matter to attention.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

# Positions reach about 32, not the thousands of text: 100 keeps the slowest pair at a small fraction of a turn over
# the whole grid (the value that RoPE-ViT, arXiv 2403.13298, uses for axial positions).
THETA = 100.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of one head for (x, y, level): about an eighth for the level, the rest equally for x and y, all even."""
    if head_dim < 8 or head_dim % 4:
        raise ValueError(f"A head of {head_dim} channels cannot hold three rotary axes; use a multiple of 4, at least 8.")
    plane = 2 * (head_dim * 7 // 32)
    return plane, plane, head_dim - 2 * plane


def box_positions(boxes: Tensor, levels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions of tokens: the centre of each box, in patches of `grid`, and the level.

    boxes [T, 4] (x0, y0, x1, y1) in unit coordinates, levels [T]; grid (rows, cols). Returns [T, 3] float32.
    """
    rows, cols = grid
    boxes = boxes.float()
    x = (boxes[:, 0] + boxes[:, 2]) * (cols / 2)
    y = (boxes[:, 1] + boxes[:, 3]) * (rows / 2)
    return torch.stack([x, y, levels.to(boxes)], dim=-1)


def patch_positions(grid: tuple[int, int], level: int, device: torch.device | None = None) -> Tensor:
    """Positions of the centres of a (rows, cols) grid of patches, row by row, all at `level`.

    Returns [N, 3] float32.
    """
    rows, cols = grid
    y, x = torch.meshgrid(
        torch.arange(rows, device=device, dtype=torch.float32) + 0.5,
        torch.arange(cols, device=device, dtype=torch.float32) + 0.5,
        indexing="ij",
    )
    return rearrange(torch.stack([x, y, torch.full_like(x, float(level))], dim=-1), "rows cols d -> (rows cols) d")


def rotary_angles(positions: Tensor, dims: tuple[int, ...], theta: float = THETA) -> Tensor:
    """Angles in radians, one per pair of channels: position * theta^(-2i/d), axis after axis.

    positions [..., A] for A axes; dims: even channels per axis. Returns [..., sum(dims) / 2] float32.
    """
    parts = []
    for axis, dim in enumerate(dims):
        frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
        parts.append(positions[..., axis, None].float() * frequency)
    return torch.cat(parts, dim=-1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn every pair of neighbouring channels of x [..., S, d] by angles [S, d / 2]; same shape and dtype as x.

    Computed in float32: at half precision the cosine of a large angle is off by more than a patch.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
