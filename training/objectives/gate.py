"""A LoRA with which Flux reads a source picture by a gate: what an edit does not touch comes from the source itself.

The edited picture is learnt by flow matching under its embedding, beside the source's clean latents (as FLUX.1 Kontext takes a
reference, arXiv 2506.15742). A patch that the edit changes has its gate closed, every other one open. With some samples the
changed patches read as well, so that Flux learns to tell by the embedding which of their pixels stay. With some nothing is read,
so that it goes on painting from the embedding alone, and with some the picture itself is the source. And in some steps what is
read stands where a step of Flux itself has led, not on the straight path, so that the source can mend what earlier steps of a
painting got wrong, as in scheduled sampling (arXiv 1506.03099).
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import checkpoint
from ...kernels.attention import Regions
from ...kernels.hierarchy import Hierarchy
from ...kernels.visibility import region_bias
from ..engine.stage import Step
from ..frozen.flux import mu_of, network_time, velocity
from ..frozen.gated_attention import attend_by_gate
from .times import sample_times

# The picture's own layers; those of the text, which reads no source, stay as they were.
LAYERS = r".*transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|proj_mlp|proj_out)"
SOONEST = 0.1  # the time within which a drift is mended at the latest: nearer to 0 the target would grow without bound


@dataclass(frozen=True)
class GateTraining:
    rank: int = 16
    """Rank of the LoRA."""
    threshold: float = 0.1
    """Smallest difference of a channel, 0 to 1, that counts as a change of a pixel. JPEG's noise stays below it."""
    grow: int = 1
    """By up to so many patches the closed area is larger than the change, at random for each batch, as a mask is that was not drawn
    by hand."""
    closed: float = 0.1
    """Share of the samples that read nothing."""
    partly: float = 0.4
    """Share of the samples whose changed patches read too, by a gate between 0 and 1 that is drawn for each sample."""
    itself: float = 0.2
    """Share of the samples whose source is the edited picture itself."""
    drift: float = 0.5
    """Share of the training steps in which the reading patches begin where a step from an earlier time has led. Such a step costs
    one more forward."""
    mu: float | Literal["resolution"] = "resolution"
    """Time shift of training. "resolution": the shift that Flux itself samples with."""
    uniform: float = 0.2
    """Share of uniform times beside the shifted logit-normal ones."""
    guidance: float = 1.0
    """Guidance that a guidance-distilled base (FLUX.1-dev) is given. At 1.0 it predicts the plain velocity."""

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"A LoRA has a rank of at least 1, not {self.rank}; give rank another value.")
        shares = (self.closed, self.partly, self.itself)
        if not (min(shares) >= 0 and sum(shares) <= 1):
            raise ValueError("closed {}, partly {} and itself {} are shares of the samples; they add up to at most 1.".format(*shares))
        if not 0 <= self.drift <= 1:
            raise ValueError(f"drift {self.drift} is a share of the training steps: give it 0 to 1.")


def changed_patches(source: Tensor, target: Tensor, rows: int, cols: int, threshold: float, grow: int = 0) -> Tensor:
    """[B, rows, cols] of 0 and 1: patches in which any pixel of the pictures [B, 3, H, W] in [0, 1] differs, and those within
    `grow` of them."""
    differs = ((source - target).abs().amax(1, keepdim=True) > threshold).float()
    changed = F.adaptive_max_pool2d(differs, (rows, cols))
    return F.max_pool2d(changed, 2 * grow + 1, stride=1, padding=grow)[:, 0]


