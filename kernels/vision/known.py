"""Published vision encoders, by id. Two grids: 27 x 27 patches and 32 x 32 patches; towers of one adapter share a grid.

Facts from the model configs of open_clip, facebook/dinov2-*, google/siglip2-* and OpenGVLab/InternViT-*.
"""

from __future__ import annotations

from .towers import TowerConfig

_OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _dfn5b() -> TowerConfig:
    # Only the class token of the last layer is trained by CLIP's loss, so the patches are read one layer earlier.
    vision = {"image_size": 378, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
    architecture = {"embed_dim": 1024, "quick_gelu": True, "vision_cfg": vision}
    return TowerConfig("dfn5b-vit-h-14-378", "open_clip", architecture, 378, 14, 1280, layer=-2, **_OPENAI)


def _siglip2(patch: int, size: int) -> TowerConfig:
    # SigLIP pools by attention over the normed patches of the last layer: those are the trained features.
    vision = {
        "image_size": size,
        "timm_model_name": f"vit_so400m_patch{patch}_siglip_{size}",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    architecture = {"embed_dim": 1152, "vision_cfg": vision}
    return TowerConfig(f"siglip2-so400m-{patch}-{size}", "open_clip", architecture, size, patch, 1152, **_HALF)


def _dinov2(name: str, size: int, registers: bool) -> TowerConfig:
    # The position table is 37 x 37 (518 px); the network interpolates it to the grid of `size`.
    shape = {
        "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
        "giant": {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True},
    }[name]
    architecture = shape | {"image_size": 518, "patch_size": 14} | ({"num_register_tokens": 4} if registers else {})
    tower_id = f"dinov2-{'reg-' if registers else ''}{name}-{size}"
    return TowerConfig(tower_id, "dinov2", architecture, size, 14, shape["hidden_size"], **_IMAGENET)


def _internvit_300m() -> TowerConfig:
    architecture = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "attention_bias": True,
        "norm_type": "layer_norm",
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    return TowerConfig("internvit-300m-448", "internvit", architecture, 448, 14, 1024, **_IMAGENET)


def _internvit_6b() -> TowerConfig:
    architecture = {
        "hidden_size": 3200,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
        "attention_bias": False,
        "use_qk_norm": True,
        "norm_type": "rms_norm",
        "image_size": [448, 448],
        "patch_size": [14, 14],
    }
    return TowerConfig("internvit-6b-448", "internvit", architecture, 448, 14, 3200, **_IMAGENET)


KNOWN_TOWERS: dict[str, TowerConfig] = {
    config.id: config
    for config in (
        _dfn5b(),
        _siglip2(14, 378),
        _siglip2(16, 512),
        *(_dinov2(name, size, reg) for reg in (False, True) for name in ("large", "giant") for size in (378, 448)),
        _internvit_300m(),
        _internvit_6b(),
    )
}
