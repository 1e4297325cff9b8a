"""The picture of a curve."""

from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels import curve


def heights(picture: torch.Tensor) -> list[int]:
    """The middle of what is drawn, column by column."""
    dark = picture[0, :, :, 0] < 0.5
    rows = torch.arange(curve.HEIGHT)[:, None]
    return ((rows * dark).sum(0) // dark.sum(0)).tolist()


def test_it_falls_from_the_top_to_the_bottom():
    found = heights(curve.draw([float(10 - n) for n in range(11)]))
    assert found[0] == 0 and found[-1] >= curve.HEIGHT - 3
    assert all(before <= after for before, after in zip(found, found[1:]))


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 0.0]])
def test_few_values(values):
    picture = curve.draw(values)
    assert picture.shape == (1, curve.HEIGHT, curve.WIDTH, 3) and picture.dtype == torch.float32
    assert bool((picture < 1).any()) is bool(values)


def test_the_bold_line_is_a_mean():
    noisy = [1.0 if n % 2 else 0.5 for n in range(400)]
    assert abs(heights(curve.draw(noisy))[-1] / (curve.HEIGHT - 1) - 0.25) < 0.02
