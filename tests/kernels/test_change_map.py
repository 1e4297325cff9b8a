"""Where two conditionings paint differently: the arithmetic of the map and of its mask."""

from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels import change_map, picture
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS
from semantic_diffusion_adapter.kernels.visibility import patch_grid

SIZES = [(8, 8), (7, 9), (1, 5), (2, 3), (13, 6)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_times_fall_within_the_range(count):
    times = change_map.times(count)
    assert len(times) == count and times == sorted(set(times), reverse=True)
    assert change_map.LOWEST <= times[-1] <= times[0] <= change_map.HIGHEST
    if count > 1:
        assert (times[0], times[-1]) == pytest.approx((change_map.HIGHEST, change_map.LOWEST))


def test_no_noise_at_all_is_refused():
    with pytest.raises(ValueError, match="one noise or more, not 0"):
        change_map.times(0)


@pytest.mark.parametrize("size", SIZES)
def test_a_patch_has_the_mean_over_its_cells_of_the_sum_over_channels(size):
    one, other = random(2, 3, *size), random(2, 3, *size, seed=1)
    found = change_map.patch_change(one, other)
    assert found.shape == (2, *patch_grid(*size))
    square = (one - other).square().sum(1)
    for row in range(found.shape[1]):
        for col in range(found.shape[2]):
            cells = square[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            assert torch.allclose(found[:, row, col], cells.mean((1, 2)))
    assert torch.equal(found, change_map.patch_change(other, one))
    assert not change_map.patch_change(one, one).any()


def test_relative_is_of_each_pictures_own_maximum():
    change = random(3, 4, 5).square()
    change[1] *= 1000
    change[2] = 0
    found = change_map.relative(change)
    assert torch.equal(found.amax((1, 2)), torch.tensor([1.0, 1.0, 0.0]))
    assert torch.allclose(found[1], change[1] / change[1].max())
    assert torch.allclose(change_map.relative(7 * change), found)


@pytest.mark.parametrize("grow", [0, 1, 3])
def test_the_mask_is_the_threshold_grown_by_squares(grow):
    change = random(2, 9, 11).square().clamp(max=1)
    mask = change_map.changed(change, 0.9, grow)
    for picture_mask, values in zip(mask, change):
        for row in range(9):
            for col in range(11):
                near = values[max(row - grow, 0) : row + grow + 1, max(col - grow, 0) : col + grow + 1]
                assert picture_mask[row, col] == float((near > 0.9).any())
    assert (change_map.changed(change, 0.5, grow) >= mask).all(), "a lower threshold shows more"
    assert (change_map.changed(change, 0.9, grow + 1) >= mask).all()


def test_nothing_changed_is_an_empty_mask_at_every_threshold():
    assert not change_map.changed(torch.zeros(1, 4, 4), 0.0, 2).any()


@pytest.mark.parametrize("size", [(32, 48), (40, 24), (8, 8), (16, 104)])
def test_a_picture_of_any_size_gets_squares_of_16_pixels(size):
    patches = random(2, *patch_grid(*size, 16))
    found = change_map.enlarge(patches, *size)
    assert found.shape == (2, *size)
    for row in range(0, size[0], 5):
        for col in range(0, size[1], 5):
            assert torch.equal(found[:, row, col], patches[:, row // 16, col // 16])


def test_patches_of_another_picture_are_refused():
    with pytest.raises(ValueError, match="32x48 has 2x3 patches"):
        change_map.enlarge(torch.zeros(1, 3, 3), 32, 48)


@pytest.mark.parametrize("reach", [1, 3, 8])
def test_a_soft_edge_leaves_the_white_and_reaches_so_far(reach):
    mask = torch.zeros(1, 64, 80)
    mask[0, 20:40, :30] = 1
    soft = change_map.soften(mask, reach)
    assert torch.equal(soft[mask > 0], mask[mask > 0])
    assert not soft[:, :, 30 + 2 * reach :].any() and not soft[:, 40 + 2 * reach :].any()
    across = soft[0, 30, 29 : 31 + 2 * reach]
    assert (across.diff() < 0).all(), "it falls steadily from 1 to 0"
    assert across[0] == 1 and across[-1] == 0
    assert torch.equal(change_map.soften(torch.ones(1, 9, 9), reach), torch.ones(1, 9, 9))


def test_no_feather_is_the_mask_itself():
    mask = (random(1, 8, 8) > 0).float()
    assert torch.equal(change_map.soften(mask, 0), mask)


def test_by_tokens_a_place_has_what_its_finest_tokens_moved():
    hierarchy = PRESETS["tree128"]
    source = from_hierarchy(random(2, hierarchy.token_count, 6), hierarchy)
    edited = from_hierarchy(source.tokens.clone(), hierarchy)
    assert not change_map.token_change(edited, source, (8, 8)).any()
    edited.tokens[1, -4:] *= 1.5  # the last of 4 x 4 cells
    edited.tokens[1, :32] *= 1.9  # the whole picture's: not the finest
    found = change_map.token_change(edited, source, (8, 8))
    expected = torch.zeros(2, 8, 8)
    expected[1, 6:, 6:] = 0.5
    assert torch.allclose(found, expected)
    assert torch.equal(found, picture.spread(edited, picture.measure(edited, "change", source), 8, 8))
