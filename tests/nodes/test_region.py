"""Regions, style models, strengths and masks: the nodes over kernels, with core's own CLIP, style model and types."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("comfy", reason="ComfyUI is not here: set COMFYUI_PATH or run `python3 run.py test`")

import comfy.ldm.flux.redux
import comfy.sd
import folder_paths
from comfy_api.latest import io
from semantic_diffusion_adapter.kernels import algebra, regions
from semantic_diffusion_adapter.kernels.visibility import region_bias
from semantic_diffusion_adapter.nodes import canvas
from semantic_diffusion_adapter.nodes.edit import KeepOutsideMask
from semantic_diffusion_adapter.nodes.host import flux
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning
from semantic_diffusion_adapter.nodes.region import ComposeEmbeddings, PlaceEmbedding, RegionalPrompt
from semantic_diffusion_adapter.nodes.strength import EmbeddingStrength
from semantic_diffusion_adapter.nodes.style import FromStyleModel

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0, "replace"), (0.5, 0.0, 0.5, 1.0, "replace")


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where the pictures for the page go."""
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


def seen(e, grid=(4, 4)) -> torch.Tensor:
    """[patches, tokens] bool: what the patches of a grid see."""
    bias = region_bias(e.boxes, e.strengths, grid, e.token_count, masks=e.masks, masked_by=e.masked_by)
    return bias[e.token_count :].isfinite()


def test_regional_prompts_need_nothing_but_the_model_and_its_clip(clip, toy):
    (first,) = RegionalPrompt.execute(clip, "a red circle", *LEFT).result
    (both,) = RegionalPrompt.execute(clip, "remove the circle", *RIGHT, embedding=first).result
    # Three words and the end mark each; the padding up to the trained length of 7 stays behind.
    assert first.token_count == 4 and both.token_count == 8 and both.width == 24
    whole, _ = clip.encode_from_tokens(clip.tokenize("a red circle"), return_pooled=True)
    assert torch.equal(first.tokens, whole[:, :4])
    left = torch.tensor([True, True, False, False]).repeat(4)
    assert torch.equal(seen(both)[:, 0], left) and torch.equal(seen(both)[:, 4], ~left)
    text = [[torch.randn(1, 7, 24), {"pooled_output": torch.zeros(1, 24)}]]
    model = flux.patch(toy.model)
    assert not torch.equal(toy.sample(model, to_conditioning(both, text)), toy.sample(model, to_conditioning(first, text)))


def test_a_mask_of_any_size_takes_the_place_of_the_box(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    mask = torch.zeros(1, 37, 53)
    mask[:, :, 40:] = 1
    (e,) = RegionalPrompt.execute(clip, "a red circle", *LEFT, mask=mask).result
    assert torch.equal(seen(e)[:, 0], torch.tensor([False, False, False, True]).repeat(4))
    with pytest.raises(ValueError, match="mask of the region is empty"):
        RegionalPrompt.execute(clip, "a red circle", *LEFT, mask=torch.zeros(8, 8))


PICTURE = torch.zeros(1, 200, 100, 3)
RIGHT_HALF = {"x": 50.0, "y": 0, "width": 50, "height": 200.0, "label": "dog", "score": 0.9}  # in pixels of PICTURE


@pytest.mark.parametrize("found", [RIGHT_HALF, [RIGHT_HALF], [[RIGHT_HALF]]], ids=["one", "list", "picture by picture"])
def test_a_detectors_box_takes_the_place_of_the_box(clip, embedding, found):
    """In each form in which core's nodes give it."""
    (told,) = RegionalPrompt.execute(clip, "a red circle", *LEFT, bboxes=found, image=PICTURE).result
    (by_hand,) = RegionalPrompt.execute(clip, "a red circle", *RIGHT).result
    assert torch.equal(told.boxes, by_hand.boxes) and told.masks is None, "one box stays a box: its border is exact"
    a, b = embedding(seed=0), embedding(seed=1)
    for node in (ComposeEmbeddings, PlaceEmbedding):
        (told,), (by_hand,) = node.execute(a, b, *LEFT, bboxes=found, image=PICTURE).result, node.execute(a, b, *RIGHT).result
        assert torch.equal(told.boxes, by_hand.boxes) and torch.equal(seen(told), seen(by_hand))
    left = torch.ones(1, 8, 8)
    left[:, :, 4:] = 0
    (masked,) = RegionalPrompt.execute(clip, "a", *RIGHT, mask=left, bboxes=found, image=PICTURE).result
    assert torch.equal(seen(masked)[:, 0], torch.tensor([True, True, False, False]).repeat(4)), "a mask goes before boxes"


def test_all_boxes_of_a_detector_are_one_region(clip):
    corner = {"x": 0, "y": 150, "width": 25, "height": 50}
    (e,) = RegionalPrompt.execute(clip, "a red circle", *LEFT, bboxes=[[RIGHT_HALF, corner]], image=PICTURE).result
    expected = torch.tensor([False, False, True, True]).repeat(4)
    expected[12] = True
    assert e.token_count == 4 and torch.equal(seen(e)[:, 0], expected)


def test_a_box_that_core_makes(clip):
    if not hasattr(io, "BoundingBox"):
        pytest.skip("this core knows no bounding boxes")
    from comfy_extras.nodes_images import BoundingBox

    (box,) = BoundingBox.execute(x=50, y=0, width=50, height=200).result
    (e,) = RegionalPrompt.execute(clip, "a red circle", *LEFT, bboxes=box, image=PICTURE).result
    assert torch.equal(seen(e)[:, 0], torch.tensor([False, False, True, True]).repeat(4))


@pytest.mark.parametrize(
    ("found", "image", "message"),
    [
        (RIGHT_HALF, None, "connect the one that they were found in to image"),
        ([], PICTURE, "The detector found nothing"),
        ([[]], PICTURE, "The detector found nothing"),
        ([[RIGHT_HALF], []], PICTURE, "boxes of 2 pictures"),
        ([{"bbox": [0, 0, 1, 1]}], PICTURE, "this is something else"),
        ((0, 0, 1, 1), PICTURE, "this is something else"),
        ({**RIGHT_HALF, "x": 100}, PICTURE, "empty or outside the picture"),
    ],
)
def test_boxes_that_are_no_region_are_refused(clip, found, image, message):
    with pytest.raises(ValueError, match=message) as caught:
        RegionalPrompt.execute(clip, "a red circle", *LEFT, bboxes=found, image=image)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "box", "message"),
    [("  ", LEFT, "prompt of a region is empty"), ("a", (1.0, 0.0, 0.5, 1.0, "replace"), "box of the region is empty")],
)
def test_what_no_region_can_be_made_of_is_refused(clip, text, box, message):
    with pytest.raises(ValueError, match=message):
        RegionalPrompt.execute(clip, text, *box)


