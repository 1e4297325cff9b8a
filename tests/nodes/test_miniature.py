"""A miniature of random weights through the real loaders: each part against the library that training uses."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

import transformers  # noqa: E402
from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.nodes.host import folders, loading, miniature, running, text_encoder  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402
from semantic_diffusion_adapter.nodes.host.flux import patch  # noqa: E402

import nodes as stock  # noqa: E402


def reference_text(assets, ids: list[int]) -> torch.Tensor:
    """[1, L, D] of transformers' T5 on these ids, padding seen by all."""
    state, record = checkpoint.load(assets / miniature.TEXT_ENCODER, "text_encoder")
    encoder = transformers.T5EncoderModel(transformers.T5Config(**record["config"]["t5"])).eval()
    encoder.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    ids = torch.tensor([ids])
    with torch.no_grad():
        return encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def test_clip_is_the_trained_text_encoder(assets, clip):
    (tokens, settings), = stock.CLIPTextEncode().encode(clip, "A red, PURPLE circle 2")[0]  # fmt: skip
    expected = reference_text(assets, [3, 4, 2, 5, 8, 1, 0])
    assert torch.allclose(tokens, expected, atol=1e-5)
    assert torch.allclose(settings["pooled_output"], expected[:, :6].mean(1), atol=1e-5)


def test_the_empty_and_the_overlong_prompt(assets, clip):
    (empty, settings), = stock.CLIPTextEncode().encode(clip, "")[0]  # fmt: skip
    expected = reference_text(assets, [1, 0, 0, 0, 0, 0, 0])
    assert torch.allclose(empty, expected, atol=1e-5)
    assert torch.allclose(settings["pooled_output"], expected[:, 0], atol=1e-5)
    (long, _), = stock.CLIPTextEncode().encode(clip, "a " * 30)[0]  # fmt: skip
    assert torch.allclose(long, reference_text(assets, [3, 3, 3, 3, 3, 3, 1]), atol=1e-5)


def test_prompt_weights_are_cores(assets, clip):
    """Core moves a weighted word's vector away from that of the empty prompt; brackets are no words."""
    (weighted, _), = stock.CLIPTextEncode().encode(clip, "a (red:1.5) circle")[0]  # fmt: skip
    plain, empty = reference_text(assets, [3, 4, 5, 1, 0, 0, 0]), reference_text(assets, [1, 0, 0, 0, 0, 0, 0])
    expected = plain.clone()
    expected[:, 1] = (plain[:, 1] - empty[:, 1]) * 1.5 + empty[:, 1]
    assert torch.allclose(weighted, expected, atol=1e-5)


def test_a_text_encoder_that_core_cannot_compute_is_refused(assets, tmp_path):
    state, record = checkpoint.load(assets / miniature.TEXT_ENCODER, "text_encoder")
    config = record["config"] | {"t5": record["config"]["t5"] | {"relative_attention_num_buckets": 16}}
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    state[bias] = state[bias][:16]
    checkpoint.save(tmp_path / "t5.safetensors", state, "text_encoder", config)
    with pytest.raises(ValueError, match="relative_attention_num_buckets 16 .* only 32"):
        text_encoder.load_clip(str(tmp_path / "t5.safetensors"))


