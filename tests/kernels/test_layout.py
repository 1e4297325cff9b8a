"""The layout's fixed point: boxes, strengths and masks as integers and back."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels import algebra, layout, regions
from semantic_diffusion_adapter.kernels.embedding import SemanticEmbedding, from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS, hierarchy
from semantic_diffusion_adapter.kernels.visibility import region_bias

UNIT = st.floats(0, 1, width=32)


def embedding() -> SemanticEmbedding:
    return from_hierarchy(torch.randn(1, 64, 24), PRESETS["tree64"])


@given(
    st.lists(st.tuples(UNIT, UNIT, UNIT, UNIT, st.integers(0, 9), st.floats(-100, 100) | st.just(-torch.inf)), min_size=1)
)
@settings(deadline=None, max_examples=50)
def test_layout_round_trip(rows):
    rows = [row for row in rows if row[0] < row[2] and row[1] < row[3]] or [(0.0, 0.0, 1.0, 1.0, 0, 0.0)]
    table = torch.tensor(rows, dtype=torch.float64)
    e = SemanticEmbedding(
        torch.zeros(1, len(rows), 1), table[:, :4].float(), table[:, 4].long(), table[:, 5].float()
    )
    encoded, nothing = layout.encode(e)
    assert nothing is None and encoded.dtype == torch.int32 and encoded.shape == (1, len(rows), 9)
    boxes, strengths, *nothing = layout.decode(encoded)
    assert nothing == [None, None] and (encoded[..., 6] == -1).all()
    assert (boxes - e.boxes).abs().max() <= 0.5 / 65536 + 1e-7
    assert torch.equal(strengths.isinf(), e.strengths.isinf())
    assert torch.allclose(strengths, e.strengths, atol=1e-5, rtol=1e-6)
    assert torch.equal(encoded[0, :, 4], e.levels.int())


def test_layout_of_a_batch_is_shared_where_it_is_one():
    e = embedding()
    one, _ = layout.encode(e)
    assert layout.decode(one.repeat(3, 1, 1))[0].shape == (64, 4)
    other, _ = layout.encode(algebra.with_strength(e, 0.0, levels={2}))
    boxes, strengths, _, _ = layout.decode(torch.cat([one, other]))
    assert boxes.shape == (2, 64, 4) and strengths.shape == (2, 64)
    assert torch.equal(strengths[0], e.strengths) and torch.isinf(strengths[1, 32:]).all()


def confined(e, *masks):
    """Tokens in turn in each of the masks and in none."""
    return dataclasses.replace(e, masks=torch.stack(masks), masked_by=torch.arange(e.token_count) % (len(masks) + 1) - 1)


def test_masks_round_trip_as_bytes():
    e = confined(embedding(), *torch.rand(2, 256, 256))
    encoded, masks = layout.encode(e)
    assert masks.dtype == torch.uint8 and masks.shape == (1, 2, 256, 256)
    for dtype in (torch.uint8, torch.bfloat16, torch.float16):  # as core hands them on
        _, _, back, rows = layout.decode(encoded, masks.to(dtype))
        assert (back - e.masks).abs().max() <= 0.5 / 255 + 1e-6 and torch.equal(rows, e.masked_by)
    ends = layout.decode(*layout.encode(confined(e, torch.ones(256, 256), torch.zeros(256, 256))))[2]
    assert torch.equal(ends[0], torch.ones(256, 256)) and torch.equal(ends[1], torch.zeros(256, 256))


def test_a_schedule_takes_tokens_away_outside_of_it():
    early, always = algebra.during(embedding(), 0.25, 0.5), algebra.with_strength(embedding(), 0.5)
    encoded, _ = layout.encode(algebra.compose([early, always]))
    context, asked = torch.randn(2, 128 + 5, 3), []

    def within(moment):
        return lambda start, end: asked.append((start, end)) or start <= moment < end

    for moment, there in ((0.1, False), (0.25, True), (0.4, True), (0.5, False)):
        now, text = layout.at_time(encoded.repeat(2, 1, 1), context, within(moment))
        gone = 0 if there else 64
        assert torch.equal(now[0], encoded[0, gone:]) and torch.equal(text, context[:, gone:])
    assert asked == [(0.0, 1.0), (0.25, 0.5)] * 4, "each part is asked for once"
    joined, _ = layout.join(layout.encode(embedding()), (encoded, None))
    assert torch.equal(joined[:, 64:], encoded) and (joined[:, :64, 7] == 0).all() and (joined[:, :64, 8] == 65536).all()

    # Of two rows with parts of their own, what either has stays, and is off in the other.
    late, _ = layout.encode(algebra.compose([algebra.during(embedding(), 0.5, 1.0), always]))
    now, text = layout.at_time(torch.cat([encoded, late]), context, within(0.3))
    strengths = layout.decode(now)[1]
    assert now.shape[1] == 128 and text is not None and text.shape == context.shape
    assert torch.isfinite(strengths[0]).all() and (strengths[1, :64] == -torch.inf).all() and torch.isfinite(strengths[1, 64:]).all()

    # Some text is left, if only one token that is off.
    alone, _ = layout.encode(early)
    now, text = layout.at_time(alone, context[:1, :64], within(0.9))
    assert text.shape[1] == 1 and layout.decode(now)[1].tolist() == [-torch.inf]
    now, text = layout.at_time(alone, context[:1, :69], within(0.9))
    assert text.shape[1] == 5 and now.shape[1] == 0


def test_masks_of_a_batch_are_shared_where_they_are_one():
    encoded, masks = layout.encode(confined(embedding(), torch.rand(256, 256)))
    boxes, _, shared, rows = layout.decode(encoded.repeat(2, 1, 1), masks.repeat(2, 1, 1, 1))
    assert boxes.shape == (64, 4) and shared.shape == (1, 256, 256) and rows.shape == (64,)
    boxes, strengths, own, rows = layout.decode(encoded.repeat(2, 1, 1), torch.cat([masks, 255 - masks]))
    assert boxes.shape == (2, 64, 4) and strengths.shape == rows.shape == (2, 64) and own.shape == (2, 1, 256, 256)
    assert torch.equal(own[0], shared)


@given(st.integers(0, 6), st.integers(0, 6), st.booleans(), st.booleans(), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_rows_of_several_conditionings_are_each_what_they_were(one, other, boxed, masked, rows):
    """As the attention sees them: every query of a side has the bias of that side alone; what was added before it is off."""
    sides, alone = [], []
    for length, own in ((one, boxed), (other, True)):
        tokens = 4 if own else 0
        context = torch.randn(rows, tokens + length + 1, 3)
        e = from_hierarchy(torch.zeros(1, 4, 3), hierarchy([[2, 2, 1]])) if own else None
        if own and masked:
            e = regions.confine(e, torch.linspace(0, 1, 256).expand(256, 256).contiguous())
        table, masks = layout.encode(e) if own else (None, None)
        sides.append((context, table, masks))
        alone.append(e)
    context, table, masks = layout.together(sides)
    length = max(side[0].shape[1] for side in sides)
    assert context.shape == (2 * rows, length, 3)
    parts = layout.decode(table, masks)
    bias = region_bias(parts[0], parts[1], (4, 4), length, masks=parts[2], masked_by=parts[3])
    bias = bias if bias.dim() == 3 else bias.expand(2 * rows, -1, -1)
    for place, ((own, *_), e) in enumerate(zip(sides, alone)):
        pad = length - own.shape[1]
        for row in range(place * rows, (place + 1) * rows):
            assert torch.equal(context[row, pad:], own[row % rows]) and not context[row, :pad].any()
            assert (bias[row, :, :pad] == -torch.inf).all()
            count = 0 if e is None else e.token_count
            expected = torch.zeros(length - pad + 16, bias.shape[-1] - pad)
            if count:
                expected[:, :count] = region_bias(e.boxes, e.strengths, (4, 4), length - pad, masks=e.masks, masked_by=e.masked_by)
            torch.testing.assert_close(bias[row, pad:, pad:], expected, atol=1e-2, rtol=0)


def test_texts_of_one_length_without_boxes_need_no_layout():
    context, table, masks = layout.together([(torch.zeros(2, 5, 3), None, None), (torch.ones(1, 5, 3), None, None)])
    assert context.shape == (3, 5, 3) and table is None and masks is None
