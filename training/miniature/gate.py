"""Stage 6: the miniature's gate LoRA, from edits of random scenes to a Flux that reads the source picture by a gate."""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.precision import autocast
from ..config import RunConfig
from ..engine import Ahead, Step, compile_blocks, launch
from ..files import file_hash
from ..objectives.gate import GateObjective, GateTraining, add_gate_lora, lora_state
from ..objectives.lora import Learned
from ..objectives.reconstruct import load_adapter, named_hierarchy
from .base import load_flux
from .drawing import codes, draw
from .editor import change_of, random_edit
from .stored import Scenes, training_scenes
from .towers import read_tower
from .vae import load_vae

VALIDATED = 96  # number of edits of a validation


@dataclass(frozen=True)
class Config:
    run: RunConfig
    flux: Path
    vae: Path
    adapter: Path
    towers: tuple[Path, ...]
    """Files of the adapter's vision towers."""
    export: Path
    cache: Path
    """Folder of what is made once of the training scenes."""
    presets: tuple[str, ...] = ("tree128", "tree64")
    scenes: int = 64_000
    objective: GateTraining = field(default_factory=GateTraining)


def prepare(scenes: Scenes, step: Step) -> dict[str, Tensor]:
    """The codes of the scenes of a step's edits, sources before targets."""
    changes = []
    for position, (where,) in zip(step.positions, step.rand(1).tolist()):
        rng = np.random.default_rng([step.seed, 37, step.number, position])
        changes.append(random_edit(scenes[int(where * len(scenes))], rng))
    return codes([c.source for c in changes] + [c.target for c in changes])


class GateStage:
    name = "gate"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.flux, _ = load_flux(config.flux, device)
        add_gate_lora(self.flux, config.objective.rank)
        self.vae = load_vae(config.vae, device)
        self.adapter, kept = load_adapter(config.adapter, device)
        self.towers = {t.config.id: t for t in (read_tower(p, device) for p in config.towers)}
        self.objective = GateObjective(self.flux, config.objective, kept["masked"])
        self.trainables = nn.ModuleDict({"lora": Learned(self.flux)})
        self.frozen = {"flux": self.flux, "vae": self.vae, "adapter": self.adapter, **self.towers}
        scenes = training_scenes(config.scenes, 0, config.cache, device)
        self.ahead = Ahead(partial(prepare, scenes), device, config.run.workers)
        self.identity = {"flux": file_hash(config.flux), "vae": file_hash(config.vae), "adapter": file_hash(config.adapter),
                         "towers": {name: file_hash(path) for name, path in zip(self.towers, config.towers)}}
        if config.run.compile:
            compile_blocks(self.adapter.layers, self.flux.transformer_blocks, self.flux.single_transformer_blocks)

    def losses(self, made: dict[str, Tensor], preset: str, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        hierarchy = named_hierarchy(preset)
        with torch.no_grad():
            images = draw(made["things"], made["grounds"])
            latents = self.vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
            source, target = (((images + 1) / 2).chunk(2))
            tokens = self.adapter({k: tower(target) for k, tower in self.towers.items()}, hierarchy)[0].float()
        reference, x0 = latents.chunk(2)
        return self.objective.loss(tokens, None, hierarchy, (source, target), reference, x0, step)

    def loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        presets = self.config.presets
        preset = presets[int(torch.randint(len(presets), (), generator=step.shared()))]
        return self.losses(self.ahead(step), preset, step)

    def scales(self, step: int) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The parts of the loss over held-out edits, with the same noise at every validation."""
        changes = [change_of("validation", i) for i in range(VALIDATED)]
        held = {name: each.to(self.device) for name, each in
                codes([c.source for c in changes] + [c.target for c in changes]).items()}
        step = Step(0, 1, 0, "validation", self.device, range(VALIDATED), VALIDATED)
        with autocast(self.device, self.config.run.precision):
            _, parts = self.losses(held, "tree128", step)
        return {name: float(value) for name, value in parts.items()}

    def export(self, step: int) -> None:
        config = self.config
        checkpoint.save(config.export, lora_state(self.flux), kind="gate_lora", config={"rank": config.objective.rank},
                        dtype=torch.float16, step=step, base_sha256=file_hash(config.flux),
                        adapter_sha256=file_hash(config.adapter), licence="Apache-2.0")


def run(config: Config) -> bool:
    return launch(GateStage, config)
