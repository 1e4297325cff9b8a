"""Redux through core's own classes: a SigLIP tower and a style model of random weights, at toy width where that is enough."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.clip_vision  # noqa: E402
import comfy.image_encoders.dino2  # noqa: E402
import comfy.ldm.flux.redux  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.t2i_adapter.adapter  # noqa: E402
from semantic_diffusion_adapter.nodes.host import redux  # noqa: E402
from semantic_diffusion_adapter.nodes.style import EncodeRedux, FromStyleModel  # noqa: E402

import nodes as stock  # noqa: E402

from .conftest import scramble  # noqa: E402

CONFIGS = Path(comfy.clip_vision.__file__).parent
TOY = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
AS_IT_COMES = ("tree64", 1.0, 1.0, 1.0)


@pytest.fixture
def tower(tmp_path):
    """tower(size of the file of core's, other entries): core's own SigLIP with random weights."""

    def make(size: int = 512, **changes) -> comfy.clip_vision.ClipVisionModel:
        config = json.loads((CONFIGS / f"clip_vision_siglip_{size}.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        made = comfy.clip_vision.ClipVisionModel(str(tmp_path / "config.json"))
        scramble(made.model, 0)
        return made

    return make


@pytest.fixture
def toy(tower):
    """4 x 4 patches of 16 pixels, as SigLIP2 512 has 32 x 32: every pixel is read."""
    return tower(512, image_size=64, **TOY)


@pytest.fixture
def style():
    return comfy.sd.StyleModel(scramble(comfy.ldm.flux.redux.ReduxImageEncoder(16, 24), 1))


def pictures(batch: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("image", [pictures(1, 64, 64), pictures(6, 30, 100), pictures(2, 150, 17)], ids=["square", "wide", "high"])
def test_one_node_is_core_without_the_crop_and_the_older_node(image, toy, style):
    (seen,) = stock.CLIPVisionEncode().encode(toy, image, "none")
    (older,) = FromStyleModel.execute(style, seen, "tree64").result
    (e,) = EncodeRedux.execute(image, style, toy, *AS_IT_COMES).result
    torch.testing.assert_close(e.tokens, older.tokens, atol=1e-4, rtol=1e-4)
    assert torch.equal(e.strengths, older.strengths) and torch.equal(e.boxes, older.boxes) and e.source == older.source
    assert e.tokens.shape == (len(image), 64, 24) and e.tokens.dtype == torch.float32
    if image.shape[1] != image.shape[2]:
        (cropped,) = stock.CLIPVisionEncode().encode(toy, image, "center")
        assert not torch.allclose(FromStyleModel.execute(style, cropped, "tree64").result[0].tokens, older.tokens, atol=1e-2)


def test_a_batch_is_its_pictures_one_by_one(toy, style):
    image = pictures(5, 40, 60)
    (together,) = EncodeRedux.execute(image, style, toy, *AS_IT_COMES).result
    for number, picture in enumerate(image.split(1)):
        (alone,) = EncodeRedux.execute(picture, style, toy, *AS_IT_COMES).result
        torch.testing.assert_close(together.tokens[number], alone.tokens[0], atol=1e-4, rtol=1e-4)


def test_the_last_pixels_are_seen_where_core_leaves_them_unread(tower, style):
    """4 patches of 14 read 56 of 60 pixels, as the 27 of SigLIP 384 read 378."""
    odd = tower(384, image_size=60, **TOY)
    image = pictures(1, 60, 60)
    other = image.clone()
    other[:, 56:], other[:, :, 56:] = 0, 0
    unread = [stock.CLIPVisionEncode().encode(odd, each, "none")[0].last_hidden_state for each in (image, other)]
    assert torch.equal(*unread)
    seen, changed = (EncodeRedux.execute(each, style, odd, *AS_IT_COMES).result[0].tokens for each in (image, other))
    assert (seen - changed).abs().max() > 0.01


def test_transparency_lies_over_white(toy, style):
    image = pictures(1, 50, 70, 4)
    white = image[..., :3] * image[..., 3:] + 1 - image[..., 3:]
    tokens = [EncodeRedux.execute(each, style, toy, *AS_IT_COMES).result[0].tokens for each in (image, white)]
    torch.testing.assert_close(*tokens, atol=1e-3, rtol=1e-3)


def test_every_dial_is_the_strength_of_its_level(toy, style):
    (e,) = EncodeRedux.execute(pictures(1, 64, 64), style, toy, "tree128", 0.5, 0.0, 1.5).result
    torch.testing.assert_close(e.strengths.exp(), torch.tensor([0.5, 0.0, 1.5])[e.levels])
    (e,) = EncodeRedux.execute(pictures(1, 64, 64), style, toy, "global32", 0.5, 0.0, 1.5).result
    torch.testing.assert_close(e.strengths.exp(), torch.full((32,), 0.5))


@pytest.mark.parametrize(("size", "side", "grid"), [(384, 378, 27), (512, 512, 32)])
def test_the_published_towers_give_their_grids(size, side, grid, tower):
    """Core's configs of `sigclip_vision_patch14_384` and SigLIP2 512 at their real width, with two of the 27 layers."""
    real = tower(size, num_hidden_layers=2)
    assert redux._sight(real) == (side, size, 1152)
    style = comfy.sd.StyleModel(scramble(comfy.ldm.flux.redux.ReduxImageEncoder(1152, 24), 1))
    tokens = redux.encode(style, real, pictures(1, 90, 60))
    assert tokens.shape == (1, grid * grid, 24) and torch.isfinite(tokens).all()


def test_a_tower_of_any_aspect_gets_a_square(style, tmp_path):
    """SigLIP2 NaFlex of newer cores keeps a picture's aspect; its grid would not be square."""
    naflex = CONFIGS / "clip_vision_siglip2_base_naflex.json"
    if not naflex.is_file():
        pytest.skip("this core has no SigLIP2 NaFlex")
    (tmp_path / "config.json").write_text(json.dumps(json.loads(naflex.read_text()) | TOY))
    flexible = comfy.clip_vision.ClipVisionModel(str(tmp_path / "config.json"))
    scramble(flexible.model, 0)
    assert redux.encode(style, flexible, pictures(1, 40, 160)).shape == (1, 256, 24)


def test_a_tower_of_another_width_is_named_with_the_remedy(toy, tower, style):
    wider = tower(512, image_size=64, **TOY | {"hidden_size": 20})
    words = r"gives tokens of width 20 and the style model reads 16: load sigclip_vision_patch14_384 .* in Load CLIP Vision\.$"
    with pytest.raises(ValueError, match=words):
        EncodeRedux.execute(pictures(1, 64, 64), style, wider, *AS_IT_COMES)
    (seen,) = stock.CLIPVisionEncode().encode(wider, pictures(1, 64, 64), "none")
    with pytest.raises(ValueError, match=words):
        FromStyleModel.execute(style, seen, "tree64")


def test_what_is_no_siglip_and_no_redux(toy, style):
    image = pictures(1, 64, 64)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
    dino = comfy.image_encoders.dino2.Dinov2Model(config, torch.float32, "cpu", comfy.ops.manual_cast)
    whole, toy.model = toy.model, dino
    with pytest.raises(ValueError, match=r"\(Dinov2Model\) is no SigLIP, which Redux reads: load sigclip"):
        EncodeRedux.execute(image, style, toy, *AS_IT_COMES)
    toy.model = whole
    adapter = comfy.sd.StyleModel(comfy.t2i_adapter.adapter.StyleAdapter(width=16, context_dim=24, num_head=2, n_layes=1, num_token=8))
    with pytest.raises(ValueError, match=r"\(StyleAdapter\) is no Redux: load flux1-redux-dev"):
        EncodeRedux.execute(image, adapter, toy, *AS_IT_COMES)


def test_the_benchmarks_projection_is_cores(style):
    """benchmarks/redux.py measures layers of its own, since only the host's room may import core."""
    pytest.importorskip("diffusers")
    from semantic_diffusion_adapter.benchmarks.redux import projection

    layers, core = projection((16, 24)), style.model
    core.load_state_dict({f"redux_{name}.{part}": getattr(layers[at], part) for name, at in (("up", 0), ("down", 2))
                          for part in ("weight", "bias")})  # fmt: skip
    seen = torch.randn(1, 16, 16)
    torch.testing.assert_close(core(seen), layers(seen))
