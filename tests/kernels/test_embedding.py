"""The embedding type refuses whatever would paint nonsense later, and knows its own hierarchy."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from semantic_diffusion_adapter.kernels.embedding import SemanticEmbedding, from_hierarchy
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
        (lambda e: {"pooled": e.pooled[:1]}, "pooled"),
        (lambda e: {"pooled": e.pooled * torch.nan}, "pooled"),
    ],
)
def test_refusals(change, message):
    good = embedding()
    with pytest.raises(ValueError, match=message) as caught:
        dataclasses.replace(good, **change(good))
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_off_is_a_legal_strength():
    good = embedding()
    assert torch.isinf(dataclasses.replace(good, strengths=good.strengths - torch.inf).strengths).all()
