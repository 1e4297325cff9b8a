"""Stage 2a: the text encoder alone learns to say what is where, before Flux learns to paint it.

Two readers look at the encoding. A small transformer decoder with one learned query per patch names what each patch
shows. A linear map of every shape's word recalls the words about it (its size, colour and place), so that one token
holds them together. A step costs far less than one with Flux. A base that starts from this encoder is ahead at every
step of one that starts from nothing (README.md has the figures). The readers are thrown away.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import RunConfig
from ..engine import Ahead, Step, launch
from .base import name_loss, training_text
from .captions import VOCABULARY, caption
from .drawing import codes, labels
from .scenes import SHAPES, generator, scene
from .stored import Scenes, training_scenes
from .text import build_text_encoder, encode, save_text_encoder, token_ids


@dataclass(frozen=True)
class Config:
    run: RunConfig
    export: Path
    cache: Path
    """Folder of what is made once of the training scenes."""
    scenes: int = 160_000
    """Number of distinct training scenes, which are visited again and again."""
    instructions: float = 0.25
    """Share of texts that are a source caption with an instruction, as in the base."""


class Reader(nn.Module):
    """Text encoding [B, L, D] -> what each of the 64 patches shows, [B, 64, 15] logits (drawing.labels)."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(64, width) * 0.5)
        layer = nn.TransformerDecoderLayer(width, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.out = nn.Linear(width, 15)

    def forward(self, context: Tensor) -> Tensor:
        return self.out(self.decoder(self.queries.expand(len(context), -1, -1), context))


ABOUT = (-2, -1, 2, 3, 4)  # offsets of size, colour and place from a shape's word: "a small red circle at 34 88"


def recall_loss(recalled: Tensor, ids: Tensor, codes: Tensor) -> Tensor:
    """Mean squared error of the words about every shape's word. recalled [B, L, 5 W]; ids [B, L]; codes [V, W], one for
    each word of the vocabulary."""
    # The last places are padding, so rolling over the end meets no shape's word.
    about = torch.stack([ids.roll(-offset, 1) for offset in ABOUT], -1)
    shapes = torch.isin(ids, torch.tensor([VOCABULARY.index(shape) for shape in SHAPES], device=ids.device))
    error = (recalled.float().unflatten(-1, (len(ABOUT), -1)) - codes[about]).square().mean((-1, -2))
    return ((error * shapes).sum(1) / shapes.sum(1).clamp(min=1)).mean()


def prepare(config: Config, scenes: Scenes, step: Step) -> dict[str, Tensor]:
    """Token ids [B, L] of a step's texts, and the codes of their scenes."""
    numbers = (step.rand() * len(scenes)).long().tolist()
    texts = [training_text(scenes[n], generator("train", n, purpose=100 + step.number), config.instructions) for n in numbers]
    return {"ids": token_ids(texts), **scenes.of(numbers)}


class ReaderStage:
    name = "text"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        encoder = build_text_encoder()
        width = encoder.config.d_model
        self.codes = encoder.shared.weight.detach().clone().to(device)
        self.trainables = nn.ModuleDict({"text": encoder, "reader": Reader(width),
                                         "recall": nn.Linear(width, len(ABOUT) * width)}).to(device)
        scenes = training_scenes(config.scenes, 0, config.cache, device)
        self.ahead = Ahead(partial(prepare, config, scenes), device, config.run.workers)
        self.identity: dict = {}

    def read(self, ids: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        context, _ = encode(self.trainables["text"], ids)
        named = name_loss(self.trainables["reader"](context), truth)
        return named, recall_loss(self.trainables["recall"](context), ids, self.codes)

    def loss(self, step: Step):
        made = self.ahead(step)
        named, recall = self.read(made["ids"], labels(made["things"], made["grounds"]))
        return named + recall, {"named": named, "recall": recall}

    def scales(self, step: int) -> dict[str, float]:
        return {}

    def validate(self) -> dict[str, float]:
        scenes = [scene("validation", i) for i in range(256)]
        truth = labels(**{name: each.to(self.device) for name, each in codes(scenes).items()})
        figures = {}
        for name, fine in (("by_place", False), ("by_coordinates", True)):
            named, recall = self.read(token_ids([caption(s, fine=fine) for s in scenes], self.device), truth)
            figures |= {f"named_{name}": float(named), f"recall_{name}": float(recall)}
        return figures

    def export(self, step: int) -> None:
        save_text_encoder(self.config.export, self.trainables["text"], step)


def run(config: Config) -> bool:
    return launch(ReaderStage, config)
