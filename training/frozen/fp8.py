"""Weights in 8-bit floats, dequantised: ComfyUI's layouts with a scale beside each weight, and plain casts.

<layer>.weight is in float8. The older layout has `scale_weight` and `scale_input` beside it, and one `scaled_fp8` for
the file. The newer layout has `weight_scale`, `input_scale` and `comfy_quant` (JSON in bytes; or
`_quantization_metadata` in the file's header for all layers at once). A layer without a scale was cast as it is. Layers
of any other float may stand beside. Scales of inputs are for products in float8, which nothing here computes.
"""
from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ...kernels import header, schema

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
SCALES = (".weight_scale", ".scale_weight")
ASIDE = (*SCALES, ".input_scale", ".scale_input", ".comfy_quant")


def formats(path: Path, state: dict[str, Tensor], prefix: str) -> dict[str, str]:
    """{layer: the format that the file names for it}. ValueError where the names cannot be read."""
    try:
        whole = header.read(path).metadata.get("_quantization_metadata")
        layers = schema.read_json(whole)["layers"] if whole else {}
        found = {name.removeprefix(prefix): layer["format"] for name, layer in layers.items()}
        return found | {name[:-12]: json.loads(bytes(value.tolist()))["format"]
                        for name, value in state.items() if name.endswith(".comfy_quant")}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} says of its quantisation what nobody can read; download it again, or give the "
                         "bf16 file.") from None


def unscaled(path: Path, state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file, with every scale multiplied into its weight, in bf16; the others as they are.

    state: names without the prefix that the file's header may give to layers. Raises ValueError for a format that is
    not float8, and for a scale that belongs to no weight or does not fit it.
    """
    named = formats(path, state, prefix)
    for name in named.values():
        if name not in FORMATS:
            raise ValueError(f"{path} is quantised to {schema.short(name)}, which is not read here; give the bf16, "
                             "fp16 or fp8 file.")
    out = {name: value for name, value in state.items() if not name.endswith(ASIDE) and name != "scaled_fp8"}
    for layer, name in named.items():
        weight = out.get(f"{layer}.weight")
        if weight is not None and weight.dtype == torch.uint8:  # early files store it so
            out[f"{layer}.weight"] = weight.view(FORMATS[name])
    for name, scale in state.items():
        if not name.endswith(SCALES):
            continue
        weight = f"{name.rpartition('.')[0]}.weight"
        value = out.get(weight)
        if value is None or value.dtype not in FORMATS.values():
            raise ValueError(f"{path} has {name} and beside it no weight in float8; download it again.")
        if scale.numel() not in (1, len(value)):
            raise ValueError(f"{path} has {name} of shape {list(scale.shape)} for a weight of {list(value.shape)}; "
                             "scales by block are not read here, give the bf16, fp16 or plain fp8 file.")
        rows = scale.float().reshape(-1, *[1] * (value.ndim - 1))
        out[weight] = (value.float() * rows).bfloat16()
    return out
