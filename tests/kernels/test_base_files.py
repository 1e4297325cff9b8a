"""What a base's record says of its network is what its tensors say: against diffusers' and transformers' own networks."""

from __future__ import annotations

import copy

import pytest
import torch
from semantic_diffusion_adapter.kernels import base_files, checkpoint
from semantic_diffusion_adapter.tests.kernels.fuzz import BASE
from transformers import T5Config, T5EncoderModel


def shapes(module) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("changes", [{}, {"layers_per_block": 2, "block_out_channels": [32, 64, 96, 128], "use_quant_conv": True},
                                     {"block_out_channels": [32], "down_block_types": ["DownEncoderBlock2D"],
                                      "up_block_types": ["UpDecoderBlock2D"], "use_post_quant_conv": True}])  # fmt: skip
def test_the_tensors_of_a_vae_are_diffusers(changes):
    diffusers = pytest.importorskip("diffusers")
    config = BASE["vae"] | changes
    assert base_files.VAEConfig(**config).shapes() == shapes(diffusers.AutoencoderKL(**config))


@pytest.mark.parametrize("changes", [{}, {"num_layers": 1, "d_kv": 7, "relative_attention_num_buckets": 16}])
def test_the_tensors_of_a_text_encoder_are_transformers(changes):
    config = BASE["text_encoder"] | {"t5": BASE["text_encoder"]["t5"] | changes}
    assert base_files.TextEncoderConfig(**config).shapes() == shapes(T5EncoderModel(T5Config(**config["t5"])))


def test_the_shipped_base_is_read(miniature):
    for kind, name in (
        ("flux", "diffusion_models/miniature_flux"),
        ("vae", "vae/miniature_vae"),
        ("text_encoder", "text_encoders/miniature_t5"),
    ):
        tensors, record = base_files.load(miniature / f"{name}.safetensors", kind)
        assert tensors and record["kind"] == kind


def changed(config: dict, where: str, value) -> dict:
    config = copy.deepcopy(config)
    *path, last = where.split(".")
    inner = config
    for key in path:
        inner = inner[key]
    inner[last] = value
    return config


@pytest.mark.parametrize(
    ("kind", "where", "value", "message"),
    [
        ("flux", "depth", 10**8, "says 100000000 for 'depth'"), ("flux", "depth", 2, "lacks 'double_blocks.1"),
        ("flux", "num_heads", 3, "cannot have the axes"), ("flux", "num_heads", 4, "cannot have the axes"),
        ("flux", "axes_dim", [4, 3, 1], "cannot have the axes"), ("flux", "qkv_bias", False, "qkv.bias', which its record does not imply"),
        ("flux", "guidance_embed", True, "lacks 'guidance_in"), ("flux", "theta", True, "says True for 'theta'"),
        ("flux", "latent.scale", 0.0, "says 0.0 for 'latent.scale'"), ("flux", "latent", None, "for 'latent'"),
        ("flux", "context_in_dim", 13, "other shapes than its record says"), ("flux", "future", 1, "update the pack"),
        ("vae", "block_out_channels", [32] * 3, "needs as many down and up blocks"), ("vae", "norm_num_groups", 5, "norms of 5 groups"),
        ("vae", "latent_channels", 2**40, "for 'latent_channels'"), ("vae", "layers_per_block", 2, "lacks"),
        ("vae", "down_block_types", ["owner/block"] * 4, "for 'down_block_types.0'"), ("vae", "in_channels", 4, "for 'in_channels'"),
        ("text_encoder", "t5.num_layers", 3, "lacks 'encoder.block.2"), ("text_encoder", "vocabulary", ["a"] * 5, "has 1 different ones"),
        ("text_encoder", "length", -1, "says -1 for 'length'"), ("text_encoder", "t5.auto_map", {}, "has the field 't5.auto_map'"),
        ("text_encoder", "t5.d_kv", 10**6, "for 't5.d_kv'"),
    ],
)  # fmt: skip
def test_a_record_that_belies_its_tensors_is_refused(tmp_path, kind, where, value, message):
    state = {name: torch.zeros(shape) for name, shape in base_files.CONFIGS[kind](**BASE[kind]).shapes().items()}
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, state, kind, BASE[kind])
    assert base_files.load(path, kind)[0].keys() == state.keys()
    checkpoint.save(path, state, kind, changed(BASE[kind], where, value))
    with pytest.raises(ValueError, match=message) as caught:
        base_files.load(path, kind)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
