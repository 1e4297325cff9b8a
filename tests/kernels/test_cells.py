"""The text forms of levels and cells, and what they do to an embedding."""

from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels import algebra, regions
from semantic_diffusion_adapter.kernels.cells import parse_cells, parse_levels, strength_cells
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS

INF = float("inf")


def test_the_text_form_of_levels():
    assert parse_levels("all") is parse_levels(" ALL ") is parse_levels("") is None
    assert parse_levels("0") == {0} and parse_levels("1, 2,1") == {1, 2}
    for wrong in ("one", "1;2", "1.5", "1,"):
        with pytest.raises(ValueError, match="are not numbers: write `all`"):
            parse_levels(wrong)


def test_the_text_form_of_strengths():
    assert parse_cells("") == parse_cells(" ; ") == []
    assert parse_cells("1:0,1=0.5; 2:3,3=0;2 = .7 ; *=2;") == [
        (1, (0, 1), 0.5), (2, (3, 3), 0.0), (2, None, 0.7), (None, None, 2.0),
    ]  # fmt: skip
    for wrong in ("1:0=1", "1:0,1", "a=1", "1=2.5", "1=-1", "1=nan", "*:0,0=1", "1=1,2=1"):
        with pytest.raises(ValueError, match="is not understood") as caught:
            parse_cells(wrong)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_cells_are_dialled_one_by_one():
    e = from_hierarchy(torch.randn(1, 64, 6), PRESETS["tree64"])
    made = strength_cells(e, "1:0,1=0.5; 2:3,0=0; 0=2; *=0.5")
    factors = made.strengths.exp()
    top_right = (e.boxes == torch.tensor([0.5, 0.0, 1.0, 0.5])).all(-1)
    bottom_left = (e.boxes == torch.tensor([0.0, 0.75, 0.25, 1.0])).all(-1)
    assert torch.allclose(factors[:16], torch.ones(16)) and top_right.sum() == 4 and bottom_left.sum() == 2
    assert torch.allclose(factors[top_right], torch.tensor(0.25)) and (factors[bottom_left] == 0).all()
    others = (e.levels > 0) & ~top_right & ~bottom_left
    assert torch.allclose(factors[others], torch.tensor(0.5))
    assert strength_cells(e, "") is e
    for text, message in (("1:2,0=1", "no cell 2,0: it has 2 rows and 2 columns"), ("7:0,0=1", "no level 7"), ("7=1", "no level 7")):
        with pytest.raises(ValueError, match=message):
            strength_cells(e, text)


def test_cells_of_a_free_layout_are_those_that_are_there():
    made = algebra.compose([
        regions.region_tokens(torch.randn(1, 2, 6), (0.0, 0.0, 0.3, 0.3)),
        regions.region_tokens(torch.randn(1, 3, 6), (0.6, 0.5, 0.9, 0.8)),
    ])  # fmt: skip
    assert strength_cells(made, "2:1,1=0").strengths.tolist() == [0, 0, -INF, -INF, -INF]
    with pytest.raises(ValueError, match="no cell 0,1: it has 2 rows and 2 columns"):
        strength_cells(made, "2:0,1=0")