def test_vae_is_the_trained_one(assets):
    vae = miniature.load_vae(str(assets / miniature.VAE))
    state, record = checkpoint.load(assets / miniature.VAE, "vae")
    trained = diffusers.AutoencoderKL(**record["config"]).eval()
    trained.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    image = torch.rand(1, 64, 48, 3)
    with torch.no_grad():
        latent = trained.encode(image.movedim(-1, 1) * 2 - 1).latent_dist
        decoded = (trained.decode(latent.mean).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    (encoded,) = stock.VAEEncode().encode(vae, image)
    assert encoded["samples"].shape == (1, 8, 8, 6)
    # Core samples the posterior or takes its mode, version by version: both lie within a few deviations.
    assert ((encoded["samples"] - latent.mean).abs() <= 6 * latent.std + 1e-3).all()
    (shown,) = stock.VAEDecode().decode(vae, {"samples": latent.mean})
    assert torch.allclose(shown, decoded, atol=1e-4)
    assert vae.latent_channels == 8


def test_flux_has_the_records_numbers_and_weights(assets):
    model = miniature.load_flux(str(assets / miniature.FLUX))
    network = model.get_model_object("diffusion_model")
    state, record = checkpoint.load(assets / miniature.FLUX, "flux")
    assert (network.params.num_heads, network.params.hidden_size) == (2, 64)
    assert torch.equal(network.txt_in.weight, state["txt_in.weight"])
    assert torch.equal(network.single_blocks[1].linear2.weight, state["single_blocks.1.linear2.weight"])
    latent = model.get_model_object("latent_format")
    z = torch.randn(1, 8, 2, 2)
    assert torch.allclose(latent.process_in(z), (z - 0.1) * 0.7) and torch.allclose(latent.process_out(latent.process_in(z)), z)
    # Shift of the schedule (time_shift of Flux): t = 0.5 -> e^mu / (e^mu + 1).
    assert abs(model.get_model_object("model_sampling").percent_to_sigma(0.5) - 0.6225) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, numbers: state.pop("single_blocks.1.linear2.bias"), "'single_blocks.1.linear2.bias'"),
        (lambda state, numbers: numbers.update(mlp_ratio=3.0), "other shapes than its record says"),
        (lambda state, numbers: state.pop("double_blocks.0.img_attn.norm.key_norm.scale"), "lacks .*key_norm.scale"),
    ],
)
def test_a_flux_file_that_belies_its_record_is_refused(assets, tmp_path, change, message):
    state, record = checkpoint.load(assets / miniature.FLUX, "flux")
    change(state, record["config"])
    checkpoint.save(tmp_path / "flux.safetensors", state, "flux", record["config"])
    with pytest.raises(ValueError, match=message):
        miniature.load_flux(str(tmp_path / "flux.safetensors"))


def test_the_whole_job_through_the_loaders(assets):
    """Encode, build, edit, decode: the graph of the example workflow with the stock nodes around ours."""
    model, clip, vae = miniature.load()
    vision = tuple(
        loading.load_vision_tower(folders.find(folder, name), None)
        for folder, name in (miniature.CLIP_ENCODER, miniature.DINOV2_ENCODER)
    )
    adapter = loading.load_adapter(folders.find(*miniature.ADAPTER))
    editor = loading.load_edit_decoder(folders.find(*miniature.EDIT_DECODER))
    image = torch.rand(2, 40, 56, 4)
    features = running.encode_image(vision, image)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "miniature_clip": (2, 4, 16), "miniature_dinov2": (2, 4, 12),
    }  # fmt: skip
    full = running.build_embedding(adapter, features, None)
    small = running.build_embedding(adapter, features, "tree64")
    assert full.token_count == 128 and small.token_count == 64 and full.source["pooled_width"] == 24
    assert (small.tokens[0] - small.tokens[1]).abs().max() > 1e-3, "two images must give two embeddings"
    for mode in ("parallel", "autoregressive"):
        edited = running.edit_embedding(editor, small, clip, "remove the red circle", mode)
        assert (edited.tokens - small.tokens).abs().max() > 1e-4
        assert edited.source["edits"] == ["remove the red circle"] and edited.boxes is small.boxes
    other = running.edit_embedding(editor, small, clip, "a circle", "parallel")
    again = running.edit_embedding(editor, small, clip, "remove the red circle", "parallel")
    assert not torch.allclose(other.tokens, again.tokens), "the instruction must matter"
    # The same decoder, as if it had learnt from fitted embeddings.
    from_fits, fitted = replace(editor, record={**editor.record, "fitted": True}), replace(small, source={"fit": {"steps": 100}})
    with pytest.raises(ValueError, match="edits embeddings that were fitted, and this one was not: fit the image"):
        running.edit_embedding(from_fits, small, clip, "remove the red circle", "parallel")
    with pytest.raises(ValueError, match="edits what one adapter makes"):
        running.edit_embedding(editor, fitted, clip, "remove the red circle", "parallel")
    assert torch.equal(running.edit_embedding(from_fits, fitted, clip, "remove the red circle", "parallel").tokens, again.tokens)

    (latent,) = stock.EmptyLatentImage().generate(64, 64, 2)
    negative = stock.CLIPTextEncode().encode(clip, "")[0]
    with torch.inference_mode():
        (result,) = stock.KSampler().sample(
            patch(model), 0, 2, 1.5, "euler", "simple", to_conditioning(edited), negative, latent, 1.0
        )
        (picture,) = stock.VAEDecode().decode(vae, result)
    assert picture.shape == (2, 64, 64, 3) and torch.isfinite(picture).all()