def test_a_clip_without_t5_is_refused():
    other = SimpleNamespace(tokenize=lambda text: {"l": [[(1, 1.0)]]})
    with pytest.raises(ValueError, match="no T5"):
        RegionalPrompt.execute(other, "a", *LEFT)


def test_composing_halves_and_placing(embedding):
    a, b = embedding(seed=0), embedding(seed=1)
    (halves,) = ComposeEmbeddings.execute(a, b, *RIGHT).result
    # Of each, the whole image's tokens and one half of every finer level.
    assert halves.token_count == 2 * (16 + 8 + 16)
    own = torch.arange(halves.token_count) < 40
    left = torch.tensor([True, True, False, False]).repeat(4)
    assert seen(halves)[left][:, own].any(0).all() and not seen(halves)[left][:, ~own].any()
    assert seen(halves)[~left][:, ~own].any(0).all() and not seen(halves)[~left][:, own].any()
    (joined,) = ComposeEmbeddings.execute(a, b, *RIGHT[:4], "join").result
    assert torch.equal(seen(joined)[:, :64], seen(a))
    (placed,) = PlaceEmbedding.execute(a, b, 0.5, 0.5, 0.5, 0.5, "replace").result
    assert torch.equal(placed.tokens[:, -64:], b.tokens)
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[2:, 2:] = True
    assert torch.equal(seen(placed)[:, -64:].any(1), corner.flatten())


def test_a_canvas_is_told_the_grids(embedding):
    a = embedding("tree64")
    told = ComposeEmbeddings.execute(a, embedding(seed=1), *RIGHT).ui
    assert told["layout"] == [[1, 1, 16], [2, 2, 4], [4, 4, 2]]
    (mixed,) = ComposeEmbeddings.execute(a, embedding(seed=1), *RIGHT).result
    # Of the right half there are the same cells once more, so the whole tree is there; a placed one has cells of its own.
    assert [cell[:3] for cell in EmbeddingStrength.execute(mixed, 1.0, "all", "").ui["cells"]] == [
        (level, row, column) for level, side in enumerate((1, 2, 4)) for row in range(side) for column in range(side)
    ]
    (placed,) = PlaceEmbedding.execute(embedding("global16"), embedding("quad64"), 0.5, 0.5, 0.5, 0.5, "join").result
    told = EmbeddingStrength.execute(placed, 1.0, "all", "").ui["cells"]
    assert told == [
        (0, 0, 0, 0.0, 0.0, 1.0, 1.0), (0, 1, 1, 0.5, 0.5, 1.0, 1.0),
        (1, 0, 0, 0.5, 0.5, 0.75, 0.75), (1, 0, 1, 0.75, 0.5, 1.0, 0.75),
        (1, 1, 0, 0.5, 0.75, 0.75, 1.0), (1, 1, 1, 0.75, 0.75, 1.0, 1.0),
    ]  # fmt: skip
    for level, row, column, *box in told:  # what the canvas writes names the very tokens that it drew
        (off,) = EmbeddingStrength.execute(placed, 1.0, "all", f"{level}:{row},{column}=0").result
        silent = torch.isinf(off.strengths)
        assert silent.any() and (off.boxes[silent] == torch.tensor(box)).all() and (off.levels[silent] == level).all()


