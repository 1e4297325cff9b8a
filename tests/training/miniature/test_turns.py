"""Shapes, twins, chains and levels: what each figure counts, on scenes made by hand."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.miniature.evaluation import shape, turns  # noqa: E402
from semantic_diffusion_adapter.training.miniature.parser import parse, parse_scored  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import Scene, Thing, render, scene  # noqa: E402

CIRCLE, CROSS = Thing("circle", "red", "large", 40, 40), Thing("cross", "blue", "small", 95, 90)
TWO = Scene("white", (CIRCLE, CROSS))


def test_the_overlap_is_that_of_the_exact_masks():
    assert shape.overlaps(TWO, render(TWO)) == pytest.approx([1, 1], abs=0.01)
    # A circle of 0.9 x 15 px where one of 0.9 x 22 should be: the share of the areas.
    smaller = Scene("white", (replace(CIRCLE, size="small"), CROSS))
    assert shape.overlaps(TWO, render(smaller)) == pytest.approx([(15 / 22) ** 2, 1], abs=0.03)
    assert shape.overlaps(TWO, render(Scene("white", (CROSS,))))[0] == 0
    assert shape.iou([TWO], [render(Scene("white", (CROSS,)))]) == pytest.approx(1, abs=0.01), "a missing thing is F1's"
    assert shape.iou([TWO], [render(Scene("white", ()))]) is None


def test_another_colour_is_another_thing():
    green = Scene("white", (replace(CIRCLE, colour="green"), CROSS))
    assert shape.overlaps(TWO, render(green))[0] < shape.SEEN


def test_a_torn_thing_scores_less_than_a_whole_one():
    picture = render(TWO)
    assert [thing.name for thing, _ in parse_scored(picture)[1]] == [thing.name for thing in parse(picture).things]
    assert min(score for _, score in parse_scored(picture)[1]) > 0.85
    picture[36:44, 20:60] = 244  # a gap through the circle
    assert min(score for _, score in parse_scored(picture)[1]) < 0.8


@pytest.mark.parametrize("kind", turns.KINDS)
def test_every_twin_edit_has_one(kind):
    changes = turns.twin_edits(kind, 12, 3)
    assert len(changes) == 12 and all(turns.shares(change, kind) for change in changes)
    assert {change.operation for change in changes} == {"remove", "recolour", "move", "replace"}


def test_a_chain_leads_from_scene_to_scene():
    for index in range(12):
        chain = turns.chain_of(index, 0)
        assert len(chain) == turns.LENGTH and chain[0].source == scene("test", index)
        assert all(a.target == b.source for a, b in zip(chain, chain[1:])) and all(c.target.things for c in chain)
        assert all(thing in chain[-1].target.things for thing in turns.untouched(chain))
        assert turns.kept([chain], [chain[-1].target]) in (1, None)
    chains = [turns.chain_of(index, 0) for index in range(12)]
    nothing = [Scene("white", ())] * 12
    assert turns.kept(chains, nothing) == 0 and turns.kept(chains, [parse(np.array(render(c[-1].target))) for c in chains]) == 1
