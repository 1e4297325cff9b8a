"""Stage 4: the miniature's adapter, trained through the frozen tiny Flux."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.adapter import Adapter, AdapterConfig
from ...kernels.precision import autocast
from ..config import RunConfig
from ..engine import Step, compile_blocks, launch
from ..files import file_hash
from ..objectives.reconstruct import AdapterObjective, AdapterTraining, Batch, load_adapter, named_hierarchy
from .base import load_base, sample, training_text
from .drawing import draw
from .parser import parse
from .scenes import generator, scene
from .score import colour_position, f1, strict
from .stored import take, training_latents, training_scenes
from .text import encode, token_ids
from .towers import read_tower, save_tower, unit_images
from .vae import load_vae, to_pixels

VALIDATED = 48  # number of scenes of a validation


@dataclass(frozen=True)
class Config:
    run: RunConfig
    flux: Path
    text: Path
    vae: Path
    towers: tuple[Path, ...]
    """Files of the vision towers."""
    export: Path
    export_dinov2: Path
    """The adapter's own DINOv2 tower, with its last blocks tuned."""
    cache: Path
    """Folder of what is made once of the training scenes."""
    table: str = "tree128"
    """The full query table: a preset or global<n>."""
    validate: str = "tree128"
    """The preset that validation reconstructs with."""
    width: int = 128
    heads: int = 4
    layers: int = 12
    scenes: int = 160_000
    """Number of distinct training scenes, which are visited again and again."""
    crowds: int = 0
    """Number of crowded ones beside them."""
    start: Path | None = None
    """An exported adapter of the same sizes to go on from; None: a new one."""
    objective: AdapterTraining = field(default_factory=AdapterTraining)


class AdapterStage:
    name = "adapter"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        flux, text, base = load_base(config.flux, config.text, device)
        self.mu = base["config"]["sampling_shift_mu"]
        self.vae = load_vae(config.vae, device)
        self.towers = {t.config.id: t for t in (read_tower(p, device) for p in config.towers)}
        self.scenes = training_scenes(config.scenes, config.crowds, config.cache, device)
        self.latents = training_latents(config.vae, self.scenes, config.cache, device)
        table = named_hierarchy(config.table)
        adapter = Adapter(AdapterConfig(table.to_json(), tuple(t.config for t in self.towers.values()), config.width,
                                        config.heads, config.layers, flux.config.joint_attention_dim)).to(device)
        if config.start:
            adapter.load_state_dict(load_adapter(config.start, device)[0].state_dict())
        with torch.no_grad():
            words = [training_text(self.scenes[n], generator("train", n, purpose=100), 0.0)
                     for n in range(min(512, len(self.scenes)))]
            context = torch.cat([encode(text, token_ids(words[i:i + 64], device))[0] for i in range(0, len(words), 64)])
            adapter.set_text_statistics(context.mean((0, 1)), context.std((0, 1)))
        attention = next(iter(flux.attn_processors.values()))
        self.objective = AdapterObjective(flux, attention, adapter, self.towers, config.objective)
        if config.run.compile:
            compile_blocks(adapter.layers, flux.transformer_blocks, flux.single_transformer_blocks)
        # The tower's last blocks are trainables from the start, so that checkpoints keep their shape. They learn late.
        self.tuned = nn.ParameterList(self.objective.unlock())
        self.trainables = nn.ModuleDict({"adapter": adapter, "tuned": self.tuned})
        self.frozen = {"flux": flux, "vae": self.vae, **self.towers}
        self.identity = {"flux": file_hash(config.flux), "text": file_hash(config.text), "vae": file_hash(config.vae),
                         "towers": {name: file_hash(path) for name, path in zip(self.towers, config.towers)},
                         **({"start": file_hash(config.start)} if config.start else {})}

    @property
    def adapter(self) -> Adapter:
        return self.trainables["adapter"]

    def scales(self, step: int) -> dict[str, float]:
        settings = self.config.objective
        late = step >= settings.unlock * self.config.run.planned
        return {"tuned": settings.unlock_scale if late else 0.0}

    def loss(self, step: Step):
        numbers = np.random.default_rng([step.seed, 7, step.number]).integers(len(self.scenes), size=step.batch)
        numbers = numbers[step.positions]
        images = (draw(**{name: each.to(self.device) for name, each in self.scenes.of(numbers).items()}) + 1) / 2
        latents = take(self.latents, torch.from_numpy(numbers).to(self.device))
        return self.objective.loss(Batch(latents, images), step)

    def validate(self) -> dict[str, float]:
        truth = [scene("validation", i) for i in range(VALIDATED)]
        with autocast(self.device, self.config.run.precision):
            tokens, _ = self.adapter(self.objective.features(unit_images("validation", range(VALIDATED), self.device)),
                                     named_hierarchy(self.config.validate))
            pictures = decode(self.objective, self.vae, tokens, self.config.validate, self.mu)
        found = [parse(p) for p in pictures]
        return {"f1": f1(truth, found, strict), "f1_colour_position": f1(truth, found, colour_position)}

    def export(self, step: int) -> None:
        config = self.config
        dinov2 = next(t for t in self.towers.values() if t.config.kind == "dinov2")
        save_tower(config.export_dinov2, dinov2.config, dinov2.model, step)
        checkpoint.save(
            config.export, self.adapter.state_dict(), kind="adapter", config=self.adapter.config.to_json(), step=step,
            dtype=torch.int8, hierarchy=list(self.adapter.config.hierarchy), masked=config.objective.masked,
            widths={"text": self.adapter.config.out_dim, "pooled": self.objective.flux.config.pooled_projection_dim},
            base_sha256=file_hash(config.flux), dinov2_sha256=file_hash(config.export_dinov2), licence="Apache-2.0")


@torch.no_grad()
def decode(objective: AdapterObjective, vae, tokens: Tensor, preset: str, mu: float, seed: int = 0) -> np.ndarray:
    """Pictures [B, 128, 128, 3] uint8 that the frozen Flux paints from embeddings of one preset."""
    noise = torch.randn(len(tokens), 8, 16, 16, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
    objective.attention.regions = objective.regions(named_hierarchy(preset), (8, 8), tokens.device)
    pooled = tokens.new_zeros(len(tokens), objective.flux.config.pooled_projection_dim)
    x = sample(objective.flux, [(tokens, pooled)], [1.0], noise, mu=mu)
    return to_pixels(vae.decode(x).sample)


def run(config: Config) -> bool:
    return launch(AdapterStage, config)