def test_strength_by_levels_and_cells(embedding):
    e = embedding("tree64")
    (weighed,) = EmbeddingStrength.execute(e, 0.5, "1,2", "1:0,1=0; 2=0.5").result
    factors = weighed.strengths.exp()
    assert (factors[:16] == 1).all() and torch.allclose(factors[32:], torch.tensor(0.25))
    assert torch.allclose(factors[16:32], torch.tensor([0.5] * 4 + [0.0] * 4 + [0.5] * 8))
    with pytest.raises(ValueError, match="not understood"):
        EmbeddingStrength.execute(e, 1.0, "all", "somewhere=1")


def test_a_canvas_is_told_no_grid_whose_levels_it_would_count_wrongly(embedding):
    """Four prompts in four quadrants spell a grid, all of it level 1."""
    e = embedding("global16")
    corners = [(x, y, x + 0.5, y + 0.5) for y in (0.0, 0.5) for x in (0.0, 0.5)]
    prompts = algebra.compose([regions.region_tokens(e.tokens[:, :3], box) for box in corners])
    assert prompts.hierarchy().to_json() == [[2, 2, 3]] and (prompts.levels == 1).all()
    told = canvas.shown(prompts)
    assert [cell[0] for cell in told["cells"]] == [1] * 4


def test_the_canvas_is_told_where_the_region_was(embedding, tmp_path):
    a, b = embedding(seed=0), embedding(seed=1)
    boxed = ComposeEmbeddings.execute(a, b, *RIGHT).ui
    assert boxed["box"] == [0.5, 0.0, 1.0, 1.0] and boxed["mask"] == [] and boxed["layout"]
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, :32] = 0.6
    told = PlaceEmbedding.execute(a, b, *RIGHT, mask=mask).ui
    assert told["box"] == [0.0, 0.25, 0.5, 0.75]
    (file,) = told["mask"]
    picture = Image.open(tmp_path / file["subfolder"] / file["filename"])
    opacity = torch.from_numpy(np.array(picture.getchannel("A"))).float() / 255
    assert (opacity - regions.fit_mask(mask)).abs().max() <= 1 / 255
    assert (np.array(picture)[..., :3] == 255).all()


def test_an_edit_stays_inside_its_mask(embedding):
    source, edited = embedding(seed=0), embedding(seed=1)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32, :32] = 1
    (kept,) = KeepOutsideMask.execute(edited, source, mask, 0.0).result
    inside = (kept.boxes[:, 2] <= 0.5) & (kept.boxes[:, 3] <= 0.5)
    whole = kept.levels == 0
    assert torch.equal(kept.tokens[:, inside], edited.tokens[:, inside])
    assert torch.equal(kept.tokens[:, ~inside & ~whole], source.tokens[:, ~inside & ~whole])
    assert torch.equal(kept.tokens[:, whole], edited.tokens[:, whole])
    with pytest.raises(ValueError, match="paint it white"):
        KeepOutsideMask.execute(edited, source, torch.zeros(1, 64, 64), 0.05)


def test_a_style_model_of_the_real_widths(assets):
    """FLUX.1 Redux: 729 tokens of 1,152 to as many of 4,096; the batch stays a batch."""
    network = comfy.ldm.flux.redux.ReduxImageEncoder()
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02 if name.endswith("weight") else 0.0)
    style = comfy.sd.StyleModel(network)
    seen_by_clip = SimpleNamespace(last_hidden_state=torch.randn(2, 729, 1152))
    with torch.no_grad():
        (e,) = FromStyleModel.execute(style, seen_by_clip, "tree128").result
        grid = style.get_cond(seen_by_clip).unflatten(1, (27, 27))
    assert e.tokens.shape == (2, 128, 4096) and torch.isfinite(e.tokens).all()
    # The first slot of the top left 4x4 cell is the mean of 27/8 x 27/8 grid tokens at their mean length.
    share = torch.tensor([1.0, 1.0, 1.0, 0.375])
    weight = torch.outer(share, share) / share.sum() ** 2
    corner = grid[:, :4, :4]
    mean = torch.einsum("rc,brcd->bd", weight, corner)
    length = torch.einsum("rc,brc->b", weight, corner.norm(dim=-1))
    torch.testing.assert_close(e.tokens[:, 64], mean / mean.norm(dim=-1, keepdim=True) * length[:, None], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no square grid"), torch.no_grad():
        FromStyleModel.execute(style, SimpleNamespace(last_hidden_state=torch.randn(1, 20, 1152)), "tree64")
