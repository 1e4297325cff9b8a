from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy
from semantic_diffusion_adapter.kernels.visibility import patch_grid, region_bias, visible
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INF = float("inf")
grids = st.tuples(st.integers(1, 13), st.integers(1, 13))
levels = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 2)),
    min_size=1,
    max_size=3,
    unique_by=lambda x: x[:2],
)


def exact(made, grid):
    """bool [P, T] in rational arithmetic."""
    rows, cols = grid
    seen = []
    for p in range(rows * cols):
        r, c = divmod(p, cols)
        line = []
        for level in made.levels:
            for cell in range(level.rows * level.cols):
                i, j = divmod(cell, level.cols)
                high = min(Fraction(i + 1, level.rows), Fraction(r + 1, rows))
                wide = min(Fraction(j + 1, level.cols), Fraction(c + 1, cols))
                overlap = high > max(Fraction(i, level.rows), Fraction(r, rows))
                overlap = overlap and wide > max(Fraction(j, level.cols), Fraction(c, cols))
                line += [overlap] * level.tokens
        seen.append(line)
    return torch.tensor(seen)


@given(levels, grids)
@settings(max_examples=80, deadline=None)
def test_equals_rational_arithmetic_also_after_rounding_to_65536ths(made, grid):
    made = hierarchy(made)
    expected = exact(made, grid)
    boxes = made.boxes()
    assert torch.equal(visible(boxes, grid), expected)
    assert torch.equal(visible((boxes * 65536).round() / 65536, grid), expected)


def test_a_patch_that_straddles_a_border_sees_both_cells():
    seen = visible(hierarchy([[1, 2, 1]]).boxes(), (1, 3))
    assert seen.tolist() == [[True, False], [True, True], [False, True]]


def test_a_touching_edge_and_an_empty_box_are_not_seen():
    boxes = torch.tensor([[0.5, 0.0, 1.0, 1.0], [0.25, 0.25, 0.25, 0.75]])
    assert visible(boxes, (1, 2)).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("latent, grid", [((16, 16), (8, 8)), ((17, 16), (9, 8)), ((1, 99), (1, 50))])
def test_patch_grid_rounds_up(latent, grid):
    assert patch_grid(*latent) == grid


def test_the_bias_of_every_part_of_the_sequence():
    made = hierarchy([[1, 1, 1], [2, 2, 1]])
    strengths = torch.tensor([0.0, 1.0, -2.0, -INF, 0.5])
    bias = region_bias(made.boxes(), strengths, (2, 2), text=7, references=3)
    assert bias.shape == (7 + 4 + 3, 5) and bias.dtype == torch.float32
    for row in (*range(7), *range(11, 14)):
        assert torch.equal(bias[row], strengths)
    assert bias[7:11].tolist() == [
        [0, 1, -INF, -INF, -INF],
        [0, -INF, -2, -INF, -INF],
        [0, -INF, -INF, -INF, -INF],
        [0, -INF, -INF, -INF, 0.5],
    ]


def test_tokens_may_mix_only_where_their_boxes_overlap():
    made = hierarchy([[1, 1, 1], [1, 2, 1], [1, 3, 1]])
    bias = region_bias(made.boxes(), torch.zeros(6), (2, 2), text=6, mixing="overlap")
    among = (bias[:6] == 0).int().tolist()
    assert among == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 1, 1, 0],
        [1, 0, 1, 0, 1, 1],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 0, 1, 0, 0, 1],
    ]


def test_batched_layouts_are_their_entries_stacked():
    one, two = hierarchy([[1, 1, 2], [2, 2, 1]]).boxes(), hierarchy([[2, 3, 1]]).boxes()
    strengths = torch.randn(2, 6)
    bias = region_bias(torch.stack([one, two]), strengths, (3, 5), text=8, references=2, mixing="overlap")
    for entry, boxes in enumerate((one, two)):
        assert torch.equal(bias[entry], region_bias(boxes, strengths[entry], (3, 5), 8, 2, "overlap"))
    shared = region_bias(one, strengths, (3, 5), text=8)
    assert torch.equal(shared[1], region_bias(one, strengths[1], (3, 5), text=8))
    assert region_bias(torch.stack([one, two]), strengths[0], (3, 5), text=8).shape == (2, 23, 6)


