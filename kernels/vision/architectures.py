"""What the record of a vision tower may say of its network: fields that describe an architecture, and nothing else.

The libraries that build the networks take much more: names of models on the network, folders, kernels to download, code
to run. A file may come from anybody, so whatever is not listed here is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from .. import schema
from ..schema import Flag, Heads, Layers, Patch, Positive, Side, Width, whole


class _ClipVision(schema.Closed):
    """open_clip's own vision transformer (its CLIPVisionCfg)."""

    image_size: Side
    patch_size: Patch
    layers: Layers
    width: Width
    head_width: Width
    mlp_ratio: Positive = 4.0


class _TimmVision(schema.Closed):
    """timm's SigLIP under open_clip: a registered model's name, no address (`hf-hub:`, `local-dir:`) and no tag."""

    image_size: Side
    timm_model_name: Annotated[
        str, StringConstraints(max_length=64, pattern=r"^vit_[a-z0-9]+_patch[0-9]+_siglip_[0-9]+$")
    ]
    timm_model_pretrained: Literal[False] = False
    timm_pool: Literal["map"]
    timm_proj: Literal["none"]


class _OpenClip(schema.Closed):
    embed_dim: Width
    quick_gelu: Flag = False
    vision_cfg: dict[str, Any]  # one of the two above


class _Dinov2(schema.Closed):
    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    image_size: Side
    patch_size: Patch
    mlp_ratio: whole(1, 16) = 4
    use_swiglu_ffn: Flag = False
    num_register_tokens: whole(0, 64) = 0


class _InternVit(schema.Closed):
    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    intermediate_size: Width
    image_size: tuple[Side, Side]
    patch_size: tuple[Patch, Patch]
    attention_bias: Flag = False
    use_qk_norm: Flag = False
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"


_KINDS = {"open_clip": _OpenClip, "dinov2": _Dinov2, "internvit": _InternVit}
KINDS = tuple(_KINDS)


def check_architecture(kind: str, architecture: dict[str, Any], what: str) -> None:
    """ValueError, beginning with `what`, for a field of `architecture` that is unknown or out of bounds."""
    read = schema.parse(_KINDS[kind], architecture, what)
    if isinstance(read, _OpenClip):
        vision = _TimmVision if "timm_model_name" in read.vision_cfg else _ClipVision
        schema.parse(vision, read.vision_cfg, f"{what} (vision_cfg)")
