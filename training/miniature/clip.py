"""Stage 3a: a tiny open_clip CLIP, trained with open_clip's own contrastive loss on scenes and captions."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from ...kernels.vision.towers import VisionTower
from ..config import RunConfig
from ..engine import Ahead, Step, launch
from .captions import LENGTH, VOCABULARY, caption
from .drawing import codes, draw
from .scenes import Scene, generator, scene
from .stored import Scenes, training_scenes
from .text import token_ids
from .towers import CLIP, save_tower

TEXT = dict(context_length=LENGTH, vocab_size=len(VOCABULARY), width=128, heads=4, layers=2, pool_type="eos", eos_id=1)


@dataclass(frozen=True)
class Config:
    run: RunConfig
    export: Path
    cache: Path
    """Folder of what is made once of the training scenes."""
    scenes: int = 160_000
    """Number of distinct training scenes, which are visited again and again."""


def captions(scenes: Iterable[tuple[int, Scene]], split: str, visit: int) -> Tensor:
    """Token ids [B, L] of numbered scenes of a split, differently worded at each visit."""
    words = []
    for number, truth in scenes:
        rng = generator(split, number, purpose=500 + visit)
        words.append(caption(truth, rng, fine=rng.random() < 0.5))
    return token_ids(words)


def prepare(scenes: Scenes, step: Step) -> dict[str, Tensor]:
    """Token ids [B, L] of captions, and the codes of their scenes."""
    numbers = (step.rand() * len(scenes)).long().tolist()
    return {"ids": captions(((n, scenes[n]) for n in numbers), "train", step.number % 1000), **scenes.of(numbers)}


class ClipStage:
    name = "clip"
    whole_batch = True  # every text is contrasted with all the others

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.trainables = open_clip.CLIP(text_cfg=TEXT, **CLIP.architecture).to(device)
        self.tower = VisionTower(CLIP)  # for its resize and normalisation
        self.contrastive = open_clip.ClipLoss()
        scenes = training_scenes(config.scenes, 0, config.cache, device)
        self.ahead = Ahead(partial(prepare, scenes), device, config.run.workers)
        self.identity: dict = {}

    def encode(self, made: dict[str, Tensor]):
        pixels = self.tower.preprocess((draw(made["things"], made["grounds"]) + 1) / 2)
        picture, text, scale = self.trainables(pixels, made["ids"])
        return picture.float(), text.float(), scale.float()

    def loss(self, step: Step):
        picture, text, scale = self.encode(self.ahead(step))
        loss = self.contrastive(picture, text, scale)
        return loss, {"scale": scale}

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        scenes = [scene("validation", index) for index in range(128)]
        made = {"ids": captions(enumerate(scenes), "validation", 0), **codes(scenes)}
        picture, text, _ = self.encode({name: each.to(self.device) for name, each in made.items()})
        hit = (picture @ text.T).argmax(1) == torch.arange(128, device=self.device)
        return {"retrieval_of_128": float(hit.float().mean())}

    def export(self, step: int) -> None:
        save_tower(self.config.export, CLIP, self.trainables.visual, step)


def run(config: Config) -> bool:
    return launch(ClipStage, config)
