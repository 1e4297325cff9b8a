"""A curve of numbers as a picture."""

from __future__ import annotations

import torch
from torch import Tensor

HEIGHT, WIDTH = 256, 512
_SPAN = 10  # share of the curve, as its inverse, over which the bold line averages
_GROUND, _FAINT, _BOLD = 1.0, 0.75, 0.1


def draw(values: list[float]) -> Tensor:
    """[1, 256, 512, 3] float32 in 0..1: the values from left to right, from 0 at the bottom to the largest at the top.

    Faint the values, bold the mean of each and those shortly before it.
    """
    picture = torch.full((HEIGHT, WIDTH), _GROUND)
    if values:
        raw = torch.tensor(values, dtype=torch.float64)
        span = max(1, len(values) // _SPAN)
        sums = torch.cat([raw.new_zeros(1), raw.cumsum(0)])
        ends = torch.arange(1, len(values) + 1)
        begins = (ends - span).clamp_min(0)
        mean = (sums[ends] - sums[begins]) / (ends - begins)
        for line, shade, thick in ((raw, _FAINT, 0), (mean, _BOLD, 1)):
            _line(picture, line / raw.max().clamp_min(1e-12), shade, thick)
    return picture[None, ..., None].expand(-1, -1, -1, 3).clone()


def _line(picture: Tensor, shares: Tensor, shade: float, thick: int) -> None:
    places = torch.linspace(0, len(shares) - 1, WIDTH, dtype=torch.float64)
    low = places.floor().long()
    high = (low + 1).clamp_max(len(shares) - 1)
    heights = torch.lerp(shares[low], shares[high], places - low)
    rows = ((1 - heights.clamp(0, 1)) * (HEIGHT - 1)).round().long().tolist()
    for column, row in enumerate(rows):
        before = rows[max(0, column - 1)]
        picture[max(0, min(row, before) - thick) : max(row, before) + thick + 1, column] = shade
