"""The embedding type refuses whatever would paint nonsense later, and knows its own hierarchy."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels.embedding import MASK_SIDE, SemanticEmbedding, fit_mask, from_hierarchy, tidy_masks
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS, hierarchy


def embedding(name="tree64", batch=2, width=5, **changes) -> SemanticEmbedding:
    grids = hierarchy(name)
    made = from_hierarchy(torch.randn(batch, grids.token_count, width), grids, torch.randn(batch, 3), {"adapter": "a"})
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_recovered_from_its_boxes(name):
    made = embedding(name)
    assert made.hierarchy() == PRESETS[name]
    assert torch.equal(made.strengths, torch.zeros(made.token_count))


def test_a_hierarchy_of_non_square_grids_and_kept_level_numbers():
    grids = hierarchy([[2, 3, 2], [1, 1, 4], [4, 1, 1]])
    made = from_hierarchy(torch.randn(1, grids.token_count, 4), grids)
    assert made.hierarchy() == grids
    assert dataclasses.replace(made, levels=made.levels * 5).hierarchy() == grids


def test_a_free_layout_has_no_hierarchy():
    made = embedding()
    moved = made.boxes.clone()
    moved[20] = torch.tensor([0.1, 0.1, 0.4, 0.3])
    with pytest.raises(ValueError, match="not a plain hierarchy"):
        dataclasses.replace(made, boxes=moved).hierarchy()
    with pytest.raises(ValueError, match="not a plain hierarchy"):
        dataclasses.replace(made, boxes=made.boxes.flip(0), levels=made.levels).hierarchy()


def test_dtype_moves_values_and_leaves_the_layout():
    made = embedding().to(dtype=torch.float16)
    assert made.tokens.dtype == made.pooled.dtype == torch.float16
    assert made.boxes.dtype == made.strengths.dtype == torch.float32 and made.levels.dtype == torch.int64
    confined = masked(embedding()).to("cpu", torch.float16)
    assert confined.masks.dtype == torch.float32 and confined.masked_by.dtype == torch.int64


def masked(made: SemanticEmbedding) -> SemanticEmbedding:
    """Two masks, the tokens in turn in the first, the second and none."""
    rows = torch.arange(made.token_count) % 3 - 1
    return dataclasses.replace(made, masks=torch.rand(2, MASK_SIDE, MASK_SIDE), masked_by=rows)


def with_value(tensor, index, value):
    changed = tensor.clone()
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: {"tokens": e.tokens[0]}, "floating"),
        (lambda e: {"tokens": e.tokens.long()}, "floating"),
        (lambda e: {"tokens": with_value(e.tokens, (0, 3, 1), torch.nan)}, "NaN or infinite tokens"),
        (lambda e: {"boxes": e.boxes[:-1]}, "boxes"),
        (lambda e: {"boxes": e.boxes.double()}, "boxes"),
        (lambda e: {"boxes": with_value(e.boxes, 0, torch.tensor([0.5, 0.0, 0.5, 1.0]))}, "empty or outside"),
        (lambda e: {"boxes": with_value(e.boxes, 0, torch.tensor([0.5, 0.0, 1.2, 1.0]))}, "empty or outside"),
        (lambda e: {"boxes": with_value(e.boxes, 0, torch.nan)}, "empty or outside"),
        (lambda e: {"levels": e.levels.int()}, "levels"),
        (lambda e: {"levels": e.levels - 1}, "negative"),
        (lambda e: {"strengths": with_value(e.strengths, 0, torch.inf)}, "NaN or \\+inf"),
        (lambda e: {"strengths": with_value(e.strengths, 0, torch.nan)}, "NaN or \\+inf"),
        (lambda e: {"levels": e.levels + 10**9}, "level of the embedding is 10000000"),
        (lambda e: {"pooled": e.pooled[:1]}, "pooled"),
        (lambda e: {"pooled": e.pooled.long()}, "pooled vector must be floating"),
        (lambda e: {"pooled": e.pooled * torch.nan}, "pooled"),
        (lambda e: {"schedule": torch.zeros(64, 3)}, "schedule"),
        (lambda e: {"schedule": torch.zeros(64, 2, dtype=torch.float64)}, "schedule"),
        (lambda e: {"schedule": torch.tensor([[0.5, 0.4]]).repeat(64, 1)}, "start after its end"),
        (lambda e: {"schedule": torch.tensor([[0.5, 1.1]]).repeat(64, 1)}, "outside 0..1"),
        (lambda e: {"schedule": torch.full((64, 2), torch.nan)}, "start after its end"),
    ],
)
def test_refusals(change, message):
    good = embedding()
    with pytest.raises(ValueError, match=message) as caught:
        dataclasses.replace(good, **change(good))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: {"masks": None}, "both masks and masked_by or neither"),
        (lambda e: {"masked_by": None}, "both masks and masked_by or neither"),
        (lambda e: {"masks": e.masks[:0], "masked_by": e.masked_by * 0 - 1}, r"float32 \[M, 256, 256\]"),
        (lambda e: {"masks": e.masks[:, :-1]}, r"float32 \[M, 256, 256\]"),
        (lambda e: {"masks": e.masks.double()}, "float32"),
        (lambda e: {"masks": e.masks * 2}, "outside 0..1"),
        (lambda e: {"masks": e.masks * torch.nan}, "NaN or outside 0..1"),
        (lambda e: {"masked_by": e.masked_by[:-1]}, r"int64 \[64\]"),
        (lambda e: {"masked_by": e.masked_by.int()}, "int64"),
        (lambda e: {"masked_by": e.masked_by + 1}, "one of 2 masks"),
        (lambda e: {"masked_by": e.masked_by - 1}, "or be -1"),
    ],
)
def test_refused_masks(change, message):
    good = masked(embedding())
    with pytest.raises(ValueError, match=message) as caught:
        dataclasses.replace(good, **change(good))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_a_mask_of_any_size_keeps_its_area(height, width, seed):
    mask = torch.rand(1, height, width, generator=torch.Generator().manual_seed(seed))
    fitted = fit_mask(mask)
    assert fitted.shape == (256, 256) and fitted.dtype == torch.float32
    for part in (slice(None), slice(0, 128)):  # the whole and the upper half: sums over rows are linear
        fine = mask[0].double().repeat_interleave(2, 0)[: height if part.stop else None]
        assert fitted[part].double().mean().item() == pytest.approx(fine.mean().item(), abs=1e-5)


def test_fit_mask_at_its_own_size_and_at_its_limits():
    mask = torch.randint(0, 256, (MASK_SIDE, MASK_SIDE)) / 255  # what is nearer to an end than this is moved there
    assert torch.equal(fit_mask(mask), mask) and torch.equal(fit_mask(mask[None]), mask)
    assert torch.equal(fit_mask(torch.full((7, 13), 3.0)), torch.ones(256, 256)), "clamped, and not a rounding below 1"
    assert torch.equal(fit_mask(torch.full((7, 13), -1.0)), torch.zeros(256, 256))
    assert torch.equal(fit_mask(mask.half()), mask.half().float())
    for wrong, message in (
        (torch.ones(2, 8, 8), "2 masks .* pick one"),
        (torch.ones(8), r"\[H, W\]"),
        (torch.ones(1, 0, 8), r"\[H, W\]"),
        (torch.full((8, 8), torch.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_mask(wrong)


def test_tidy_masks_keeps_what_is_used_once():
    a, b = torch.rand(2, MASK_SIDE, MASK_SIDE)
    masks, rows = tidy_masks(torch.stack([b, a, b, a]), torch.tensor([3, -1, 1, 2]))
    assert torch.equal(masks, torch.stack([a, b])) and rows.tolist() == [0, -1, 0, 1]
    assert tidy_masks(torch.stack([a, b]), torch.tensor([-1, -1])) == (None, None)


def test_off_is_a_legal_strength():
    good = embedding()
    assert torch.isinf(dataclasses.replace(good, strengths=good.strengths - torch.inf).strengths).all()
