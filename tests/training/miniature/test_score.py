"""Matching and F1 against trying every assignment."""
from __future__ import annotations

from itertools import permutations

import pytest

pytest.importorskip("scipy", reason="scipy is not installed: pip install -e '.[training]'")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from semantic_diffusion_adapter.training.miniature.scenes import COLOURS, SHAPES, Scene, Thing  # noqa: E402
from semantic_diffusion_adapter.training.miniature.score import (  # noqa: E402
    colour_place,
    colour_position,
    distance,
    f1,
    matches,
    shape_place,
    strict,
)

RULES = (strict, colour_position, colour_place, shape_place)
# Few names and a coarse lattice, so that ties, crossings and near misses come up.
things = st.builds(Thing, st.sampled_from(SHAPES[:2]), st.sampled_from(tuple(COLOURS)[:2]), st.sampled_from(("small", "large")),
                   st.integers(0, 8).map(lambda n: 20.0 + 3.5 * n), st.integers(0, 2).map(lambda n: 40.0 + 3.5 * n))
scenes = st.lists(things, max_size=4).map(lambda found: Scene("white", tuple(found)))


def brute(truth: Scene, found: Scene, same) -> tuple[int, float]:
    """(most pairs that are the same, least total distance of that many)."""
    best, few, many = (0, 0.0), truth.things, found.things
    flipped = len(few) > len(many)
    if flipped:
        few, many = many, few
    for chosen in permutations(range(len(many)), len(few)):
        pairs = [(a, many[j]) for a, j in zip(few, chosen)]
        good = [distance(a, b) for a, b in pairs if (same(b, a) if flipped else same(a, b))]
        best = min(best, (-len(good), sum(good)))
    return -best[0], best[1]


@settings(max_examples=120, deadline=None)
@given(scenes, scenes, st.sampled_from(RULES))
def test_matches_are_the_most_and_then_the_nearest(truth, found, same):
    pairs = matches(truth, found, same)
    assert all(same(a, b) for a, b in pairs)
    assert len({id(a) for a, _ in pairs}) == len({id(b) for _, b in pairs}) == len(pairs)
    count, total = brute(truth, found, same)
    assert len(pairs) == count and sum(distance(a, b) for a, b in pairs) == pytest.approx(total, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(scenes, scenes), min_size=1, max_size=4), st.sampled_from(RULES))
def test_f1_is_twice_the_matched_over_all_things(pairs, same):
    truths, founds = zip(*pairs)
    total = sum(len(s.things) for s in (*truths, *founds))
    expected = 2 * sum(brute(a, b, same)[0] for a, b in pairs) / max(1, total)
    assert f1(truths, founds, same) == pytest.approx(expected)
    assert f1(founds, truths, same) == pytest.approx(expected)


@given(scenes)
@settings(max_examples=40, deadline=None)
def test_a_scene_agrees_with_itself(truth):
    assert all(f1([truth], [truth], same) == (1.0 if truth.things else 0.0) for same in RULES)


def test_the_rules():
    thing = Thing("circle", "red", "small", 60, 60)
    moved = Thing("circle", "red", "small", 60, 66)
    assert strict(thing, moved) and not strict(thing, Thing("circle", "red", "small", 60, 66.1))
    assert not strict(thing, Thing("circle", "red", "large", 60, 60)) and not strict(thing, Thing("square", "red", "small", 60, 60))
    assert colour_position(thing, Thing("square", "red", "large", 60, 66))
    assert not colour_position(thing, Thing("circle", "blue", "small", 60, 60))
    assert colour_place(thing, Thing("square", "red", "large", 80, 80)) and not colour_place(thing, Thing("circle", "red", "small", 20, 60))
    assert shape_place(thing, Thing("circle", "red", "large", 80, 80)) and not shape_place(thing, Thing("square", "red", "small", 60, 60))
