"""What the plans of trainings share: cards, the time of a step, the verdict and how it is told."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...kernels.vision.known import KNOWN_TOWERS
from ...kernels.vision.towers import TowerConfig
from ..data.index import buckets
from ..engine.compiling import GRAPHS
from . import costs


@dataclass(frozen=True)
class Card:
    memory: float
    """GB of 1e9 bytes."""
    peak: float
    """Dense bf16 TFLOP/s with fp32 sums, from the maker's data sheet."""
    price: float
    """Rent in US dollars per hour, a round figure. --price gives another."""
    link: float
    """GB/s between the cards of one machine, each way."""


CARDS = {"h100": Card(80, 989, 2.5, 450), "h200": Card(141, 989, 3.5, 450), "b200": Card(180, 2250, 5.0, 900),
         "a100": Card(80, 312, 1.5, 300), "a100-40": Card(40, 312, 1.2, 300), "l40s": Card(48, 362, 1.0, 32),
         "4090": Card(24, 165, 0.4, 32), "4080": Card(16, 97, 0.25, 32), "5090": Card(32, 209, 0.7, 64), "3090": Card(24, 71, 0.25, 32)}
NETWORK = 25.0  # GB/s of one card to other machines
# Share of the peak that a step reaches: a compiled base in bf16 the aim of this project, 33-39% is what mature trainers
# report; int8 and NF4, which cannot be compiled, by their ratio to it in unsloth's FLUX LoRA figures on one B200 (bf16
# 4.12 steps/s; int8 2.14; NF4 1.81), which fits SimpleTuner's 1 to 1.5 s a step of NF4 on a 4090.
SHARE = {"bf16": 0.40, "int8": 0.21, "nf4": 0.18, "fp32": 0.05}
EAGER = 0.8  # share of a compiled step's speed, in bf16 and fp32
RESERVE = 2.0  # GB for CUDA itself and what the allocator cannot use


@dataclass(frozen=True)
class Phase:
    """A share of the run at one resolution. bytes: by part. seconds: of one step of all GPUs together."""

    resolution: int
    share: float
    flops: costs.Flops
    bytes: dict[str, float]
    seconds: float


