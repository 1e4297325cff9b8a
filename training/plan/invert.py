"""`sda plan invert`: memory, time and cost of `sda invert`, before anything is bought or loaded."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...kernels import checkpoint
from ..config import Count, Whole
from ..frozen.flux import build_flux
from ..objectives.reconstruct import named_hierarchy
from ..stages import invert_settings
from ..stages.invert import PAINTED, TIMES
from . import costs
from .estimate import CARDS, EAGER, RESERVE, SHARE


@dataclass(frozen=True)
class Config(invert_settings.Config):
    pictures: Count = 1000
    """How many pictures are to be fitted."""
    edits: Whole = 0
    """How many edited pictures go on from these pictures' fits."""
    gpus: Count = 1
    """Number of GPUs. Each has a `sda invert` of its own, with a part of the pictures and another folder."""
    gpu: Literal[tuple(CARDS)] = "4080"
    price: float = 0.0
    """US dollars per hour for one card. 0: a round figure for its kind."""


class Estimate:
    """All figures of an inversion's cost. Files that are not there yet are assumed to be FLUX.1-dev's."""

    def __init__(self, config: Config):
        if config.base.precision == "auto":  # every card in the list computes bf16 fast
            config = replace(config, base=replace(config.base, precision="bf16"))
        self.config, self.card, base = config, CARDS[config.gpu], config.base
        known = invert_settings.check(config, absent=True)
        files = ((base.flux, "base.flux"), (base.vae, "base.vae"), (base.text, "base.text"),
                 (config.start_file, "start"), *((path, "vision.files") for path in config.vision.files))
        self.assumed = [f"{key} {path}" for path, key in files if path and not path.exists()]
        with torch.device("meta"):
            self.flux = known or build_flux(costs.FLUX1_DEV)
        self.patches, self.tokens = (config.resolution // 16) ** 2, self.token_count()
        self.forward, self.backward, self.again = costs.flux_flops(self.flux.config, self.patches, self.tokens,
                                                                   base.checkpointing, config.pooled)
        self.bytes = costs.fit_bytes(self.flux, base.precision, self.patches, self.tokens, config.batch,
                                     base.checkpointing)
        self.bytes["CUDA and the allocator"] = RESERVE * 1e9

    def token_count(self) -> int:
        start = self.config.start_file
        if start is not None and start.exists():
            record = checkpoint.read_header(start)
            if record["kind"] == "embedding":
                return record["config"]["tokens"]
        return named_hierarchy(self.config.preset).token_count

    @property
    def flops(self) -> float:
        """FLOPs of a picture's fit: its steps, and the losses before and after."""
        return self.flops_of(self.config.steps)

    def flops_of(self, steps: int) -> float:
        return steps * (self.forward + self.backward + self.again) + 2 * len(TIMES) * self.forward

    @property
    def reached(self) -> float:
        """Share of the card's peak that the base is assumed to reach."""
        precision = self.config.base.precision
        return SHARE[precision] * (EAGER if precision in ("bf16", "fp32") else 1)

    @property
    def seconds(self) -> float:
        """Of one picture on one card."""
        painted = min(self.config.paint, self.config.pictures) / self.config.pictures
        return self.seconds_of(self.config.steps) + painted * PAINTED * self.forward / self.speed

    @property
    def speed(self) -> float:
        """FLOPs a second of one card."""
        return self.card.peak * 1e12 * self.reached

    def seconds_of(self, steps: int) -> float:
        """Of one fit on one card."""
        seconds, limit = self.flops_of(steps) / self.speed, 60 * self.config.minutes
        return min(seconds, limit) if limit else seconds

    @property
    def hours(self) -> float:
        config = self.config
        seconds = config.pictures * self.seconds + config.edits * self.seconds_of(config.edited_steps)
        return seconds / 3600 / config.gpus

    @property
    def most(self) -> float:
        """Peak GB of a card, over the start and a step."""
        return max(self.starting, sum(self.bytes.values()) / 1e9)

    @property
    def starting(self) -> float:
        """Peak GB of a card before the first step: the weights, and one layer that has yet to be quantised."""
        largest = max(parameter.numel() for parameter in self.flux.parameters())
        return (self.bytes["frozen base"] + self.bytes["VAE"] + 4.0 * largest) / 1e9 + RESERVE

    def remedies(self) -> list[str]:
        base, found = self.config.base, []
        if not base.checkpointing:
            found.append("base.checkpointing = true")
        if self.config.batch > 1:
            found.append(f"batch = {self.config.batch // 2}")
        if base.precision != "nf4":
            found.append('base.precision = "nf4"' + (' (or "int8")' if base.precision != "int8" else ""))
        if self.config.resolution > 512:
            found.append("a lower resolution")
        return found or ["a card with more memory"]

    def report(self) -> str:
        config, card = self.config, self.card
        lines = []
        if self.assumed:
            lines.append(f"not here yet, so taken to be FLUX.1-dev's and unchecked: {', '.join(self.assumed)}")
        step = self.forward + self.backward + self.again
        lines += [f"parameters: base {costs.parameters(self.flux):,} frozen ({config.base.precision}); "
                  f"{self.tokens * self.flux.config.joint_attention_dim:,} learn for a picture ({self.tokens} tokens)",
                  f"memory of one card at {config.resolution} px, {config.batch} at once:"]
        lines += [f"  {name:28}{value / 1e9:>8.2f} GB" for name, value in self.bytes.items()]
        lines += [f"  {'together':28}{sum(self.bytes.values()) / 1e9:>8.2f} GB of {card.memory:g} on a {config.gpu}",
                  f"  {'before the first step':28}{self.starting:>8.2f} GB",
                  f"a step of a picture takes {step / 1e12:.3g} TFLOP; a picture of {config.steps} steps takes "
                  f"{self.flops / 1e12:,.4g} TFLOP and about {self.seconds:,.1f} s"]
        if config.start == "caption":
            lines.append(f"memory of the machine: text encoder, {2 * costs.T5_PARAMETERS / 1e9:.1f} GB in bf16")
        price, spent = config.price or card.price, self.hours * config.gpus
        edits = f" and {config.edits:,} edits of them" if config.edits else ""
        lines += [f"{config.pictures:,} pictures{edits} on {config.gpus} x {config.gpu}: about {self.hours:,.1f} hours, "
                  f"{spent:,.1f} GPU hours, {spent * price:,.2f} dollars at {price:g} an hour",
                  f"The model: the base in {config.base.precision} reaches {self.reached:.0%} of {card.peak:g} "
                  "TFLOP/s; encoders, the VAE and files take no time beside it."]
        if self.most > card.memory:
            lines.append(f"This does not fit: {self.most:.1f} GB are wanted and a {config.gpu} has {card.memory:g}. "
                         f"Change {', or '.join(self.remedies())}.")
        return "\n".join(lines)


def run(config: Config) -> None:
    """Print the plan. ValueError for whatever `sda invert` refuses and, after the table that shows why, where the fit
    does not fit the card."""
    estimate = Estimate(config)
    print(estimate.report())
    if estimate.most > estimate.card.memory:
        raise ValueError(f"This does not fit a {config.gpu}: the last line above says what would.")
