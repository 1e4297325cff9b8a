from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS, Hierarchy, Level, hierarchy

levels = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)),
    min_size=1,
    max_size=4,
    unique_by=lambda x: x[:2],
)


@pytest.mark.parametrize(
    "name, tokens",
    [("global16", 16), ("global32", 32), ("quad64", 64), ("tree64", 64), ("tree112", 112), ("tree128", 128)],
)
def test_presets_have_the_tokens_of_the_design(name, tokens):
    assert hierarchy(name).token_count == tokens == len(hierarchy(name).boxes())
    assert Hierarchy.from_json(hierarchy(name).to_json()) == hierarchy(name)
    assert set(PRESETS) == {"global16", "global32", "quad64", "tree64", "tree112", "tree128"}


def test_order_is_level_then_cell_by_rows_then_slot():
    made = hierarchy([[1, 1, 2], [2, 3, 2]])
    assert made.level_ids().tolist() == [0] * 2 + [1] * 12
    assert made.cells().tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert made.slots().tolist() == [0, 1] * 7
    assert made.boxes()[0].tolist() == [0, 0, 1, 1]
    # Cell 4 of the second level: second row, second column.
    assert torch.allclose(made.boxes()[10], torch.tensor([1 / 3, 1 / 2, 2 / 3, 1]))


@given(levels)
@settings(max_examples=50, deadline=None)
def test_every_level_covers_the_image_once_per_slot(made):
    made = hierarchy(made)
    x0, y0, x1, y1 = made.boxes().double().unbind(-1)
    area = torch.zeros(len(made.levels), dtype=torch.float64).index_add_(0, made.level_ids(), (x1 - x0) * (y1 - y0))
    assert torch.allclose(area, torch.tensor([level.tokens for level in made.levels], dtype=torch.float64), atol=1e-5)
    assert Hierarchy.from_json(made.to_json()) == made


@given(levels, st.data())
@settings(max_examples=50, deadline=None)
def test_index_in_finds_the_same_box_and_slot(table, data):
    table = hierarchy(table)
    kept = data.draw(st.lists(st.sampled_from(table.levels), min_size=1, unique=True))
    part = Hierarchy(tuple(Level(x.rows, x.cols, data.draw(st.integers(1, x.tokens))) for x in kept))
    index = part.index_in(table)
    assert len(index.unique()) == part.token_count
    assert torch.equal(table.boxes()[index], part.boxes())
    assert torch.equal(table.cells()[index], part.cells())
    assert torch.equal(table.slots()[index], part.slots())


@pytest.mark.parametrize("name", ["global16", "global32", "quad64", "tree64", "tree112", "tree128"])
def test_one_table_holds_every_preset(name):
    assert len(hierarchy(name).index_in(hierarchy("tree128")).unique()) == hierarchy(name).token_count


@pytest.mark.parametrize(
    "levels, words",
    [
        ("tree129", "did you mean 'tree128'"),
        ("forest", "choose one of global16"),
        ([], "at least one level"),
        ([[1, 1]], r"\[rows, columns, tokens per cell\]"),
        ([[1, 0, 4]], "cols"),
        ([[1, 1, 2.5]], "tokens"),
        ([[2, 2, 4], [2, 2, 1]], "two levels of 2x2"),
        ([[10**9, 1, 1]], "rows must be at most 1024"),
        ([[1, 1, 10**9]], "tokens must be at most 65536"),
        ([[1000, 1000, 1]], "1 levels and 1000000 tokens, where 64 and 65536 are the most"),
        ([[1, 1 + i, 1] for i in range(65)], "65 levels"),
    ],
)
def test_wrong_hierarchies_are_refused_in_one_sentence(levels, words):
    with pytest.raises(ValueError, match=words):
        hierarchy(levels)


@pytest.mark.parametrize("levels", [[[1, 1, 33]], [[3, 3, 1]]])
def test_a_hierarchy_outside_the_table_is_refused(levels):
    with pytest.raises(ValueError, match="not in the query table"):
        hierarchy(levels).index_in(hierarchy("tree128"))