def test_dynamic_vram_paints_the_same_picture(assets, monkeypatch):
    """Core switches it on where there is an NVIDIA card; layers then are built empty and keep the dtype of what is loaded."""
    memory = pytest.importorskip("comfy.memory_management", reason="this core has no dynamic VRAM")

    def paint() -> torch.Tensor:
        model, clip, vae = miniature.load()
        positive, negative = (stock.CLIPTextEncode().encode(clip, text)[0] for text in ("a red circle", ""))
        (latent,) = stock.EmptyLatentImage().generate(64, 64)
        with torch.inference_mode():
            (result,) = stock.KSampler().sample(model, 0, 2, 1.5, "euler", "simple", positive, negative, latent, 1.0)
            return stock.VAEDecode().decode(vae, result)[0]

    expected = paint()
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    assert torch.equal(paint(), expected)


def test_a_missing_file_is_named(assets, tmp_path, monkeypatch):
    root = tmp_path / "miniature"
    shutil.copytree(assets, root)
    (root / "vae" / "miniature_vae.safetensors").unlink()
    monkeypatch.setattr(folders, "MINIATURE", root)
    with pytest.raises(ValueError, match="miniature_vae.safetensors is missing from .*vae"):
        miniature.load()


def test_a_vae_of_other_shape_is_refused(assets, tmp_path):
    config = checkpoint.read_header(assets / miniature.VAE, "vae")["config"] | {"block_out_channels": [32, 48, 96, 128]}
    checkpoint.save(tmp_path / "v.safetensors", diffusers.AutoencoderKL(**config).state_dict(), "vae", config)
    with pytest.raises(ValueError, match="multiples of the first and of 32"):
        miniature.load_vae(str(tmp_path / "v.safetensors"))


def test_words_that_the_miniature_does_not_hear_are_said(clip, caplog):
    for text, named in (
        ("make the red circle teal, bigger", "teal, bigger"),
        ("删除 the circle", "删除"),
        ("remove the naïve circle", "naïve"),
    ):
        caplog.clear()
        clip.tokenize(text)
        assert "does not know: " in caplog.text and named.split(", ")[0] in caplog.text, text
        assert all(word in caplog.text for word in named.split(", "))
        assert "It knows: a, circle, red, remove, the" in caplog.text
    caplog.clear()
    clip.tokenize("(remove:1.2) the red circle, a circle")
    assert "hears the first 6 words of a prompt and this one has 6" not in caplog.text
    clip.tokenize("remove the red circle a circle the red circle")
    assert "hears the first 6 words of a prompt and this one has 9" in caplog.text
    caplog.clear()
    clip.tokenize("Remove the RED circle")
    assert not caplog.text


def test_a_size_that_the_miniature_has_not_learnt_is_said(assets, caplog):
    model, clip, _ = miniature.load()
    text = stock.CLIPTextEncode().encode(clip, "a red circle")[0]
    for width, height, said in ((128, 128, 0), (256, 128, 1), (64, 64, 1)):
        caplog.clear()
        (latent,) = stock.EmptyLatentImage().generate(width, height)
        with torch.inference_mode():
            stock.KSampler().sample(patch(model), 0, 1, 1.0, "euler", "simple", text, text, latent, 1.0)
        assert caplog.text.count(f"128 x 128 pixels only and is asked for {width} x {height}") == said