def add_gate_lora(flux: nn.Module, rank: int) -> None:
    """Freeze Flux and give its picture's layers a LoRA in float32 (Hu et al., arXiv 2106.09685), by peft; alpha is the rank."""
    from peft import LoraConfig, inject_adapter_in_model

    flux.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS), flux)
    for parameter in flux.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_layers(flux: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a Flux that are given a LoRA, by name."""
    return {name: module for name, module in flux.named_modules() if re.fullmatch(LAYERS, name)}


def lora_name(name: str) -> str:
    """The name that diffusers gives a LoRA's tensor and ComfyUI's *Load LoRA* reads, from peft's own."""
    return f"transformer.{name.replace('.default.', '.')}"


def lora_state(flux: nn.Module) -> dict[str, Tensor]:
    return {lora_name(name): parameter for name, parameter in flux.named_parameters() if ".lora_" in name}


def merge_lora(flux: nn.Module, path: Path) -> None:
    """Work the LoRA of such a file into the weights of a Flux. ValueError where it does not fit."""
    tensors, _ = checkpoint.load(path, "gate_lora")
    for name in sorted(name for name in tensors if name.endswith(".lora_A.weight")):
        place = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        down, up = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        with torch.no_grad():
            weight = flux.get_submodule(place).weight
            weight += (up.float() @ down.float()).to(weight)


class GateObjective:
    """loss of a Flux with such a LoRA. masked: whether the embeddings are seen under their visibility."""

    def __init__(self, flux: nn.Module, settings: GateTraining, masked: bool = True):
        self.flux, self.settings, self.masked = flux, settings, masked
        self.attention = attend_by_gate(flux)

    def gates(self, source: Tensor, target: Tensor, rows: int, cols: int, step: Step) -> tuple[Tensor, Tensor]:
        """(gates [B, rows, cols], [B] whose source is the target itself) of pictures [B, 3, H, W] in [0, 1]."""
        settings, chance = self.settings, step.rand()
        grow = int(torch.randint(settings.grow + 1, (), generator=step.shared()))
        changed = changed_patches(source, target, rows, cols, settings.threshold, grow)
        closed, itself = chance < settings.closed, chance >= 1 - settings.itself
        partly = ~closed & (chance < settings.closed + settings.partly)
        level = step.rand() * partly if settings.partly else torch.zeros_like(chance)
        level = level.masked_fill(itself, 1)  # of the gate of what changes
        gates = 1 - changed * (1 - level)[:, None, None]
        return gates.masked_fill(closed[:, None, None], 0), itself

    def velocity(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None, hierarchy: Hierarchy, reference: Tensor,
                 gates: Tensor, guidance: float) -> Tensor:
        """What Flux predicts of latents x [B, C, H, W] at times t [B] under an embedding, reading the reference by gates."""
        if pooled is None:
            pooled = tokens.new_zeros(len(tokens), self.flux.config.pooled_projection_dim)
        scale = torch.full_like(t, guidance) if self.flux.config.guidance_embeds else None
        self.attention.gates, self.attention.regions = gates, self.regions(hierarchy, gates)
        return velocity(self.flux, x, t, tokens, pooled, scale, reference).float()

    def regions(self, hierarchy: Hierarchy, gates: Tensor) -> Regions | None:
        """The visibility of a hierarchy whose picture has a reference behind it."""
        if not self.masked:
            return None
        boxes, (rows, cols) = hierarchy.boxes(), gates.shape[1:]
        bias = region_bias(boxes, torch.zeros(len(boxes)), (rows, cols), len(boxes), references=rows * cols)
        return Regions(bias.to(gates.device))

    @contextmanager
    def reading(self, hierarchy: Hierarchy, gates: Tensor) -> Iterator[Regions | None]:
        """As long as it lasts, Flux reads a reference by gates [B, rows, cols]. Gives the regions to paint under."""
        self.attention.gates = gates
        try:
            yield self.regions(hierarchy, gates)
        finally:
            self.attention.gates = None

    def loss(self, tokens: Tensor, pooled: Tensor | None, hierarchy: Hierarchy, pictures: tuple[Tensor, Tensor],
             reference: Tensor, x0: Tensor, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity towards the edited picture; its parts are those of open, partly open and closed patches.

        tokens [B, T, D], pooled [B, P] or None: of the edited picture. pictures: source and edited one, [B, 3, H, W] in [0, 1];
        reference, x0: their latents [B, C, h, w].
        """
        settings, (rows, cols) = self.settings, (side // 2 for side in x0.shape[-2:])
        gates, itself = self.gates(*pictures, rows, cols, step)
        reference = torch.where(itself[:, None, None, None], x0, reference)
        mu = mu_of(self.flux, rows * cols) if settings.mu == "resolution" else settings.mu
        t, noise = sample_times(step, mu, settings.uniform), step.randn(*x0.shape[1:])

        def paint(x: Tensor, t: Tensor) -> Tensor:
            return self.velocity(x, t, tokens, pooled, hierarchy, reference, gates, settings.guidance)

        now, off = network_time(self.flux, t)[:, None, None, None], torch.zeros_like(x0)
        if settings.drift and float(torch.rand((), generator=step.shared())) < settings.drift:
            off = self.drifted(paint, x0, noise, now, gates > 0, step)
        target = noise - x0 + off / now.clamp(min=SOONEST)
        error = (paint(x0 + now * (noise - x0) + off, t) - target).square().mean(1, keepdim=True)
        error = F.avg_pool2d(error, 2)[:, 0]
        places = {"open": gates == 1, "partly": (gates > 0) & (gates < 1), "closed": gates == 0}
        parts = {name: (error * where).sum() / where.sum().clamp(min=1) for name, where in places.items()}
        return error.mean(), {name: part.detach() for name, part in parts.items()}

    def drifted(self, paint: Callable[[Tensor, Tensor], Tensor], x0: Tensor, noise: Tensor, now: Tensor, read: Tensor,
                step: Step) -> Tensor:
        """[B, C, h, w]: how far from the straight path one step of Flux leads to the time `now`, in the patches that read. Detached,
        not under no_grad: there bitsandbytes packs a CPU's nf4 weights in a way that no later forward can be trained through."""
        t = now.flatten() + step.rand() * (1 - now.flatten())
        earlier = network_time(self.flux, t)[:, None, None, None]
        off = (now - earlier) * (paint(x0 + earlier * (noise - x0), t).detach() - (noise - x0))
        return off * read.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
