"""The frozen base: every kind of file, what is refused, and the gradient through each precision."""
from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.kernels import checkpoint  # noqa: E402
from semantic_diffusion_adapter.kernels import precision as machine  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS  # noqa: E402
from semantic_diffusion_adapter.training.frozen import base  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux, to_bfl, velocity  # noqa: E402
from semantic_diffusion_adapter.training.frozen.region_attention import attend_by_region  # noqa: E402
from semantic_diffusion_adapter.training.objectives.reconstruct import regions_for  # noqa: E402

# One head of FLUX.1's own width, so that the shape can be read from the tensors alone.
CONFIG = dict(hidden_size=128, num_heads=1, depth=2, depth_single_blocks=3, axes_dim=[16, 56, 56], context_in_dim=64,
              vec_in_dim=32, in_channels=4, patch_size=2, guidance_embed=True)


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    return build_flux(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def state(toy) -> dict:
    return to_bfl(toy.state_dict())


def same(flux, other, **tolerance) -> None:
    wanted = other.state_dict()
    assert flux.state_dict().keys() == wanted.keys()
    for name, value in flux.state_dict().items():
        torch.testing.assert_close(value.float(), wanted[name].float(), **tolerance)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16", "fp8", "scaled fp8", "in a checkpoint", "ours"])
def test_a_single_file_of_any_dtype_gives_the_flux_it_holds(tmp_path, toy, state, kind):
    path, tolerance = tmp_path / "flux.safetensors", {"rtol": 0.01, "atol": 0}
    if kind == "ours":
        checkpoint.save(path, state, "flux", {**CONFIG, "sampling_shift_mu": 1.3}, dtype=torch.int8)
        tolerance = {"rtol": 0.02, "atol": 2e-3}
    elif kind == "scaled fp8":
        weights = {k: v for k, v in state.items() if v.ndim == 2}
        scales = {k: v.abs().max() / 400 for k, v in weights.items()}
        save_file({**state, **{k: (v / scales[k]).to(torch.float8_e4m3fn) for k, v in weights.items()},
                   **{f"{k[:-7]}.scale_weight": v for k, v in scales.items()}, "scaled_fp8": torch.zeros(2)}, path)
        tolerance = {"rtol": 0.07, "atol": 2e-4}
    else:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}.get(kind, torch.float32)
        prefix = base.PREFIX if kind == "in a checkpoint" else ""
        save_file({prefix + k: v.to(dtype) for k, v in state.items()}, path)
        tolerance = {"rtol": 0.07, "atol": 2e-3} if kind == "fp8" else {"rtol": 0.005, "atol": 1e-6}
    flux = base.load_flux(path, "fp32" if kind == "fp32" else "bf16")
    same(flux, toy, **tolerance)
    assert not any(p.requires_grad for p in flux.parameters()) and not flux.training
    assert {p.dtype for p in flux.parameters()} == {torch.float32 if kind == "fp32" else torch.bfloat16}
    assert flux.config.guidance_embeds and flux.config.num_layers == 2 and flux.config.num_single_layers == 3
    assert flux.config.get("sampling_shift_mu") == (1.3 if kind == "ours" else None)


