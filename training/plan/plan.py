"""`sda plan`: parameters, memory, FLOPs, speed and cost of an adapter training, before anything is bought or loaded."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..engine import World
from ..frozen.flux import build_flux
from ..frozen.text_statistics import is_statistics
from ..objectives.reconstruct import named_hierarchy
from ..stages import settings
from ..stages.adapter_export import build_adapter
from ..stages.checks import check, pictures_of, prepared
from . import costs, estimate


@dataclass(frozen=True)
class Config(settings.Config):
    gpus: int = 1
    """Number of GPUs, over all machines."""
    gpu: Literal[tuple(estimate.CARDS)] = "h100"
    per_machine: int = 8
    price: float = 0.0
    """US dollars per hour for one card. 0: a round figure for its kind."""


class Estimate(estimate.Estimate):
    """Files that are not there yet are assumed to be FLUX.1-dev's."""

    def __init__(self, config: Config):
        if config.base.precision == "auto":  # every card in the list computes bf16 fast
            config = replace(config, base=replace(config.base, precision="bf16"))
        super().__init__(config)
        known = check(config, World(0, config.gpus, 0, self.local, torch.device("cpu")), absent=True)
        files = (*((path, "vision.files") for path in config.vision.files), (config.base.vae, "base.vae"),
                 (config.base.text, "base.text"))
        self.assumed = [f"{key} {path}" for path, key in ((config.base.flux, "base.flux"), *files) if not path.exists()]
        self.plan = None
        if prepared(config.data.index):
            self.plan = pictures_of(config)[2]
        else:
            self.assumed.append(f"data.index {config.data.index}")
        with torch.device("meta"):
            self.flux = known.flux or build_flux(costs.FLUX1_DEV)
        self.towers = [known.towers.get(place) or estimate.tower(path, name)
                       for place, (path, name) in enumerate(config.vision.named())]
        self.seeing = sum(map(costs.tower_parameters, self.towers))
        with torch.device("meta"):
            self.adapter = build_adapter(config, self.flux.config, self.towers)
        self.tuned = sum(12 * t.width ** 2 * config.objective.unlock_blocks for t in self.towers if t.kind == "dinov2")
        self.tokens = named_hierarchy(config.adapter.table).token_count
        self.sharded, self.token_counts = config.base.sharded, config.objective.token_counts()
        self.phases = list(self.all_phases())

    def flops(self, resolution: int) -> costs.Flops:
        config = self.config
        base = costs.flux_flops(self.flux.config, (resolution // 16) ** 2, self.tokens, config.base.checkpointing, config.adapter.pooled)
        encoders = sum(map(costs.tower_flops, self.towers)) + costs.vae_flops(costs.FLUX1_VAE, resolution, resolution)
        return costs.Flops(*base, encoders, costs.adapter_flops(self.adapter.config, self.tokens))

    def memory(self, resolution: int) -> dict[str, float]:
        config, flux = self.config, self.flux.config
        weights = costs.base_bytes(self.flux, config.base.precision)
        if self.sharded:
            block = weights / (flux.num_layers + flux.num_single_layers)
            weights = weights / self.local + 3 * block  # the card's shard, and the blocks that are gathered
        return {
            "frozen base": weights,
            "vision towers and VAE": 2.0 * (self.seeing + costs.VAE_PARAMETERS),
            "adapter and tuned blocks": 4.0 * self.learning,
            **self.learning_bytes(),
            "activations of the base": costs.activation_bytes(flux, (resolution // 16) ** 2, self.tokens, self.micro,
                                                              config.base.checkpointing),
            "activations of the adapter": costs.adapter_activation_bytes(self.adapter.config, self.micro),
            "weights unpacked": costs.unpacked_bytes(self.flux, config.base.precision, config.base.checkpointing),
            "VAE at work": costs.vae_working_bytes(resolution ** 2),
            "CUDA and the allocator": estimate.RESERVE * 1e9,
        }

    @property
    def learning(self) -> int:
        return costs.parameters(self.adapter) + self.tuned

    @property
    def host(self) -> dict[str, float]:
        """GB of a machine's own memory that the start takes, by part. The parts come one after the other. Where the CPU
        does not compute bfloat16 fast, float32 takes twice as much."""
        text = 0.0 if is_statistics(self.config.base.text) else 2.0 * costs.T5_PARAMETERS
        base = self.local * costs.base_bytes(self.flux, "bf16") if self.sharded else 0.0
        return {"text encoder, once, by the first process": text / 1e9,
                "base, before it is cut over the cards": base / 1e9}

    @property
    def shapes(self) -> int:
        if not self.plan:
            return super().shapes
        return len({b for groups in self.plan.groups.values() for b, rows in groups.items() if len(rows) >= self.config.run.batch})

    def parameters(self) -> str:
        return (f"towers {self.seeing:,.0f}, of them {self.tuned:,} learn late; "
                f"adapter {costs.parameters(self.adapter):,}")


def run(config: Config) -> None:
    """Print the plan. ValueError for whatever `sda train adapter` refuses and, after the table that shows why, where
    the training does not fit the card."""
    estimate.tell(Estimate(config))
