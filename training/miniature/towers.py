"""The miniature's two vision towers: real open_clip and DINOv2 classes at toy width, 112 px in, 8 x 8 patches out."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.vision.towers import TowerConfig, VisionTower, load_tower_file
from .vae import images

_HALF = (0.5, 0.5, 0.5)
CLIP = TowerConfig(
    id="miniature-clip", kind="open_clip", image_size=112, patch=14, width=128, mean=_HALF, std=_HALF,
    architecture={"embed_dim": 128, "quick_gelu": True,
                  "vision_cfg": {"image_size": 112, "patch_size": 14, "width": 128, "layers": 4, "head_width": 32}},
)
DINOV2 = TowerConfig(
    id="miniature-dinov2", kind="dinov2", image_size=112, patch=14, width=128, mean=_HALF, std=_HALF,
    architecture={"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 112,
                  "patch_size": 14, "mlp_ratio": 4},
)


def unit_images(split: str, indices, device: torch.device) -> Tensor:
    """Rendered scenes [N, 3, 128, 128] float32 in [0, 1], as towers take them."""
    return (images(split, indices).to(device) + 1) / 2


def save_tower(path: Path, config: TowerConfig, model: nn.Module, step: int) -> None:
    checkpoint.save(path, model.state_dict(), kind="vision_tower", config=config.to_json(), step=step,
                    dtype=torch.int8)


def read_tower(path: Path, device: torch.device) -> VisionTower:
    """A frozen tower from one of our files, in float32."""
    tower, _ = load_tower_file(path)
    return tower.float().to(device).requires_grad_(False)
