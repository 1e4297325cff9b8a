"""Files in 8-bit floats: every layout gives the weights that it stands for, and what is not read is named."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.files import outline  # noqa: E402
from semantic_diffusion_adapter.training.frozen import base  # noqa: E402
from semantic_diffusion_adapter.training.frozen.flux import build_flux, to_bfl  # noqa: E402

CONFIG = dict(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=2, axes_dim=[16, 56, 56], context_in_dim=64, vec_in_dim=32,
              in_channels=4, patch_size=2, guidance_embed=True)
LAYERS = ("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_mlp.2", "single_blocks.1.linear1")


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    return build_flux(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def state(toy) -> dict:
    return to_bfl(toy.state_dict())


def as_bytes(record: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)


def quantised(state: dict, dtype=torch.float8_e4m3fn, scale: str = "weight_scale", by_row: bool = False) -> dict:
    """The state with LAYERS in float8 and a scale beside each; all else in fp16."""
    out = {name: value.half() for name, value in state.items()}
    for layer in LAYERS:
        weight = state[f"{layer}.weight"]
        top = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()
        factor = top / torch.finfo(dtype).max
        out[f"{layer}.weight"], out[f"{layer}.{scale}"] = (weight / factor).to(dtype), factor
    return out


def written(path: Path, state: dict, prefix: str = "", **metadata: str) -> Path:
    save_file({prefix + name: value.contiguous() for name, value in state.items()}, path, metadata)
    return path


def layouts(state: dict) -> dict[str, tuple[dict, str, dict]]:
    """name -> (tensors, prefix, header)."""
    words = {f"{layer}.comfy_quant": as_bytes({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}) for layer in LAYERS}
    inputs = {f"{layer}.input_scale": torch.tensor(3.0) for layer in LAYERS}
    whole = json.dumps({"layers": {f"{base.PREFIX}{layer}": {"format": "float8_e4m3fn"} for layer in LAYERS}})
    e5m2 = {f"{layer}.comfy_quant": as_bytes({"format": "float8_e5m2"}) for layer in LAYERS}
    old = {**quantised(state, scale="scale_weight"), **{f"{layer}.scale_input": torch.tensor(3.0) for layer in LAYERS}}
    as_integers = {name: value.view(torch.uint8) if value.dtype == torch.float8_e4m3fn else value
                   for name, value in quantised(state).items()}
    return {
        "older": ({**old, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, "", {}),
        "newer": ({**quantised(state), **words, **inputs}, "", {}),
        "newer, in a checkpoint": ({**quantised(state), **words}, base.PREFIX, {}),
        "newer, said in the header": (quantised(state), base.PREFIX, {"_quantization_metadata": whole}),
        "by row": ({**quantised(state, by_row=True), **words}, "", {}), "bytes": ({**as_integers, **words}, "", {}),
        "e5m2": ({**quantised(state, torch.float8_e5m2), **e5m2}, "", {}),
        "cast, beside fp16": ({name: value.to(torch.float8_e5m2 if "single" in name else torch.float16)
                               for name, value in state.items()}, "", {})}


@pytest.mark.parametrize("layout", layouts({f"{layer}.weight": torch.ones(2, 2) for layer in LAYERS}))
def test_every_layout_gives_the_weights_that_it_stands_for(tmp_path, toy, state, layout):
    tensors, prefix, header = layouts(state)[layout]
    path = written(tmp_path / "flux.safetensors", tensors, prefix, **header)
    found, wanted = base.load_flux(path, "bf16").state_dict(), toy.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in found.items():  # e4m3 has three bits behind the point, e5m2 two
        error = (value.float() - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-9)
        assert error < (0.08 if "5m2" in layout or "cast" in layout else 0.04), (name, float(error))


def test_what_a_file_says_of_itself_is_checked_without_reading_it(tmp_path, state):
    tensors, prefix, header = layouts(state)["newer"]
    path = written(tmp_path / "flux.safetensors", tensors, prefix, **header)
    flux, outlined = base.skeleton(path, outline)
    assert {name: value.shape for name, value in outlined.items()} == {name: value.shape for name, value in flux.state_dict().items()}
    assert all(value.is_meta for value in outlined.values())


LAYER = LAYERS[0]


@pytest.mark.parametrize(("change", "words"), [
    ({f"{LAYER}.comfy_quant": as_bytes({"format": "nvfp4"})}, "is quantised to 'nvfp4', which is not read here; give the bf16"),
    ({f"{LAYER}.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)}, "says of its quantisation what nobody can read"),
    ({f"{LAYER}.weight_scale": torch.ones(384, 4)}, r"qkv.weight_scale of shape \[384, 4\] for a weight of \[384, 128\]"),
    ({"double_blocks.7.gone.weight_scale": torch.ones(1)}, "has double_blocks.7.gone.weight_scale and beside it no weight in float8"),
    ({f"{LAYER}.pre_quant_scale": torch.ones(128)}, "has 'double_blocks.0.img_attn.qkv.pre_quant_scale', which FLUX.1 has not"),
    ({f"{LAYER}.weight.absmax": torch.ones(8), f"{LAYER}.weight.quant_map": torch.ones(16)},
     "qkv.weight.absmax' and 1 more, which FLUX.1 has"),
    ({"txt_in.weight": torch.ones(128, 64, dtype=torch.int8)}, "has context_embedder.weight in torch.int8, which is no float"),
])
@pytest.mark.parametrize("outlined", [False, True])
def test_what_is_not_read_is_named(tmp_path, state, change, words, outlined):
    path = written(tmp_path / "flux.safetensors", {**quantised(state), **change})
    with pytest.raises(ValueError, match=words):
        base.skeleton(path, outline) if outlined else base.load_flux(path)