class Estimate:
    """All figures of a training's cost. A training says its `config`, `flux` (on the meta device), `micro`, `local` GPUs of a
    machine, `learning` (numbers that learn), `token_counts` of its batches, `assumed` files, its parameters in words, and the FLOPs
    and bytes of a phase."""

    sharded = False
    host: dict[str, float] = {}
    words = "every batch has all of the table's tokens"

    def __init__(self, config):
        self.config, self.card = config, CARDS[config.gpu]
        self.local = min(config.gpus, config.per_machine)
        self.micro = config.run.micro or config.run.batch // config.gpus

    def flops(self, resolution: int) -> costs.Flops:
        raise NotImplementedError

    def memory(self, resolution: int) -> dict[str, float]:
        raise NotImplementedError

    def all_phases(self) -> Iterator[Phase]:
        start = 0.0
        for end, *resolutions in self.config.data.resolutions:
            for resolution in map(int, resolutions):
                flops = self.flops(resolution)
                yield Phase(resolution, (end - start) / len(resolutions), flops, self.memory(resolution), self.step_seconds(flops))
            start = end

    def learning_bytes(self) -> dict[str, float]:
        """Gradients, Adam's two moments and the average of what learns, in float32; DDP keeps gradients in buckets too."""
        return {"gradients": 4.0 * self.learning * (2 if self.config.gpus > 1 else 1), "optimizer": 8.0 * self.learning,
                "average": 4.0 * self.learning}

    def step_seconds(self, flops: costs.Flops) -> float:
        config = self.config
        reached = self.card.peak * 1e12 * self.reached
        # Towers, VAE and adapter are neither compiled nor quantised, so they reach half of the usual share.
        rest = self.card.peak * 1e12 * 0.25
        samples = config.run.batch / config.gpus
        seconds = samples * (flops.base / reached + (flops.encoders + flops.adapter) / rest)
        link = NETWORK if config.gpus > self.local else self.card.link
        if config.gpus > 1:
            seconds += 2 * 4 * self.learning / (link * 1e9)
        if self.sharded:
            passes = (3 if config.base.checkpointing else 2) * samples / self.micro
            seconds += passes * costs.base_bytes(self.flux, config.base.precision) / (self.card.link * 1e9)
        return seconds

    @property
    def reached(self) -> float:
        """Share of the card's peak that the base is assumed to reach."""
        precision = self.config.base.precision
        return SHARE[precision] * (EAGER if precision in ("bf16", "fp32") and not self.config.run.compile else 1)

    @property
    def starting(self) -> float:
        """Peak GB of one card before the first step: all weights, and one layer that has yet to be quantised. The text
        encoder is read on the CPU."""
        parts, largest = self.phases[0].bytes, max(p.numel() for p in self.flux.parameters())
        whole = 0.0 if self.sharded else costs.base_bytes(self.flux, self.config.base.precision) + 4.0 * largest
        return (whole + parts["vision towers and VAE"] + 4.0 * self.learning) / 1e9 + RESERVE

    @property
    def shapes(self) -> int:
        """Number of buckets of the run. A compiled block has a graph for each pair of one and a number of tokens."""
        return len({b for pixels in self.config.data.pixels() for b in buckets(pixels)})

    @property
    def most(self) -> float:
        """Peak GB of a card, over the start and every phase."""
        return max(self.starting, *(sum(phase.bytes.values()) / 1e9 for phase in self.phases))

    @property
    def hours(self) -> float:
        return self.config.run.max_steps * sum(p.share * p.seconds for p in self.phases) / 3600

    def precisions(self) -> list[str]:
        """Of the base, smaller ones than bf16 that this training goes through."""
        return ["nf4", "int8"]

    def remedies(self) -> list[str]:
        base = self.config.base
        found = []
        if not base.checkpointing:
            found.append("base.checkpointing = true")
        if self.micro > 1:
            found.append(f"run.micro = {self.micro // 2} (the same batch in more passes)")
        if base.precision in ("bf16", "fp32"):
            first, *others = self.precisions()
            found.append(f'base.precision = "{first}"' + "".join(f' (or "{name}")' for name in others))
        if hasattr(base, "sharded") and not base.sharded and base.precision == "bf16" and self.local > 1:
            found.append("base.sharded = true")
        if max(p.resolution for p in self.phases) > 512:
            found.append("lower data.resolutions")
        return found or ["a card with more memory, or smaller vision towers"]

    def report(self) -> str:
        config, card = self.config, self.card
        lines = []
        if self.assumed:
            lines.append(f"not here yet, so taken to be FLUX.1-dev's and unchecked: {', '.join(self.assumed)}")
        lines.append(f"parameters: base {costs.parameters(self.flux):,} frozen ({config.base.precision}); {self.parameters()}")
        lines += ["", f"{'resolution':>10}{'share':>8}{'TFLOP/sample':>15}{'base':>8}{'encoders':>10}{'adapter':>9}"
                      f"{'samples/s':>12}{'TFLOP/s a card':>16}{'GB':>8}"]
        for p in self.phases:
            rate = config.run.batch / p.seconds
            lines.append(f"{p.resolution:>10}{p.share:>8.0%}{p.flops.total / 1e12:>15.2f}{p.flops.base / 1e12:>8.2f}"
                         f"{p.flops.encoders / 1e12:>10.2f}{p.flops.adapter / 1e12:>9.2f}{rate:>12.2f}"
                         f"{rate * p.flops.total / 1e12 / config.gpus:>16.0f}{sum(p.bytes.values()) / 1e9:>8.1f}")
        fullest = max(self.phases, key=lambda p: sum(p.bytes.values()))
        lines += ["", f"memory of one card at {fullest.resolution} px, micro-batches of {self.micro}:"]
        lines += [f"  {name:28}{value / 1e9:>8.2f} GB" for name, value in fullest.bytes.items()]
        lines.append(f"  {'together':28}{sum(fullest.bytes.values()) / 1e9:>8.2f} GB of {card.memory:g} on a "
                     f"{config.gpu}")
        lines.append(f"  {'before the first step':28}{self.starting:>8.2f} GB")
        lines += [f"memory of a machine at the start, {name}: {value:.1f} GB" for name, value in self.host.items()
                  if value]
        saved, slowest = costs.LEARNING * self.learning / 1e9, max(p.seconds for p in self.phases)
        micro = slowest * self.micro * config.gpus / config.run.batch
        lines.append(f"a checkpoint has {saved:.1f} GB and the slowest micro-batch takes {micro:.1f} s: after "
                     f"a SIGTERM {micro + saved:.0f} s are enough on a disk that writes 1 GB/s")
        if config.run.compile:
            shapes, counts = self.shapes, len(self.token_counts)
            lines.append(f"compiled as they first come: {shapes} buckets x {counts} numbers of tokens = {shapes * counts} graphs of each "
                         f"kind of Flux's blocks, {counts} of the adapter's")
            if shapes * counts > GRAPHS:
                lines.append(f"  beyond {GRAPHS} graphs PyTorch goes on without compiling: take fewer resolutions "
                             "or presets")
        price = config.price or card.price
        hours = self.hours
        lines += ["", f"{config.run.max_steps:,} steps of {config.run.batch} on {config.gpus} x {config.gpu}: about "
                      f"{hours:,.1f} hours, {hours * config.gpus:,.0f} GPU hours, {hours * config.gpus * price:,.0f} "
                      f"dollars at {price:g} an hour",
                  f"The model: the base in {config.base.precision}{', compiled,' if config.run.compile else ''} "
                  f"reaches {self.reached:.0%} of {card.peak:g} TFLOP/s, the rest 25%; {self.words}; reading pictures keeps up."]
        if self.most > card.memory:
            lines += ["", f"This does not fit: {self.most:.1f} GB are wanted and a {config.gpu} has "
                      f"{card.memory:g}. Change "
                          + ", or ".join(self.remedies()) + "."]
        return "\n".join(lines)


def tower(path: Path, name: str) -> TowerConfig:
    """Of a tower whose file is not there."""
    if name not in KNOWN_TOWERS:
        raise ValueError(f"There is no {path}, and vision.ids names no published encoder for it; give the file's "
                         "place or its id.")
    return KNOWN_TOWERS[name]


def tell(estimate: Estimate) -> None:
    """Print a plan. ValueError, after the table that shows why, where the training does not fit the card."""
    print(estimate.report())
    if estimate.most > estimate.card.memory:
        raise ValueError(f"This does not fit a {estimate.config.gpu}: the last lines above say what would.")
