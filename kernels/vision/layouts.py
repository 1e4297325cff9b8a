"""Key layouts of public encoder files, brought to the layout of the library class that we build."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Where the image half sits inside a whole model's file, longest first.
_PREFIXES = {
    "open_clip": ("visual.",),
    "dinov2": ("dinov2_with_registers.", "dinov2."),
    "internvit": ("model.vision_tower.", "vision_tower.", "vision_model."),
}

# OpenGVLab's own InternViT names -> transformers' InternVLVisionModel, applied in this order.
_INTERNVIT_NAMES = (
    ("encoder.layers.", "encoder.layer."),
    ("embeddings.class_embedding", "embeddings.cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
)

# DINOv2's published files -> the names in newer releases of transformers, which load and write the published ones too.
_DINOV2_NAMES = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
    ".mlp.weights_out.": ".mlp.down_proj.",
}
_GATED = (".mlp.weights_in.", (".mlp.gate_proj.", ".mlp.up_proj."))


def library_layout(kind: str, state_dict: dict[str, Tensor], wanted: Iterable[str] = ()) -> dict[str, Tensor]:
    """The image half of `state_dict` under the keys of the class built for a tower of this kind; tensors not copied.

    wanted: the keys of that class, whose names differ between releases of its library.
    """
    for prefix in _PREFIXES[kind]:
        if any(name.startswith(prefix) for name in state_dict):
            state_dict = {name[len(prefix) :]: t for name, t in state_dict.items() if name.startswith(prefix)}
            break
    if kind == "internvit" and any(name.startswith("encoder.layers.") for name in state_dict):
        return _internvit(state_dict)
    if kind == "dinov2":
        return _dinov2(state_dict, newer=any(".attention.q_proj." in name for name in wanted))
    return state_dict


def _dinov2(state_dict: dict[str, Tensor], newer: bool) -> dict[str, Tensor]:
    fused, parts = _GATED
    result = {}
    for name, tensor in state_dict.items():
        for published, other in _DINOV2_NAMES.items():
            name = name.replace(published, other) if newer else name.replace(other, published)
        if newer and fused in name:
            result |= {name.replace(fused, part): chunk for part, chunk in zip(parts, tensor.chunk(2))}
        elif not newer and parts[0] in name and name.replace(*parts) in state_dict:
            result[name.replace(parts[0], fused)] = torch.cat([tensor, state_dict[name.replace(*parts)]])
        elif newer or parts[1] not in name:
            result[name] = tensor
    return result


def _internvit(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state_dict.items():
        for old, new in _INTERNVIT_NAMES:
            name = name.replace(old, new)
        if ".attention.qkv." in name:
            for part, chunk in zip("qkv", tensor.chunk(3)):
                result[name.replace(".qkv.", f".{part}_proj.")] = chunk
        else:
            result[name] = tensor
    return result
