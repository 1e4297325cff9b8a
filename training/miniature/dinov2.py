"""Stage 3b: a tiny DINOv2, trained to paint masked patches (SimMIM, arXiv 2111.09886) and to name every patch.

DINOv2's own self-distillation needs more images than a laptop can train on. The adapter needs the same from this tower:
dense features that say what is where.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.vision.towers import build_tower
from ..config import RunConfig
from ..engine import Step, launch
from .scenes import patch_labels, scene
from .towers import DINOV2, save_tower, unit_images


@dataclass(frozen=True)
class Config:
    run: RunConfig
    export: Path
    scenes: int = 200_000
    masked: float = 0.25
    """Share of patches replaced by the mask token, in half of the images."""
    names: float = 0.3
    """Weight of naming each patch's colours and shapes, beside painting its pixels."""


class Dinov2Stage:
    name = "dinov2"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.tower = build_tower(DINOV2).to(device)
        pixels = 3 * DINOV2.patch ** 2
        self.trainables = nn.ModuleDict({"model": self.tower.model, "paint": nn.Linear(DINOV2.width, pixels),
                                         "name": nn.Linear(DINOV2.width, 15)}).to(device)
        self.identity: dict = {}

    def losses(self, split: str, indices, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self.tower.preprocess(unit_images(split, indices, self.device))
        labels = np.stack([patch_labels(scene(split, int(i))) for i in indices])
        labels = torch.from_numpy(labels).to(self.device)
        features = self.trainables["model"](x, bool_masked_pos=mask).last_hidden_state[:, 1:]
        patches = F.unfold(x, DINOV2.patch, stride=DINOV2.patch).transpose(1, 2)
        painted = (self.trainables["paint"](features).float() - patches).abs().mean()
        colours, shapes = self.trainables["name"](features).float().split([10, 5], -1)
        named = (-(labels[..., :10] * colours.log_softmax(-1)).sum(-1)
                 - (labels[..., 10:] * shapes.log_softmax(-1)).sum(-1))
        return painted, named.mean()

    def loss(self, step: Step):
        index = (step.rand() * self.config.scenes).long().tolist()
        mask = step.rand(64) < self.config.masked
        mask[[position < step.batch // 2 for position in step.positions]] = False
        painted, named = self.losses("train", index, mask)
        return painted + self.config.names * named, {"painted": painted, "named": named}

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        painted, named = self.losses("validation", range(128), None)
        return {"painted": float(painted), "named": float(named)}

    def export(self, step: int) -> None:
        save_tower(self.config.export, DINOV2, self.trainables["model"], step)


def run(config: Config) -> bool:
    return launch(Dinov2Stage, config)
