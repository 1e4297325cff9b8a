"""`sda plan gate`: parameters, memory, FLOPs, speed and cost of `sda train gate`, before anything is bought or loaded."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ...kernels import checkpoint
from ...kernels.adapter import Adapter, AdapterConfig
from ...kernels.vision.known import KNOWN_TOWERS
from ...kernels.vision.towers import TowerConfig
from ..engine import World
from ..frozen.encoders import tower_config
from ..frozen.flux import build_flux
from ..objectives.gate import lora_layers
from ..objectives.reconstruct import named_hierarchy
from ..stages import gate_settings
from ..stages.checks import prepared
from . import costs, estimate

TUNED = "dinov2-reg-giant-378"  # stands for a tower that a run has yet to write
SHAPE = dict(width=1024, heads=16, layers=12)  # of an adapter that is not there: the recipes'


@dataclass(frozen=True)
class Config(gate_settings.Config):
    gpus: int = 1
    """Number of GPUs, over all machines."""
    gpu: Literal[tuple(estimate.CARDS)] = "h100"
    per_machine: int = 8
    price: float = 0.0
    """US dollars per hour for one card. 0: a round figure for its kind."""


class Estimate(estimate.Estimate):
    """Files that are not there yet are assumed to be FLUX.1-dev's."""

    words = "every batch has the largest preset's tokens"

    def __init__(self, config: Config):
        if config.base.precision == "auto":  # every card in the list computes bf16 fast
            config = replace(config, base=replace(config.base, precision="bf16"))
        super().__init__(config)
        known = gate_settings.check(config, World(0, config.gpus, 0, self.local, torch.device("cpu")), absent=True)
        files = ((config.base.flux, "base.flux"), (config.base.vae, "base.vae"), (config.adapter, "adapter"),
                 *((path, "vision.files") for path in config.vision.files))
        self.assumed = [f"{key} {path}" for path, key in files if path and not path.exists()]
        self.assumed += [] if prepared(config.data.index) else [f"data.index {config.data.index}"]
        with torch.device("meta"):
            self.flux = known or build_flux(costs.FLUX1_DEV)
            towers = [tower(path, name) for path, name in config.vision.named()]
            self.adapter = adapter(config, self.flux.config, towers) if config.adapter else None
        self.towers = [] if config.data.cache else towers
        self.seeing = sum(map(costs.tower_parameters, self.towers))
        self.token_counts = {named_hierarchy(preset).token_count for preset in config.presets}
        self.tokens = max(self.token_counts)
        self.layers = lora_layers(self.flux)
        self.phases = list(self.all_phases())

    def flops(self, resolution: int) -> costs.Flops:
        """The sequence holds the source's patches behind the picture's. A step that drifts computes one more forward."""
        config, patches = self.config, 2 * (resolution // 16) ** 2
        forward, backward, again = costs.flux_flops(self.flux.config, patches, self.tokens, config.base.checkpointing, pooled=False)
        lora = costs.lora_flops(self.layers, config.objective.rank, patches, self.tokens)
        forward, backward, again = forward + lora, backward + 2 * lora, again + (lora if again else 0)
        encoders = sum(map(costs.tower_flops, self.towers)) + 2 * costs.vae_flops(costs.FLUX1_VAE, resolution, resolution)
        frozen = costs.adapter_flops(self.adapter.config, self.tokens) / 3 if self.adapter else 0.0
        return costs.Flops(forward * (1 + config.objective.drift), backward, again, encoders, frozen)

    def memory(self, resolution: int) -> dict[str, float]:
        precision, checkpointing = self.config.base.precision, self.config.base.checkpointing
        return {
            "frozen base": costs.base_bytes(self.flux, precision),
            "vision towers and VAE": 2.0 * (self.seeing + costs.VAE_PARAMETERS),
            "frozen adapter": 4.0 * costs.parameters(self.adapter) if self.adapter else 0.0,
            "LoRA": 4.0 * self.learning,
            **self.learning_bytes(),
            "activations of the base": costs.activation_bytes(self.flux.config, 2 * (resolution // 16) ** 2, self.tokens, self.micro,
                                                              checkpointing, lora=True),
            "weights unpacked": costs.unpacked_bytes(self.flux, precision, checkpointing),
            "VAE at work": costs.vae_working_bytes(resolution ** 2),
            "CUDA and the allocator": estimate.RESERVE * 1e9,
        }

    @property
    def learning(self) -> int:
        return self.config.objective.rank * sum(layer.in_features + layer.out_features for layer in self.layers.values())

    def precisions(self) -> list[str]:
        return ["nf4"]

    def parameters(self) -> str:
        return f"towers {self.seeing:,.0f}; LoRA of rank {self.config.objective.rank} {self.learning:,} in {len(self.layers)} layers"


def tower(path: Path, name: str) -> TowerConfig:
    return tower_config(path, name) if path.exists() else KNOWN_TOWERS[name or TUNED]


def adapter(config: Config, flux, towers: list[TowerConfig]) -> Adapter:
    if config.adapter.exists():
        return Adapter(AdapterConfig.from_json(checkpoint.read_header(config.adapter)["config"]))
    hierarchy = named_hierarchy(max(config.presets, key=lambda name: named_hierarchy(name).token_count))
    return Adapter(AdapterConfig(hierarchy.to_json(), tuple(towers), **SHAPE, out_dim=flux.joint_attention_dim,
                                 pooled_dim=flux.pooled_projection_dim))


def run(config: Config) -> None:
    """Print the plan. ValueError for whatever `sda train gate` refuses and, after the table that shows why, where the training does
    not fit the card."""
    estimate.tell(Estimate(config))
