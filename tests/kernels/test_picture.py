"""What is drawn is what the embedding says, pixel by pixel; what is seen is what the attention is told."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from semantic_diffusion_adapter.kernels import picture
from semantic_diffusion_adapter.kernels.embedding import MASK_SIDE, SemanticEmbedding, from_hierarchy
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy
from semantic_diffusion_adapter.kernels.visibility import region_bias


def embedding(levels="tree64", batch=1, width=6, seed=0, **changes) -> SemanticEmbedding:
    grids = hierarchy(levels)
    tokens = torch.randn(batch, grids.token_count, width, generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(from_hierarchy(tokens, grids), **changes)


def confined(e: SemanticEmbedding, mask: torch.Tensor, tokens=slice(None)) -> SemanticEmbedding:
    rows = torch.full((e.token_count,), -1)
    rows[tokens] = 0
    return dataclasses.replace(e, masks=mask[None], masked_by=rows)


def half_mask(value=1.0) -> torch.Tensor:
    mask = torch.zeros(MASK_SIDE, MASK_SIDE)
    mask[:, : MASK_SIDE // 2] = value
    return mask


def middle(drawn: torch.Tensor, row: int, col: int, cells: int = 4) -> torch.Tensor:
    """The colour in the middle of a cell of a square grid, away from its lines."""
    height, width = drawn.shape[1:3]
    return drawn[0, int((row + 0.4) * height / cells), int((col + 0.4) * width / cells)]


def test_strength_is_measured_as_a_factor():
    strengths = torch.tensor([0.0, -torch.inf, math.log(2), math.log(0.5), 5.0])
    values = picture.measure(embedding([[1, 5, 1]], batch=2, strengths=strengths), "strength")
    assert values.shape == (2, 5)
    assert torch.allclose(values[1], torch.tensor([0.0, -1, 1, -0.5, 1]), atol=1e-6)


def test_norms_are_measured_against_the_median_of_each_image():
    tokens = torch.tensor([1.0, 2, 2, 2, 8])[None, :, None] * torch.tensor([1.0, 10.0])[:, None, None]
    values = picture.measure(embedding([[1, 5, 1]], tokens=tokens.expand(2, 5, 6)), "token norm")
    assert torch.allclose(values, torch.tensor([-0.5, 0, 0, 0, 1]).expand(2, 5), atol=1e-6)
    zero = picture.measure(embedding([[1, 5, 1]], tokens=torch.zeros(1, 5, 6)), "token norm")
    assert torch.isfinite(zero).all()


def test_change_is_measured_against_the_other_embedding():
    before = embedding(batch=1)
    tokens = before.tokens.clone()
    tokens[:, 3] *= 1.25
    tokens[:, 5] *= -4
    values = picture.measure(dataclasses.replace(before, tokens=tokens.expand(2, -1, -1)), "change", before)
    assert values.shape == (2, 64)
    assert torch.allclose(values[:, 3], torch.tensor(0.25)) and torch.equal(values[:, 5], torch.ones(2))
    assert values.sum(1).tolist() == pytest.approx([1.25, 1.25])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: picture.measure(e, "colour"), "no measure 'colour'"),
        (lambda e: picture.measure(e, "change"), "connect one to compare"),
        (lambda e: picture.measure(e, "change", embedding("global16")), "different layouts"),
        (lambda e: picture.measure(e, "change", embedding(boxes=e.boxes.flip(0))), "different layouts"),
        (lambda e: picture.measure(embedding(batch=2), "change", embedding(batch=3)), "batches"),
        (lambda e: picture.draw(e, torch.zeros(2, 64), torch.zeros(3, 8, 8, 3)), "3 images and 2 embeddings"),
        (lambda e: picture.draw(e, torch.zeros(2, 8, 8), torch.zeros(3, 8, 8, 3)), "3 images and 2 maps"),
        (lambda e: picture.seen(e, (2, 2), level=3), "no level 3"),
        (lambda e: picture.seen(e, (2, 2), token=64), "the embedding has 64"),
        (lambda e: picture.seen(e, (2, 2), level=0, token=16), "level 0 has 16"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(embedding())
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_as_trained_the_image_shows_between_the_lines():
    image = torch.rand(1, 600, 480, 3)
    before = image.clone()
    drawn = picture.draw(embedding(), torch.zeros(1, 64), image)
    assert torch.equal(image, before), "the artist's image was drawn on"
    assert drawn.shape == image.shape and drawn.dtype == torch.float32
    untouched = (drawn == image).all(-1)[0]
    for row in range(4):
        for col in range(4):
            assert untouched[row * 150 + 5 : row * 150 + 145, col * 120 + 5 : col * 120 + 115].all()
    grey = picture.draw(embedding(), torch.zeros(1, 64))
    assert grey.shape == (1, 512, 512, 3) and torch.equal(middle(grey, 0, 0), torch.full((3,), 0.5))


def test_the_finest_level_tints_and_the_tokens_of_a_cell_are_averaged():
    e = embedding()
    values = torch.where(e.levels < 2, 1.0, 0.0)
    assert torch.equal(middle(picture.draw(e, values[None]), 1, 2), torch.full((3,), 0.5))
    values = torch.zeros(64)
    values[32:34] = torch.tensor([-1.0, 0.0])  # the two tokens of cell 0, 0 of the 4 x 4 level
    values[62:] = 0.5  # of cell 3, 3
    drawn = picture.draw(e, values[None])
    blue, orange = middle(drawn, 0, 0), middle(drawn, 3, 3)
    assert blue[2] > 0.5 > blue[0] and orange[0] > 0.5 > orange[2]
    assert torch.equal(middle(drawn, 1, 1), torch.full((3,), 0.5))
    # Where the finer level has no cell, the coarser one shows.
    part = SemanticEmbedding(
        torch.randn(1, 2, 6), torch.tensor([[0.0, 0, 1, 1], [0.5, 0, 1, 1]]), torch.tensor([0, 1]), torch.zeros(2)
    )
    drawn = picture.draw(part, torch.tensor([[1.0, 0.0]]))
    assert middle(drawn, 1, 0)[0] > 0.8 and torch.equal(middle(drawn, 1, 3), torch.full((3,), 0.5))


def test_a_mask_confines_the_tint_and_is_outlined():
    e = confined(embedding("global16"), half_mask())
    drawn = picture.draw(e, torch.ones(1, 16))
    assert middle(drawn, 1, 0)[0] > 0.8 and torch.equal(middle(drawn, 1, 3), torch.full((3,), 0.5))
    border = drawn[0, 100, 250:262, 0]
    assert border.max() == 1.0 and border.min() == pytest.approx(0.1)
    soft = picture.draw(confined(embedding("global16"), half_mask(0.5)), torch.ones(1, 16))
    assert 0.5 < middle(soft, 1, 0)[0] < middle(drawn, 1, 0)[0]


def test_a_map_tints_its_own_places_under_the_boxes():
    change = torch.zeros(1, 16, 24)
    change[:, :4, :6], change[:, 4:8, :6], change[:, 12:, 18:] = 1, torch.nan, 0.5
    drawn = picture.draw(embedding(), change, torch.full((2, 512, 768, 3), 0.5))
    full, none, half = middle(drawn, 0, 0), middle(drawn, 1, 0), middle(drawn, 3, 3)
    assert drawn.shape == (2, 512, 768, 3) and torch.equal(none, torch.full((3,), 0.5))
    assert full[0] > half[0] > 0.5 > half[2] > full[2]
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_complementary_masks_leave_no_seam():
    ramp = torch.linspace(0, 1, MASK_SIDE).expand(MASK_SIDE, -1)
    e = embedding("global16")
    e = dataclasses.replace(e, masks=torch.stack([ramp, 1 - ramp]), masked_by=torch.arange(16) % 2)
    plain = picture.draw(embedding("global16"), torch.ones(1, 16))
    drawn = picture.draw(e, torch.ones(1, 16))
    same = (drawn - plain).abs().amax(-1)[0] < 1e-3
    assert same[:, 5:250].all() and same[:, 262:507].all(), "only the outline in the middle may differ"


def test_coarser_boxes_have_thicker_lines():
    drawn = picture.draw(embedding(), torch.zeros(1, 64))[0, :, 64, 0]  # down the middle of the first column
    light = [int((drawn[around - 10 : around + 10] == 1).sum()) for around in (128, 256, 384)]
    assert light == [1, 2, 1]
    assert int((drawn[:10] == 1).sum()) == int((drawn[-10:] == 1).sum()) == 3, "the image's own edge is level 0"


@pytest.mark.parametrize(
    ("size", "shown"), [((1, 1), (512, 512)), ((3, 200), (9, 600)), ((128, 96), (512, 384)), ((1024, 600), (1024, 600))]
)
def test_any_size_and_any_batch(size, shown):
    e = confined(embedding(batch=3), half_mask(), slice(0, 16))
    for image in (torch.rand(3, *size, 3), torch.rand(1, *size, 4)):
        drawn = picture.draw(e, picture.measure(e, "token norm"), image)
        assert drawn.shape == (3, *shown, 3) and 0 <= drawn.min() <= drawn.max() <= 1
    assert picture.draw(embedding(), torch.zeros(1, 64), torch.rand(5, *size, 3)).shape == (5, *shown, 3)


def test_a_tiny_box_is_not_lost():
    e = embedding("global16", boxes=torch.tensor([[0.9999, 0.9999, 1.0, 1.0]]).repeat(16, 1))
    assert not torch.equal(picture.draw(e, torch.ones(1, 16)), torch.full((1, 512, 512, 3), 0.5))


def test_seen_is_the_weight_of_the_attention():
    e = embedding(strengths=torch.linspace(-3, 1, 64))
    e = confined(e, half_mask(0.5), slice(10, 40))
    grid = (5, 7)
    bias = region_bias(e.boxes, e.strengths, grid, 64, masks=e.masks, masked_by=e.masked_by)[64:]
    expected = bias.exp().clamp(max=1).mean(1).reshape(grid)
    assert torch.equal(picture.seen(e, grid), expected)
    level = bias[:, e.levels == 1].exp().clamp(max=1)
    assert torch.equal(picture.seen(e, grid, level=1), level.mean(1).reshape(grid))
    assert torch.equal(picture.seen(e, grid, level=1, token=3), level[:, 3].reshape(grid))


def test_seen_of_a_box_of_a_mask_and_of_what_is_off():
    e = embedding([[1, 2, 2]])
    assert picture.seen(e, (1, 4)).tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert picture.seen(e, (1, 4), token=0).tolist() == [[1, 1, 0, 0]]
    off = dataclasses.replace(e, strengths=torch.tensor([0, -torch.inf, math.log(0.5), 3.0]))
    assert torch.allclose(picture.seen(off, (1, 4)), torch.tensor([[0.25, 0.25, 0.375, 0.375]]))
    masked = confined(embedding("global16"), half_mask(0.25))
    assert torch.allclose(picture.seen(masked, (1, 4)), torch.tensor([[0.25, 0.25, 0, 0]]))


def test_what_is_transparent_shows_white():
    hidden_red, half_blue, opaque_green = [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.5], [0.0, 1.0, 0.0, 1.0]
    image = torch.tensor([[[hidden_red, half_blue, opaque_green]]])
    assert picture.over_white(image).tolist() == [[[[1.0, 1.0, 1.0], [0.5, 0.5, 1.0], [0.0, 1.0, 0.0]]]]
    assert picture.over_white(image[..., :3]).equal(image[..., :3])
