"""What the base learns beside painting, and the windows that the autoencoder sees."""
from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.miniature.base import place_loss  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import GROUNDS  # noqa: E402
from semantic_diffusion_adapter.training.miniature.vae import VaeStage  # noqa: E402


def test_a_patch_that_knows_its_row_and_column_has_no_loss():
    grid = torch.arange(64)
    known = torch.cat([torch.nn.functional.one_hot(n, 8) for n in (grid // 8, grid % 8)], 1).float() * 50
    assert place_loss(known.expand(2, -1, -1)) < 1e-6
    swapped = torch.cat([known[:, 8:], known[:, :8]], 1).expand(2, -1, -1)
    assert place_loss(swapped) > 10
    assert torch.isclose(place_loss(torch.zeros(2, 64, 16)), torch.tensor(2 * np.log(8.0), dtype=torch.float32))


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("side", [64, 128])
def test_a_window_shows_a_thing(busy, side):
    for index in range(20):
        window = VaeStage.window(index, busy, side)
        assert window.shape == (side, side, 3) and window.dtype == np.uint8
        colours = {tuple(pixel) for pixel in window.reshape(-1, 3)}
        assert colours - set(GROUNDS.values()), "nothing but ground"
