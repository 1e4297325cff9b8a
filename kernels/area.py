"""Exact areas: how much of an interval lies in each cell of a grid, and pictures averaged from one grid to another."""

from __future__ import annotations

import torch
from torch import Tensor


def widest_float(tensor: Tensor) -> Tensor:
    """The tensor in float64, which keeps unit coordinates and sums over a picture exact far below a pixel.

    On other devices than CPU and CUDA it is float32: MPS, Intel Arc and DirectML have no float64.
    """
    return tensor.to(torch.float64 if tensor.device.type in ("cpu", "cuda") else torch.float32)


def shares(low: Tensor, high: Tensor, size: int) -> Tensor:
    """[N, size]: which part of each interval low..high [N] lies in each of `size` equal cells of 0..1.

    A row adds up to 1 where the interval lies within 0..1, and to less by what lies outside.
    """
    edges = torch.arange(size + 1, device=low.device, dtype=low.dtype) / size
    covered = torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])
    return covered.clamp_min(0) / (high - low)[:, None]


def resample(picture: Tensor, rows: int, cols: int) -> Tensor:
    """[..., H, W] -> [..., rows, cols]: the mean of the picture over every cell of the other grid, `widest_float`."""
    picture = widest_float(picture)

    def cells(count: int, size: int) -> Tensor:
        edges = torch.arange(count + 1, device=picture.device, dtype=picture.dtype) / count
        return shares(edges[:-1], edges[1:], size)

    return cells(rows, picture.shape[-2]) @ picture @ cells(cols, picture.shape[-1]).mT


def snap_ends(mask: Tensor) -> Tensor:
    """A mask in which values within 1e-6 of 0 or 1 are 0 or 1.

    Rounding must neither show a token where there is none nor weaken one that is seen whole.
    """
    return torch.where(mask < 1e-6, 0.0, torch.where(mask > 1 - 1e-6, 1.0, mask))
