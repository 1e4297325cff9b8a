"""Stage 3a: a tiny open_clip CLIP, trained with open_clip's own contrastive loss on scenes and captions."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch

from ...kernels.vision.towers import VisionTower
from ..config import RunConfig
from ..engine import Step, launch
from .captions import LENGTH, VOCABULARY, caption
from .scenes import generator, scene
from .text import token_ids
from .towers import CLIP, save_tower, unit_images

TEXT = dict(context_length=LENGTH, vocab_size=len(VOCABULARY), width=128, heads=4, layers=2, pool_type="eos", eos_id=1)


@dataclass(frozen=True)
class Config:
    run: RunConfig
    export: Path
    scenes: int = 200_000


class ClipStage:
    name = "clip"
    whole_batch = True  # every text is contrasted with all the others

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.trainables = open_clip.CLIP(text_cfg=TEXT, **CLIP.architecture).to(device)
        self.tower = VisionTower(CLIP)  # for its resize and normalisation
        self.contrastive = open_clip.ClipLoss()
        self.identity: dict = {}

    def encode(self, split: str, indices, visit: int):
        pixels = self.tower.preprocess(unit_images(split, indices, self.device))
        words = []
        for index in indices:
            rng = generator(split, int(index), purpose=500 + visit)
            words.append(caption(scene(split, int(index)), rng, fine=rng.random() < 0.5))
        picture, text, scale = self.trainables(pixels, token_ids(words, self.device))
        return picture.float(), text.float(), scale.float()

    def loss(self, step: Step):
        index = (step.rand() * self.config.scenes).long().tolist()
        picture, text, scale = self.encode("train", index, step.number % 1000)
        loss = self.contrastive(picture, text, scale)
        return loss, {"scale": scale}

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        picture, text, _ = self.encode("validation", range(128), 0)
        hit = (picture @ text.T).argmax(1) == torch.arange(128, device=self.device)
        return {"retrieval_of_128": float(hit.float().mean())}

    def export(self, step: int) -> None:
        save_tower(self.config.export, CLIP, self.trainables.visual, step)


def run(config: Config) -> bool:
    return launch(ClipStage, config)
