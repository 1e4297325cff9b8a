"""The algebra of embeddings against its definitions, on random embeddings."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels import algebra
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy


def embedding(seed=0, name="tree64", batch=1, width=6, adapter="one"):
    generator = torch.Generator().manual_seed(seed)
    grids = hierarchy(name)
    return from_hierarchy(
        torch.randn(batch, grids.token_count, width, generator=generator),
        grids,
        torch.randn(batch, 3, generator=generator),
        {"adapter": adapter, "pooled_width": 3},
    )


@given(st.floats(0, 1), st.sampled_from(["lerp", "slerp"]), st.sampled_from([None, {0}, {1, 2}]))
@settings(deadline=None, max_examples=30)
def test_blend_moves_the_named_levels_only(t, mode, levels):
    a, b = embedding(1), embedding(2)
    mixed = algebra.blend(a, b, t, mode, levels)
    moved = torch.ones(64, dtype=torch.bool) if levels is None else torch.isin(a.levels, torch.tensor(sorted(levels)))
    assert torch.equal(mixed.tokens[:, ~moved], a.tokens[:, ~moved])
    if mode == "lerp":
        assert torch.allclose(mixed.tokens[:, moved], ((1 - t) * a.tokens + t * b.tokens)[:, moved], atol=1e-6)
    else:
        expected = (1 - t) * a.tokens.norm(dim=-1) + t * b.tokens.norm(dim=-1)
        assert torch.allclose(mixed.tokens.norm(dim=-1)[:, moved], expected[:, moved], rtol=1e-4)
    expected = a if levels == {1, 2} or t == 0 else algebra.blend(a, b, t, mode)
    assert torch.equal(mixed.pooled, expected.pooled)
    assert not 0.01 < t or levels == {1, 2} or not torch.equal(mixed.pooled, a.pooled)


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_blend_ends_are_exact(mode):
    a, b = embedding(1), embedding(2)
    assert torch.equal(algebra.blend(a, b, 0.0, mode).tokens, a.tokens)
    assert torch.equal(algebra.blend(a, b, 1.0, mode).tokens, b.tokens)


def test_slerp_halves_the_angle():
    a, b = embedding(1), embedding(2)
    middle = algebra.blend(a, b, 0.5, "slerp").tokens
    cosine = torch.nn.functional.cosine_similarity
    assert torch.allclose(cosine(middle, a.tokens, dim=-1), cosine(middle, b.tokens, dim=-1), atol=1e-5)
    angle = torch.acos(cosine(a.tokens, b.tokens, dim=-1))
    assert torch.allclose(torch.acos(cosine(middle, a.tokens, dim=-1)), angle / 2, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0, 3.0])
def test_slerp_of_vectors_without_an_arc_stays_finite(scale):
    a = embedding(1)
    b = dataclasses.replace(a, tokens=a.tokens * scale)
    mixed = algebra.blend(a, b, 0.3, "slerp").tokens
    assert torch.allclose(mixed, torch.lerp(a.tokens, b.tokens, 0.3), atol=1e-4)


def test_blend_strengths_as_factors():
    a = embedding(1)
    off = algebra.with_strength(a, 0.0)
    assert torch.allclose(algebra.blend(a, off, 0.25).strengths.exp(), torch.full((64,), 0.75))
    assert torch.equal(algebra.blend(off, off, 0.4).strengths, off.strengths)
    assert torch.equal(algebra.blend(a, off, 1.0).strengths, off.strengths)


def test_blend_takes_one_image_for_all():
    many, one = embedding(1, batch=3), embedding(2)
    assert torch.allclose(algebra.blend(many, one, 0.5).tokens, (many.tokens + one.tokens) / 2, atol=1e-6)
    assert algebra.blend(one, many, 0.5, levels={1}).pooled.shape == (3, 3)


def test_strength_factors_multiply():
    e = embedding()
    twice = algebra.with_strength(algebra.with_strength(e, 0.5), 0.5, levels={0})
    assert torch.allclose(twice.strengths[:16].exp(), torch.tensor(0.25))
    assert torch.allclose(twice.strengths[16:].exp(), torch.tensor(0.5))
    cell = e.boxes[16:17]
    off = algebra.with_strength(e, 0.0, boxes=cell)
    assert (off.strengths == -math.inf).nonzero().flatten().tolist() == [16, 17, 18, 19]
    assert torch.equal(algebra.with_strength(off, 2.0).strengths[16:20], off.strengths[16:20])
    for factor in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength factor"):
            algebra.with_strength(e, factor)


def test_compose_joins_tokens_in_order():
    a, b = embedding(1, "global16", batch=2), embedding(2, "tree64", adapter="two")
    joined = algebra.compose([a, b])
    assert torch.equal(joined.tokens[:, :16], a.tokens) and torch.equal(joined.tokens[1, 16:], b.tokens[0])
    assert torch.equal(joined.boxes, torch.cat([a.boxes, b.boxes])) and torch.equal(joined.pooled, a.pooled)
    assert "adapter" not in joined.source and joined.source["pooled_width"] == 3
    with pytest.raises(ValueError, match="nothing to compose"):
        algebra.compose([])
    with pytest.raises(ValueError, match="width 6 and 4"):
        algebra.compose([a, embedding(width=4)])
    with pytest.raises(ValueError, match="2 and 3 images"):
        algebra.compose([a, embedding(batch=3)])


def confined(e, *masks):
    """The first tokens of `e` in the first of the masks, the next in the next, in blocks of 16; the others free."""
    rows = torch.full((e.token_count,), -1)
    for row in range(len(masks)):
        rows[16 * row : 16 * row + 16] = row
    return dataclasses.replace(e, masks=torch.stack(masks), masked_by=rows)


MASKS = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))


def test_masks_follow_their_tokens():
    e = confined(embedding(), *MASKS)
    kept = algebra.select(e, e.levels != 1)
    assert torch.equal(kept.masks, MASKS[[0, 2]]) and kept.masked_by.tolist() == [0] * 16 + [1] * 16 + [-1] * 16
    assert algebra.select(e, e.masked_by < 0).masks is None
    for same in (algebra.with_strength(e, 0.5), algebra.blend(e, e, 0.3), algebra.restrict(e, e, torch.ones(2, 2))):
        assert torch.equal(same.masks, e.masks) and torch.equal(same.masked_by, e.masked_by)


def test_compose_keeps_every_mask_once():
    a, b, free = confined(embedding(1), MASKS[0], MASKS[1]), confined(embedding(2), MASKS[1], MASKS[2]), embedding(3, "global16")
    joined = algebra.compose([free, a, b, a])
    assert torch.equal(joined.masks, MASKS)
    assert joined.masked_by.tolist() == [-1] * 16 + ([0] * 16 + [1] * 16 + [-1] * 32) + ([1] * 16 + [2] * 16 + [-1] * 32) + (
        [0] * 16 + [1] * 16 + [-1] * 32
    )
    assert algebra.compose([free, embedding(1)]).masks is None


def test_only_equal_masks_are_combined_token_by_token():
    a, b = confined(embedding(1), MASKS[0], MASKS[1]), embedding(2)
    reordered = dataclasses.replace(confined(b, MASKS[1], MASKS[0]), masked_by=torch.tensor([1] * 16 + [0] * 16 + [-1] * 32))
    assert torch.equal(algebra.blend(a, reordered, 0.5).masks, a.masks), "the order of the rows says nothing"
    for other in (b, confined(b, MASKS[1], MASKS[0]), confined(b, MASKS[0])):
        for function in (lambda x, y: algebra.blend(x, y, 0.5), lambda x, y: algebra.restrict(x, y, torch.ones(2, 2))):
            for pair in ((a, other), (other, a)):
                with pytest.raises(ValueError, match="confined to different regions") as caught:
                    function(*pair)
                assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_restrict_to_a_quadrant_swaps_exactly_its_tokens():
    source, edited = embedding(1), embedding(2)
    mask = torch.zeros(7, 10)
    mask[:, :5] = 1  # the left half, on a grid that the cells do not know
    mask[4:] = 0
    mask[3, :5] = 0.5  # row 3 spans the middle: cells on either side of it are reached by half
    out = algebra.restrict(edited, source, mask, levels={1, 2})
    assert torch.equal(out.tokens[:, :16], source.tokens[:, :16])
    lower_or_right = (source.boxes[:, 1] >= 0.5) & (source.boxes[:, 0] >= 0.5) & (source.levels > 0)
    assert torch.equal(out.tokens[:, lower_or_right], source.tokens[:, lower_or_right])
    inside = (source.boxes[:, 3] <= 0.25) & (source.boxes[:, 2] <= 0.5)
    assert inside.sum() == 4 and torch.equal(out.tokens[:, inside], edited.tokens[:, inside])
    below = (source.boxes[:, 1] == 0.5) & (source.boxes[:, 2] <= 0.5) & (source.levels == 2)
    assert below.any() and torch.allclose(out.tokens[:, below], torch.lerp(source.tokens, edited.tokens, 0.5)[:, below])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_restrict_weight_is_the_greatest_value_of_the_mask_in_the_box(height, width, seed):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    source, edited = embedding(1), embedding(2)
    fine = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)  # 4 divides every cell edge of the finest grid
    out = algebra.restrict(edited, source, mask).tokens
    for token in (0, 17, 40, 63):
        x0, y0, x1, y1 = source.boxes[token].tolist()
        share = fine[round(y0 * 4 * height) : round(y1 * 4 * height), round(x0 * 4 * width) : round(x1 * 4 * width)].max()
        assert torch.allclose(out[:, token], torch.lerp(source.tokens, edited.tokens, share)[:, token], atol=1e-4)


def test_restrict_reaches_what_a_token_is_seen_through():
    left, right = torch.zeros(256, 256), torch.zeros(256, 256)
    left[:, :128], right[:, 128:] = 1, 1
    source, edited = confined(embedding(1), left, right), confined(embedding(2), left, right)
    out = algebra.restrict(edited, source, left).tokens
    assert torch.equal(out[:, :16], edited.tokens[:, :16]), "tokens of the whole image, seen at the left"
    seen_right = source.masked_by == 1
    assert torch.equal(out[:, seen_right], source.tokens[:, seen_right])


def test_what_is_said_of_the_source_grows_by_no_more_than_the_edits():
    e, lengths = embedding(), []
    for turn in range(6):
        edited = dataclasses.replace(e, source={**e.source, "edits": [f"edit {turn}"]})
        e = algebra.blend(e, algebra.restrict(edited, e, torch.ones(2, 2)), 0.5)
        lengths.append(len(json.dumps(e.source)))
    assert len({after - before for before, after in zip(lengths, lengths[1:])}) == 1
    assert all(f"edit {turn}" in json.dumps(e.source) for turn in range(6)) and e.source["adapter"] == "one"


def test_unlike_embeddings_are_refused_with_the_remedy():
    a = embedding(1)
    for other, message in (
        (embedding(2, "tree112"), "same preset"),
        (embedding(2, width=4), "same model"),
        (embedding(2, adapter="two"), "one and two.*same adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            algebra.blend(a, other, 0.5)
        with pytest.raises(ValueError, match=message):
            algebra.restrict(other, a, torch.ones(2, 2))
    with pytest.raises(ValueError, match="no blend mode"):
        algebra.blend(a, a, 0.5, "cubic")
    with pytest.raises(ValueError, match="finite"):
        algebra.blend(a, a, math.nan)
    with pytest.raises(ValueError, match="mask"):
        algebra.restrict(a, a, torch.full((2, 2), 2.0))


def test_a_schedule_narrows_and_goes_along():
    e = embedding()
    assert algebra.during(e, 0, 1) is e
    late = algebra.during(e, 0.25, 0.75)
    assert torch.equal(late.schedule, torch.tensor([[0.25, 0.75]]).expand(64, 2))
    assert torch.equal(algebra.during(late, 0.5, 1.0).schedule[0], torch.tensor([0.5, 0.75]))
    never = algebra.during(late, 0.0, 0.1).schedule[0]
    assert never[0] == never[1], "two parts that share nothing leave none"
    both = algebra.compose([e, late])
    assert torch.equal(both.schedule[:64], torch.tensor([[0.0, 1.0]]).expand(64, 2)) and torch.equal(both.schedule[64:], late.schedule)
    assert algebra.compose([e, e]).schedule is None
    assert torch.equal(algebra.select(both, torch.arange(128) >= 64).schedule, late.schedule)
    for start, end in ((0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="schedule goes from a start to an end"):
            algebra.during(e, start, end)


def test_the_balance_goes_from_the_coarsest_to_the_finest():
    e = embedding()

    def factors(balance: float) -> list[float]:
        strengths = algebra.with_balance(e, balance).strengths.exp()
        return [round(float(strengths[e.levels == level].unique()), 6) for level in range(3)]

    assert algebra.with_balance(e, 0.0) is e
    assert factors(-1) == [1, 0.5, 0] and factors(1) == [0, 0.5, 1] and factors(0.5) == [0.5, 0.75, 1]
    words = algebra.select(e, e.levels == 2)
    assert algebra.with_balance(words, -1.0) is words, "one level has nothing to be held against"
    for wrong in (1.5, math.nan):
        with pytest.raises(ValueError, match="from -1 to 1"):
            algebra.with_balance(e, wrong)
