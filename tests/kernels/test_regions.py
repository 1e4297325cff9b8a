"""Regions against brute force: what every patch sees after confining, inserting and moving."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_diffusion_adapter.kernels import algebra, regions
from semantic_diffusion_adapter.kernels.attention import Regions, masked_attention
from semantic_diffusion_adapter.kernels.embedding import MASK_SIDE, from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS, hierarchy
from semantic_diffusion_adapter.kernels.visibility import region_bias

INF = float("inf")
HALF = torch.zeros(MASK_SIDE, MASK_SIDE)
HALF[:, MASK_SIDE // 2 :] = 1
QUARTER = regions.box_mask((0.5, 0.5, 1, 1))


def embedding(seed=0, name="tree64", batch=1, width=6):
    generator = torch.Generator().manual_seed(seed)
    grids = hierarchy(name)
    tokens = torch.randn(batch, grids.token_count, width, generator=generator)
    return from_hierarchy(tokens, grids, torch.randn(batch, 3, generator=generator), {"adapter": "one"})


def soft(seed: int, empty: float = 0.3) -> torch.Tensor:
    """A blocky random mask with empty parts, full parts and soft ones."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.rand(8, 8, generator=generator)
    blocks = torch.where(blocks < empty, 0.0, torch.where(blocks > 0.7, 1.0, blocks))
    return blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)


def bias(e, grid):
    """[P, T]: what the image patches see."""
    made = region_bias(e.boxes, e.strengths, grid, e.token_count, masks=e.masks, masked_by=e.masked_by)
    return made[e.token_count :]


boxes = st.tuples(*[st.integers(0, 999)] * 4).map(
    lambda b: (min(b[0], b[2]) / 1000, min(b[1], b[3]) / 1000, (max(b[0], b[2]) + 1) / 1000, (max(b[1], b[3]) + 1) / 1000)
)


@given(boxes, st.integers(0, 255), st.integers(0, 255))
@settings(deadline=None, max_examples=40)
def test_a_box_covers_its_share_of_every_pixel(box, row, col):
    mask = regions.box_mask(box)
    x0, y0, x1, y1 = (side * 256 for side in box)
    wide = max(0.0, min(x1, col + 1) - max(x0, col))
    high = max(0.0, min(y1, row + 1) - max(y0, row))
    assert mask.dtype == torch.float32 and mask.shape == (256, 256)
    assert mask[row, col].item() == pytest.approx(wide * high, abs=1e-5)
    assert mask.double().mean().item() == pytest.approx((x1 - x0) * (y1 - y0) / 65536, abs=1e-6)


def test_a_region_is_a_box_cut_to_the_picture_or_a_mask_with_its_bounding_box():
    box, mask = regions.region([(0.75, 0.5, 0.5, 0.25)])
    assert box == (0.75, 0.5, 1.0, 0.75) and torch.equal(mask, regions.box_mask(box))
    painted = torch.zeros(1, 8, 16)
    painted[0, 2:4, 4] = 0.5
    box, mask = regions.region([(0.0, 0.0, 0.1, 0.1)], painted)
    assert box == (4 / 16, 2 / 8, 5 / 16, 4 / 8) and mask[80, 70] == 0.5 and mask[0, 0] == 0
    for empty in ([(0.5, 0.5, 0.0, 0.5)], [(1.0, 0.0, 0.5, 0.5)], [(math.nan, 0.0, 0.5, 0.5)], []):
        with pytest.raises(ValueError, match="empty or outside the picture"):
            regions.region(empty)
    with pytest.raises(ValueError, match="mask of the region is empty"):
        regions.region([(0, 0, 1, 1)], torch.zeros(4, 4))


