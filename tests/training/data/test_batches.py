"""The plan of batches: exact epochs, one bucket to a batch, nothing but (seed, stage, step) decides."""
from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

for package in ("fsspec", "pyarrow"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.data.batches import PERIOD, Plan  # noqa: E402
from semantic_diffusion_adapter.training.data.index import Index  # noqa: E402

from .conftest import table_of  # noqa: E402

SHAPES = ((600, 600), (600, 900), (900, 600), (800, 800), (1100, 1100), (400, 900))
sets = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=60)


def plan_of(sizes, batch, seed=0, resolutions=(512,), known=(512, 768, 1024)):
    return Plan(Index("memory://set", table_of(sizes, known)), batch, seed, resolutions)


@settings(max_examples=60, deadline=None)
@given(sets, st.integers(1, 8), st.integers(0, 2 ** 40), st.sampled_from((512, 768)), st.integers(0, 3))
def test_an_epoch_is_an_exact_permutation(sizes, batch, seed, resolution, epoch):
    try:
        plan = plan_of(sizes, batch, seed, (resolution,))
    except ValueError:
        bucket = Counter(tuple(b) for b in Index("x", table_of(sizes, (resolution,))).buckets(resolution).tolist() if b[0])
        assert max(bucket.values(), default=0) < batch
        return
    buckets = plan.index.buckets(resolution)
    count, seen, drawn = plan.batches(resolution), [], Counter()
    for step in range(epoch * count, (epoch + 1) * count):
        at, bucket, rows = plan.at("a", step)
        assert at == resolution and len(rows) == batch
        assert all(tuple(buckets[row]) == bucket for row in rows)
        for size in (s for s in range(1, batch + 1) if batch % s == 0):  # the shares of ranks, of any world
            shares = [rows[r * batch // size:(r + 1) * batch // size] for r in range(size)]
            assert sum(shares, []) == rows and {len(s) for s in shares} == {batch // size}
        drawn[bucket] += batch
        seen += rows
    assert len(set(seen)) == len(seen)
    for bucket, rows in plan.groups[resolution].items():
        assert drawn[bucket] == len(rows) // batch * batch
    if batch == 1:
        assert sorted(seen) == [i for i, s in enumerate(sizes) if min(s) >= resolution]


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(0, 300, 7)), st.integers(0, 9))
def test_a_step_is_a_pure_function(steps, seed):
    sizes, shares = SHAPES * 9, {"a": {512: 1, 768: 2}, "": {1024: 1}}
    plan, other = (plan_of(sizes, 3, seed, shares) for _ in range(2))
    asked = {step: plan.at("a", step) for step in steps}
    assert all(other.at("a", step) == asked[step] for step in sorted(steps))
    elsewhere = plan_of(sizes, 3, seed + 10, shares)
    assert [plan.at("a", s) for s in range(9)] != [elsewhere.at("a", s) for s in range(9)]
    assert [plan.at("b", s) for s in range(9)] != [plan.at("c", s) for s in range(9)]


def test_the_sequence_is_the_one_that_runs_have_started_with():
    """Changes here would end every run's resume: raise the number in Plan.hash with it."""
    plan = plan_of(SHAPES * 5, 4, 7, {"": {512: 3, 768: 1}})
    assert [plan.at("adapter", s) for s in (0, 1, 250)] == GOLDEN


@pytest.mark.parametrize("shares", ({512: 1, 1024: 3}, {512: 1, 768: 1, 1024: 1}, {512: 0.999, 1024: 0.001}))
def test_resolutions_take_their_shares_and_each_its_own_epochs(shares):
    plan = plan_of([(1100, 1100)] * 12, 3, 1, {"late": shares})
    taken, rows = Counter(), {r: [] for r in shares}
    for step in range(2 * PERIOD):
        resolution, _, batch = plan.at("late", step)
        taken[resolution] += 1
        rows[resolution] += batch
    for resolution, weight in shares.items():
        wanted = max(1, weight / sum(shares.values()) * PERIOD)
        assert abs(taken[resolution] - 2 * wanted) <= 2 and taken[resolution] % 2 == 0
        full = len(rows[resolution]) // 12 * 12
        assert Counter(rows[resolution][:full]) == Counter([*range(12)] * (full // 12))


def test_a_plan_is_known_by_all_that_decides_it():
    hashes = {plan_of(*a).hash for a in (
        (SHAPES * 3, 2), (SHAPES * 3, 3), (SHAPES * 3, 2, 1), (SHAPES * 2, 2), (SHAPES * 3, 2, 0, (768,)),
        (SHAPES * 3, 2, 0, {"a": {512: 1}}), (SHAPES * 3, 2, 0, {"a": {512: 1, 768: 1}}))}
    assert len(hashes) == 7 and plan_of(SHAPES * 3, 2).hash in hashes


def test_spares_come_from_the_same_bucket_and_not_from_the_batch():
    plan = plan_of(SHAPES * 4, 3)
    for step in range(8):
        resolution, bucket, rows = plan.at("a", step)
        spares = [plan.spare("a", step, 1, attempt) for attempt in range(30)]
        assert set(spares) == set(plan.groups[resolution][bucket].tolist()) - set(rows)


def test_the_report_names_what_is_never_used():
    text = plan_of([(600, 600)] * 9 + [(600, 900)] * 3 + [(400, 400)], 4).report()
    assert "512 px: 12 samples fill it, 1 are smaller, 2 batches an epoch" in text
    assert "never used: 3 samples of the under-filled 416 x 640 (3); a batch of 3 would use them all" in text
    assert text.count("UNDER-FILLED") == 1 and "never used" not in plan_of([(600, 600)] * 9, 4).report()


@pytest.mark.parametrize("arguments, message", [
    (([(600, 600)] * 3, 4), "No bucket at 512 px fills a batch of 4: the fullest has 3 samples; choose a batch of at most 3"),
    (([(600, 600)] * 3, 2, 0, (512, 1024)), "No bucket at 1024 px .* has 0 samples; leave 1024 out"),
    (([(600, 600)], 0), "A batch of 0"),
    (([(600, 600)], 1, 0, {"a": {}}), "Stage 'a' is given no resolution"),
])
def test_a_plan_that_cannot_be_says_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_of(*arguments)
    with pytest.raises(ValueError, match="no stage 'b', only a"):
        plan_of([(600, 600)], 1, 0, {"a": {512: 1}}).at("b", 0)


GOLDEN = [(512, (512, 512), [9, 22, 21, 6]), (512, (512, 512), [16, 15, 24, 12]), (512, (512, 512), [21, 28, 16, 18])]