@given(levels, grids, st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.sampled_from(["all", "overlap"]))
@settings(max_examples=40, deadline=None)
def test_a_mask_adds_the_log_of_its_mean_over_the_patch(made, grid, height, width, seed, mixing):
    """Against the mean over a picture so fine that every patch is a whole number of its pixels."""
    made, (rows, cols) = hierarchy(made), grid
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, height, width, generator=generator)
    masks = torch.where(masks < 0.3, 0.0, torch.where(masks > 0.8, 1.0, masks))
    masked_by = torch.randint(-1, 2, (made.token_count,), generator=generator)
    strengths = torch.randn(made.token_count, generator=generator)
    text = made.token_count + 2
    plain = region_bias(made.boxes(), strengths, grid, text, 3, mixing)
    bias = region_bias(made.boxes(), strengths, grid, text, 3, mixing, masks, masked_by)
    fine = masks.double().repeat_interleave(rows, 1).repeat_interleave(cols, 2)
    means = torch.nn.functional.avg_pool2d(fine, (height, width)).flatten(1)
    expected = plain.clone()
    for token, row in enumerate(masked_by.tolist()):
        if row >= 0:
            expected[text : text + rows * cols, token] += means[row].log().float()
    beside = slice(made.token_count if mixing == "overlap" else 0, None)
    assert torch.equal(bias[beside].isinf(), expected[beside].isinf())
    assert torch.allclose(bias[beside], expected[beside], atol=1e-5)
    among = bias[: made.token_count]
    assert torch.equal(among.isinf(), among.T.isinf()) and not among.diagonal().isinf().any()


def test_a_mask_that_shows_everything_is_no_mask():
    made = hierarchy("tree64")
    strengths, rows = torch.randn(64), torch.arange(64) % 2 - 1
    plain = region_bias(made.boxes(), strengths, (5, 7), 70, 4, "overlap")
    assert torch.equal(region_bias(made.boxes(), strengths, (5, 7), 70, 4, "overlap", torch.ones(1, 256, 256), rows), plain)


def test_a_region_and_what_surrounds_it_do_not_mix():
    """Also where the mask is soft, and after both went through bytes."""
    soft = torch.linspace(-0.5, 1.5, 256).clamp(0, 1).expand(256, 256)
    masks = torch.stack([soft, 1 - soft, (soft > 0).float()])
    masks = (masks * 255).round() / 255
    boxes, rows = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(5, 4), torch.tensor([0, 0, 1, 2, -1])
    bias = region_bias(boxes, torch.zeros(5), (16, 16), 5, 0, "overlap", masks, rows)
    assert (bias[:5] == 0).int().tolist() == [
        [1, 1, 0, 1, 1],
        [1, 1, 0, 1, 1],
        [0, 0, 1, 1, 1],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]
    assert (region_bias(boxes, torch.zeros(5), (16, 16), 5, 0, "all", masks, rows)[:5] == 0).all()


def test_batched_masks_are_their_entries_stacked():
    boxes, masks = hierarchy([[1, 1, 2], [2, 2, 1]]).boxes(), torch.rand(2, 3, 8, 8)
    rows = torch.randint(-1, 3, (2, 6))
    bias = region_bias(boxes, torch.zeros(6), (3, 5), 8, 2, "overlap", masks, rows)
    for entry in range(2):
        assert torch.equal(bias[entry], region_bias(boxes, torch.zeros(6), (3, 5), 8, 2, "overlap", masks[entry], rows[entry]))


@pytest.mark.parametrize("device", ["xpu", "mps", "cuda"])
def test_no_device_but_the_cpu_sees_float64(device):
    """Intel Arc and MPS have none. Shapes only, since there is no such device here."""
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update((each.device.type, each.dtype) for each in tree_leaves(out) if isinstance(each, torch.Tensor))
            return out

    with FakeTensorMode(), Watch():
        bias = region_bias(torch.empty(6, 4, device=device), torch.empty(2, 6, device=device), (3, 5), 8, 2, "overlap")
        assert bias.device.type == device and bias.dtype == torch.float32
        assert visible(torch.empty(6, 4, device=device), (3, 5)).device.type == device
    assert ("cpu", torch.float64) in seen and (device, torch.float64) not in seen


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda b: region_bias(b, torch.zeros(3), (2, 2), 8), "one each"),
        (lambda b: region_bias(b, torch.zeros(4), (2, 2), 3), "cannot begin with 4"),
        (lambda b: region_bias(b, torch.zeros(4), (2, 2), 8, mixing="some"), "'some'"),
        (lambda b: region_bias(b, torch.zeros(4), (2, 2), 8, masks=torch.ones(1, 4, 4), masked_by=b.long()[:, 0] + 1), "not among the 1"),
        (lambda b: visible(b[0], (2, 2)), r"\[tokens, 4\]"),
        (lambda b: patch_grid(0, 4), "0x4"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call(hierarchy([[2, 2, 1]]).boxes())