@given(st.lists(boxes, min_size=1, max_size=4))
@settings(deadline=None, max_examples=25)
def test_several_boxes_are_one_region(several):
    corners = [(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in several]
    box, mask = regions.region([*corners, (2.0, 0.0, 1.0, 1.0)])
    edges = torch.tensor(several, dtype=torch.float64)
    assert box == pytest.approx((*edges[:, :2].amin(0).tolist(), *edges[:, 2:].amax(0).tolist()))
    covers = torch.stack([regions.box_mask(each) for each in several])
    assert (mask >= covers.amax(0) - 1e-6).all() and (mask <= covers.sum(0) + 1e-6).all()
    assert torch.equal(mask == 1, (covers == 1).any(0)) and torch.equal(mask == 0, (covers == 0).all(0))


def test_a_feather_softens_inwards():
    softened = regions.feather(HALF, 0.25)
    line = softened[100]
    assert (line[:128] == 0).all() and (line[128 + 32 :] == 1).all()
    assert 0 < line[128] < 0.05 and (line[1:] - line[:-1] >= 0).all(), "a box that the mask only grazes is hardly reached"
    assert torch.equal(regions.feather(HALF, 0.0), HALF)
    assert torch.allclose(regions.feather(HALF * 0.4, 0.3)[:, 200:], torch.tensor(0.4)), "a soft mask is not made softer inside"
    with pytest.raises(ValueError, match="NaN"):
        regions.feather(HALF * torch.nan, 0.1)


@given(st.integers(0, 2**31), st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_confining_multiplies_what_is_seen(first, second):
    """Twice, on the mask's own blocks: every patch sees every token with the product of the masks there, or as before."""
    e, masks = embedding(), (soft(first), soft(second))
    index = torch.arange(e.token_count)
    tagged = dataclasses.replace(e, tokens=index.float().expand(1, 1, -1).mT.contiguous())
    for mask in masks:
        tagged = regions.confine(tagged, mask)
    kept = tagged.tokens[0, :, 0].long()
    seen = bias(e, (8, 8)).exp() * (masks[0] * masks[1])[::32, ::32].reshape(-1, 1)
    assert torch.allclose(bias(tagged, (8, 8)).exp(), seen[:, kept], atol=1e-6)
    gone = ~torch.isin(index, kept)
    assert (seen[:, gone] == 0).all() and (seen[:, kept] > 0).any(0).all()


def test_confining_leaves_alone_what_the_mask_leaves_whole():
    e = embedding()
    assert regions.confine(e, torch.ones(256, 256)) is e
    right = regions.confine(e, HALF)
    inside = right.boxes[:, 0] >= 0.5
    assert (right.masked_by[inside] == -1).all() and (right.masked_by[~inside] == 0).all() and len(right.masks) == 1
    assert right.token_count == 16 + 8 + 16, "the cells of the left half are gone"
    again = regions.confine(right, HALF)
    assert torch.equal(again.masks, right.masks) and torch.equal(again.masked_by, right.masked_by)
    cells = algebra.select(e, e.levels == 2)
    assert regions.confine(cells, HALF).masks is None
    corner = algebra.select(cells, cells.boxes[:, 0] >= 0.5)
    assert regions.confine(corner, HALF) is corner
    with pytest.raises(ValueError, match="No token of the embedding lies in the region"):
        regions.confine(corner, 1 - HALF)
    for wrong in (torch.ones(8, 8), torch.full((256, 256), 1.5), torch.full((256, 256), torch.nan)):
        with pytest.raises(ValueError, match="use fit_mask"):
            regions.confine(e, wrong)


@pytest.mark.parametrize("mode", regions.MODES)
def test_insert_replaces_or_joins_inside_the_region_only(mode):
    base, other = embedding(1), embedding(2)
    made = regions.insert(base, other, HALF, mode)
    count = made.token_count - regions.confine(other, HALF).token_count
    seen = bias(made, (4, 8)) == 0
    right = torch.arange(8).expand(4, 8).flatten() >= 4
    assert not seen[~right, count:].any() and seen[right, count:].any(1).all()
    assert torch.equal(seen[~right].sum(1), torch.full((16,), 16 + 4 + 2))
    if mode == "replace":
        assert not seen[right, :count].any() and len(made.masks) == 2
    else:
        assert count == 64 and torch.equal(seen[:, :64], bias(base, (4, 8)) == 0)
    assert torch.equal(made.pooled, base.pooled)


def test_insert_without_a_base_or_over_all_of_it():
    base, other = embedding(1), embedding(2)
    alone = regions.insert(None, other, HALF, "replace")
    assert torch.equal(alone.tokens, regions.confine(other, HALF).tokens)
    assert regions.insert(base, other, torch.ones(256, 256), "replace") is other
    assert regions.insert(base, other, torch.ones(256, 256), "join").token_count == 128
    with pytest.raises(ValueError, match="no insert mode 'over'"):
        regions.insert(base, other, HALF, "over")


@pytest.mark.parametrize("mode", regions.MODES)
def test_before_and_after_its_time_a_region_is_not_there(mode):
    base, other = embedding(1), embedding(2)
    made = regions.insert(base, other, soft(3), mode, 0.25, 0.5)
    for moment, there in ((0.0, False), (0.25, True), (0.49, True), (0.5, False), (0.9, False)):
        due = (made.schedule[:, 0] <= moment) & (moment < made.schedule[:, 1])
        now = algebra.select(made, due)
        expected = regions.insert(base, other, soft(3), mode) if there else base
        # Of every token of the two pictures, how much each patch sees: the base is in several parts.
        for tokens in (base.tokens, other.tokens):
            which = [(part.tokens[0, :, None] == tokens[0, None]).all(-1).float() for part in (now, expected)]
            seen = [bias(part, (8, 8)).exp() @ same for part, same in zip((now, expected), which)]
            torch.testing.assert_close(*seen, atol=1e-5, rtol=0)
    assert regions.insert(base, other, HALF, mode).schedule is None
    never = regions.insert(base, other, HALF, mode, 0.3, 0.3)
    begins, ends = never.schedule[(never.tokens[0, :, None] == other.tokens[0, None]).all(-1).any(1)].unbind(-1)
    assert len(begins) and torch.equal(begins, ends)


def test_regions_chain_without_limit():
    made = embedding(0)
    for index in range(6):
        made = regions.insert(made, embedding(index + 1, "global16"), regions.box_mask((index / 8, 0.2, index / 8 + 0.3, 0.6)))
    seen = bias(made, (16, 16)).exp()
    assert torch.isfinite(seen).all() and (seen.sum(1) > 0).all() and len(made.masks) <= 12


@given(st.integers(0, 2**31), st.sampled_from([(0.5, 0.0, 1.0, 1.0), (0.0, 0.25, 0.5, 0.5), (0.25, 0.5, 0.5, 1.0)]))
@settings(deadline=None, max_examples=10)
def test_moving_moves_what_is_seen(seed, box):
    """The patches in the box see exactly what the whole image's patches saw, those outside nothing."""
    e = regions.confine(embedding(), soft(seed, empty=0.1))
    moved = regions.move_into(e, box)
    assert torch.equal(moved.tokens, e.tokens) and torch.equal(moved.levels, e.levels)
    rows, cols = round(8 / (box[3] - box[1])), round(8 / (box[2] - box[0]))
    seen = bias(moved, (rows, cols)).unflatten(0, (rows, cols))
    y, x = round(box[1] * rows), round(box[0] * cols)
    assert torch.allclose(seen[y : y + 8, x : x + 8].exp(), bias(e, (8, 8)).unflatten(0, (8, 8)).exp(), atol=1e-5)
    assert (seen.exp().sum() - seen[y : y + 8, x : x + 8].exp().sum()).abs() < 1e-3
    assert regions.move_into(e, (0, 0, 1, 1)).masks.allclose(e.masks, atol=1e-6)


def test_a_moved_mask_does_not_end_at_the_box_a_second_time():
    """The box's edge lies within a pixel: only the region's own mask may be soft there."""
    e = regions.confine(embedding(), HALF)
    moved = regions.move_into(e, (0.1, 0.1, 0.7, 0.7))
    assert (moved.masks[0, :, 104:] == 1).all()
    with pytest.raises(ValueError, match="empty or outside"):
        regions.move_into(e, (0.5, 0.5, 1.5, 1.0))


def test_text_owns_its_box_at_the_level_of_its_size():
    tokens, pooled = torch.randn(2, 5, 6), torch.randn(2, 3)
    for box, level in (
        ((0, 0, 1, 1), 0), ((0.2, 0, 0.7, 1), 0), ((0.5, 0.5, 1, 1), 1), ((0.25, 0, 0.5, 0.5), 1), ((0, 0, 0.25, 0.25), 2),
    ):  # fmt: skip
        made = regions.region_tokens(tokens, box, pooled, {"prompt": "a dog"})
        assert made.levels.tolist() == [level] * 5 and torch.allclose(made.boxes, torch.tensor(box).float().expand(5, 4))
        assert torch.equal(made.tokens, tokens) and torch.equal(made.pooled, pooled) and made.source == {"prompt": "a dog"}


@given(
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8)), min_size=1, max_size=2, unique_by=lambda x: x[:2]),
)
@settings(deadline=None, max_examples=25)
def test_pooling_is_the_mean_by_area_at_the_mean_length(side, levels):
    grids = hierarchy(levels)
    grid = torch.randn(2, side, side, 3, generator=torch.Generator().manual_seed(side))
    made = regions.pool_grid(grid.flatten(1, 2), grids)
    assert made.hierarchy() == grids and made.tokens.dtype == grid.dtype
    expected = []
    for level in grids.levels:
        down = {1: 1, 2: 1, 3: 1, 4: 2, 5: 1, 6: 2, 7: 1, 8: 2}[level.tokens]
        rows, cols = level.rows * down, level.cols * level.tokens // down
        for cell in range(level.rows * level.cols):
            for slot in range(level.tokens):
                r = cell // level.cols * down + slot // (level.tokens // down)
                c = cell % level.cols * (level.tokens // down) + slot % (level.tokens // down)
                # Every token as rows x cols small ones: a part is a whole number of those.
                fine = grid.repeat_interleave(rows, 1).repeat_interleave(cols, 2)
                part = fine[:, r * side : (r + 1) * side, c * side : (c + 1) * side].flatten(1, 2)
                expected.append(torch.nn.functional.normalize(part.mean(1), dim=-1) * part.norm(dim=-1).mean(1, keepdim=True))
    assert torch.allclose(made.tokens, torch.stack(expected, dim=1), atol=1e-4)


def test_redux_grids_pool_to_every_preset():
    for side in (27, 32):
        tokens = torch.randn(1, side * side, 8)
        for grids in PRESETS.values():
            assert regions.pool_grid(tokens, grids).hierarchy() == grids
    with pytest.raises(ValueError, match="730 tokens are no square grid"):
        regions.pool_grid(torch.randn(1, 730, 8), PRESETS["tree64"])


@pytest.mark.parametrize(
    ("region", "route", "grid"),
    [(region, route, (9, 11)) for region in ("box", "hard", "soft") for route in ("merge", "dense")]
    + [("box", "partition", (9, 11)), ("hard", "partition", (8, 12))],  # which takes no soft border, and is not chosen for one
)
def test_nothing_leaks_out_of_a_region(region, route, grid):
    """At full strength, whatever its tokens say: what a patch outside the region reads differs by exactly 0."""
    other = algebra.with_strength(embedding(2, "global16"), 1.0 if route == "partition" else 2.0)
    if region == "box":
        made = algebra.compose([embedding(1), regions.move_into(other, (0.5, 0.5, 1.0, 1.0))])
    else:
        mask = QUARTER if region == "hard" else regions.feather(QUARTER, 0.3)
        made = regions.insert(embedding(1), other, mask, "join")
    count, patches = made.token_count, grid[0] * grid[1]
    mask = region_bias(made.boxes, made.strengths, grid, count + 3, 4, masks=made.masks, masked_by=made.masked_by)
    prepared = Regions(mask)
    q, k, v = torch.randn(3, 1, 2, prepared.length, 16)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, 64:count] *= -3
    changed_v[:, :, 64:count] += 1000
    before = masked_attention(q, k, v, prepared, route)
    after = masked_attention(q, changed_k, changed_v, prepared, route)
    image = slice(count + 3, count + 3 + patches)
    sees = (mask[image, 64:] > -math.inf).any(-1)
    change = (after - before)[0, :, image].abs().amax((0, 2))
    assert 0 < sees.sum() < patches
    assert (change[~sees] == 0).all() and (change[sees] > 0).all()