@pytest.mark.parametrize("parts", ["1KB", "10GB"])
def test_a_diffusers_folder_gives_the_same_and_has_a_hash_of_its_own(tmp_path, toy, parts):
    toy.save_pretrained(tmp_path / "transformer", max_shard_size=parts)
    for folder in (tmp_path, tmp_path / "transformer"):
        same(base.load_flux(folder, "fp32"), toy, rtol=0, atol=0)
    before = base.base_sha256(tmp_path)
    assert before == base.base_sha256(tmp_path / "transformer") and len(before) == 64
    file = sorted((tmp_path / "transformer").glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert base.base_sha256(tmp_path) != before


@pytest.mark.parametrize(("change", "words"), [
    ({"joint_blocks.0.x_block.attn.qkv.weight": ()}, "is Stable Diffusion 3, not FLUX.1"),
    ({"model.diffusion_model.input_blocks.0.0.weight": ()}, "is a Stable Diffusion U-Net, not FLUX.1"),
    ({"double_stream_modulation_img.lin.weight": (), "img_in.weight": ()}, "is FLUX.2, not FLUX.1"),
    ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": ()}, "is a LoRA, not FLUX.1"),
    ({"img_in.weight": (128, 96)}, r"takes a picture beside the noise \(96 channels"),
    ({"double_blocks.1.img_mlp.0.weight": None}, "lacks transformer_blocks.1.ff.net.0.proj.weight; download"),
    ({"single_blocks.2.norm.key_norm.scale": None}, "lacks 'single_blocks.2.norm.key_norm.scale'"),
    ({"txt_in.bias": (5,)}, r"has context_embedder.bias of shape \[5\] instead of \[128\]"),
])
def test_another_model_is_refused_in_one_sentence(tmp_path, state, change, words):
    whole = {} if any(shape == () for shape in change.values()) else dict(state)
    for name, shape in change.items():
        whole.pop(name, None)
        if shape is not None:
            whole[name] = torch.zeros(shape)
    save_file(whole, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match=words):
        base.load_flux(tmp_path / "flux.safetensors")


def test_gguf_and_other_folders_are_refused(tmp_path):
    (tmp_path / "flux.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="GGUF file.*--base.precision nf4"):
        base.load_flux(tmp_path / "flux.gguf")
    with pytest.raises(ValueError, match="has no transformer/config.json"):
        base.load_flux(tmp_path)
    for config, words in (({"_class_name": "Flux2Transformer2DModel"}, "is FLUX.2, not FLUX.1"),
                          ({"_class_name": "FluxTransformer2DModel", "quantization_config": {}}, "is quantised already")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            base.load_flux(tmp_path)


def test_a_precision_without_its_library_is_refused(monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    for precision, library in base.LIBRARY.items():
        with pytest.raises(ValueError, match=f"needs {library}; install it"):
            base.check_precision(precision)
    base.check_precision("bf16")


def gradient(flux, checkpointed: bool = False) -> torch.Tensor:
    """Of a loss with respect to the embedding, through the masked attention."""
    attention = attend_by_region(flux)
    attention.regions = regions_for(PRESETS["tree64"], (4, 4), torch.device("cpu"))
    flux.gradient_checkpointing = False
    if checkpointed:
        flux.enable_gradient_checkpointing()
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 64, 64, generator=draw).requires_grad_()
    out = velocity(flux, torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([0.3, 0.8]), tokens, torch.zeros(2, 32), torch.ones(2))
    (out.float() * torch.randn(out.shape, generator=draw)).sum().backward()
    assert all(p.grad is None for p in flux.parameters())
    return tokens.grad.flatten()


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_not_quantised_is_held_in_what_is_fast(tmp_path, state, monkeypatch, fast):
    monkeypatch.setattr(machine, "fast_dtype", lambda device: fast)
    save_file(state, tmp_path / "flux.safetensors")
    dtype = torch.bfloat16 if fast is torch.bfloat16 else torch.float32
    assert {p.dtype for p in base.load_flux(tmp_path / "flux.safetensors").parameters()} == {dtype}
    pytest.importorskip("bitsandbytes")
    flux = base.load_flux(tmp_path / "flux.safetensors", "nf4")
    assert flux.x_embedder.weight.dtype is dtype and flux.transformer_blocks[0].attn.to_q.compute_dtype is dtype


@pytest.fixture(scope="module")
def reference(toy) -> torch.Tensor:
    return gradient(copy.deepcopy(toy))


# The smallest cosine between the gradient through this precision and through fp32, on random weights.
@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.9995), ("int8", 0.9995), ("nf4", 0.975)])
def test_the_gradient_keeps_its_direction_through_a_quantised_base(tmp_path, state, reference, precision, least):
    if precision in base.LIBRARY:
        pytest.importorskip(base.LIBRARY[precision])
    save_file(state, tmp_path / "flux.safetensors")
    flux = base.load_flux(tmp_path / "flux.safetensors", precision)
    held = {name: type(m.weight.data if precision == "bf16" else m.weight).__name__ for name, m in flux.named_modules()
            if hasattr(m, "weight") and m.weight is not None}
    plain = {k for k, v in held.items() if v in ("Tensor", "Parameter")}
    quantised = held.keys() - plain
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear", "transformer_blocks.0.attn.norm_q"} <= plain
    assert ("transformer_blocks.1.attn.to_q" in quantised) == ("single_transformer_blocks.0.proj_mlp" in quantised) == (precision != "bf16")
    found = gradient(flux)
    cosine = float(torch.cosine_similarity(found, reference, dim=0))
    assert cosine > least and float(found.norm() / reference.norm()) == pytest.approx(1, abs=0.05)
    assert torch.equal(gradient(flux, checkpointed=True), found), "recomputing the blocks must not change the gradient"


def test_checkpointing_gives_the_gradient_of_the_plain_path(toy, reference):
    assert torch.equal(gradient(copy.deepcopy(toy), checkpointed=True), reference)
