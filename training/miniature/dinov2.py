"""Stage 3b: a tiny DINOv2, trained to paint masked patches (SimMIM, arXiv 2111.09886) and to name every patch.

DINOv2's own self-distillation needs more images than a laptop can train on. The adapter needs the same from this tower:
dense features that say what is where.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.vision.towers import build_tower
from ..config import RunConfig
from ..engine import Ahead, Step, launch
from .drawing import codes, draw, labels
from .scenes import scene
from .stored import Scenes, training_scenes
from .towers import DINOV2, save_tower


@dataclass(frozen=True)
class Config:
    run: RunConfig
    export: Path
    cache: Path
    """Folder of what is made once of the training scenes."""
    scenes: int = 160_000
    """Number of distinct training scenes, which are visited again and again."""
    crowds: int = 0
    """Number of crowded ones beside them."""
    masked: float = 0.25
    """Share of patches replaced by the mask token, in half of the images."""
    names: float = 0.3
    """Weight of naming each patch's colours and shapes, beside painting its pixels."""


def prepare(config: Config, scenes: Scenes, step: Step) -> dict[str, Tensor]:
    """The codes of a step's scenes, and which of their patches are masked: [B, 64] bool."""
    numbers = (step.rand() * len(scenes)).long().tolist()
    mask = step.rand(64) < config.masked
    mask[[position < step.batch // 2 for position in step.positions]] = False
    return {"mask": mask, **scenes.of(numbers)}


class Dinov2Stage:
    name = "dinov2"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.tower = build_tower(DINOV2).to(device)
        pixels = 3 * DINOV2.patch ** 2
        self.trainables = nn.ModuleDict({"model": self.tower.model, "paint": nn.Linear(DINOV2.width, pixels),
                                         "name": nn.Linear(DINOV2.width, 15)}).to(device)
        scenes = training_scenes(config.scenes, config.crowds, config.cache, device)
        self.ahead = Ahead(partial(prepare, config, scenes), device, config.run.workers)
        self.identity: dict = {}

    def losses(self, things: Tensor, grounds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x, truth = self.tower.preprocess((draw(things, grounds) + 1) / 2), labels(things, grounds)
        features = self.trainables["model"](x, bool_masked_pos=mask).last_hidden_state[:, 1:]
        patches = F.unfold(x, DINOV2.patch, stride=DINOV2.patch).transpose(1, 2)
        painted = (self.trainables["paint"](features).float() - patches).abs().mean()
        colours, shapes = self.trainables["name"](features).float().split([10, 5], -1)
        named = (-(truth[..., :10] * colours.log_softmax(-1)).sum(-1)
                 - (truth[..., 10:] * shapes.log_softmax(-1)).sum(-1))
        return painted, named.mean()

    def loss(self, step: Step):
        painted, named = self.losses(**self.ahead(step))
        return painted + self.config.names * named, {"painted": painted, "named": named}

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        held = codes([scene("validation", index) for index in range(128)])
        painted, named = self.losses(**{name: each.to(self.device) for name, each in held.items()}, mask=None)
        return {"painted": float(painted), "named": float(named)}

    def export(self, step: int) -> None:
        save_tower(self.config.export, DINOV2, self.trainables["model"], step)


def run(config: Config) -> bool:
    return launch(Dinov2Stage, config)
