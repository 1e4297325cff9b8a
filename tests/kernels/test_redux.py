"""The square that a vision tower sees, and the embedding of a style model's tokens."""

from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS
from semantic_diffusion_adapter.kernels.redux import embed, square
from semantic_diffusion_adapter.kernels.regions import pool_grid


@pytest.mark.parametrize(("height", "width"), [(40, 40), (30, 90), (200, 20), (1, 7), (8, 8)])
def test_the_cells_lie_where_the_picture_shows_them(height, width):
    """The left half black, the right white, the top redder: half of the patches' columns and rows say so, at any aspect."""
    image = torch.zeros(2, height, width, 3)
    image[:, :, width // 2 + width % 2 :] = 1
    seen = square(image, 56, 60)
    assert seen.shape == (2, 60, 60, 3) and seen.dtype == torch.float32
    assert 0 <= seen.min() and seen.max() <= 1
    columns = seen[0, :56, :56].unflatten(1, (4, 14)).mean((0, 2, 3))
    edge = (width // 2 + width % 2) / width
    expected = (torch.arange(1, 5) / 4 - edge).clamp(0, 0.25) * 4
    torch.testing.assert_close(columns, expected, atol=0.12 if width > 7 else 0.3, rtol=0)
    assert torch.equal(seen[:, 56:], seen[:, 55:56].expand(-1, 4, -1, -1))  # which no patch reads
    assert torch.equal(seen[:, :, 56:], seen[:, :, 55:56].expand(-1, -1, 4, -1))


def test_a_picture_of_the_right_size_is_left_alone():
    image = torch.rand(1, 32, 32, 3)
    assert torch.equal(square(image, 32, 32), image)
    assert torch.equal(square(image.half(), 32, 32), image.half().float())


def test_transparency_is_laid_over_white_before_the_resize():
    """What lies under a clear place has no say, not even at its edge."""
    image = torch.zeros(1, 50, 30, 4)
    image[..., 1], image[..., 3] = 1, 1
    image[:, 25:] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    seen = square(image, 24, 24)
    assert torch.allclose(seen[..., 1], torch.ones(()))
    assert torch.allclose(seen[:, -6:], torch.ones(())) and torch.allclose(seen[:, :6, :, 0], torch.zeros(()), atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("side", [27, 32])
def test_every_level_has_its_strength(preset, side):
    tokens = torch.randn(2, side * side, 6, generator=torch.Generator().manual_seed(0))
    e = embed(tokens, preset, (0.5, 1.0, 0.0))
    assert torch.equal(e.tokens, pool_grid(tokens, PRESETS[preset]).tokens) and e.batch == 2
    expected = torch.tensor([0.5, 1.0, 0.0])[e.levels]
    torch.testing.assert_close(e.strengths.exp(), expected)
    assert e.hierarchy() == PRESETS[preset] and e.source == {"style_model": preset}
    assert torch.equal(embed(tokens, preset).strengths, torch.zeros(e.token_count))
    assert torch.equal(embed(tokens, preset, (1.0, 1.0, 1.0)).strengths, torch.zeros(e.token_count))
