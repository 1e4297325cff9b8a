"""Training the adapter through a frozen Flux: flow matching under the visibility, with growing hierarchies.

Every batch uses one hierarchy, drawn from those that its phase of the run allows. The run grows from few tokens to the
whole query table. Fine levels are dropped at random, so that one checkpoint serves every preset. Coarse levels are
dropped too, so that the regions' tokens carry their own content. Flux and the towers are frozen. In the last phase the
last blocks of the DINOv2 tower may learn too.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels.adapter import Adapter, read_adapter, token_similarity
from ...kernels.attention import Regions
from ...kernels.hierarchy import PRESETS, Hierarchy, Level
from ...kernels.visibility import region_bias
from ...kernels.vision.towers import VisionTower
from ..engine.stage import Step
from ..frozen.flux import mu_of, network_time, velocity
from ..frozen.region_attention import RegionAttention
from .times import sample_times


@dataclass(frozen=True)
class AdapterTraining:
    """Settings of the objective."""

    growth: tuple[tuple, ...] = ((0.1, "global16"), (0.2, "global32"), (0.4, "tree64"),
                                 (1.0, "global16", "global32", "tree64", "tree112", "tree128", "tree128"))
    """Phases as (end, preset, preset, ...): until this share of the run each batch takes one of the presets at
    random."""
    similarity: float = 0.02
    """Weight of the mean squared cosine between tokens of one image."""
    masked: bool = True
    """Patches see only the tokens whose boxes they overlap. False is for the ablation."""
    level_dropout: float = 0.0
    """Share of batches that drop the finer levels of their preset, from a random one on."""
    coarse_dropout: float = 0.0
    """Share of batches that drop the coarser levels of their preset, up to a random one. If the tokens of the whole
    picture were always there, they would learn everything and the regions' tokens nothing."""
    composed: float = 0.0
    """Share of batches in which a quadrant or a half of every picture, and the tokens that own a part of it, are those
    of another picture of the batch. The tokens of the whole picture remain, so a region's tokens learn to be believed
    where they are put."""
    distil: float = 0.0
    """Weight of the mean squared distance from fitted embeddings, in deviations of the text space, beside the flow loss.
    It counts on batches of their preset."""
    mu: float | Literal["resolution"] = 0.5
    """Time shift of training. "resolution": the shift that the base itself samples with, which in FLUX.1 grows with the
    number of patches. A larger one spends more steps where the tokens, not the noisy picture, determine what to
    paint."""
    uniform: float = 0.2
    """Share of uniform times beside the shifted logit-normal ones."""
    guidance: float = 1.0
    """Guidance that a guidance-distilled base (FLUX.1-dev) is given. At 1.0 it predicts the plain velocity."""
    unlock: float = 0.8
    """Share of the run after which DINOv2's last blocks learn too."""
    unlock_blocks: int = 1
    unlock_scale: float = 0.1
    """Their learning rate as a share of the adapter's."""

    def __post_init__(self):
        if not (0 <= self.level_dropout and 0 <= self.coarse_dropout and self.level_dropout + self.coarse_dropout <= 1):
            raise ValueError(f"level_dropout {self.level_dropout} and coarse_dropout {self.coarse_dropout} are shares "
                             f"of the batches; they add up to at most 1.")

    def presets(self, progress: float) -> tuple[str, ...]:
        return next(tuple(phase[1:]) for phase in self.growth if progress < phase[0] or phase is self.growth[-1])

    def token_counts(self) -> set[int]:
        """The possible numbers of tokens of a batch of the run."""
        found = set()
        for levels in (named_hierarchy(name).levels for phase in self.growth for name in phase[1:]):
            cuts = [levels, *(levels[:n] for n in range(1, len(levels)) if self.level_dropout),
                    *(levels[n:] for n in range(1, len(levels)) if self.coarse_dropout)]
            found |= {Hierarchy(each).token_count for each in cuts}
        return found

    def draw(self, step: Step) -> Hierarchy:
        """The hierarchy of a step, one for the whole batch."""
        presets = self.presets(step.progress)
        chosen = named_hierarchy(presets[int(torch.randint(len(presets), (), generator=step.shared()))])
        if not (self.level_dropout or self.coarse_dropout):
            return chosen
        draw = float(torch.rand((), generator=step.shared()))
        cut = 1 + int(torch.randint(max(1, len(chosen.levels) - 1), (), generator=step.shared()))
        if draw < self.level_dropout:
            return Hierarchy(chosen.levels[:cut])
        if draw < self.level_dropout + self.coarse_dropout:
            return Hierarchy(chosen.levels[cut:] or chosen.levels)
        return chosen


@dataclass(frozen=True)
class Batch:
    """latents [B, C, H, W] as Flux takes them, images [B, 3, h, w] in [0, 1], and the known features of the towers
    (tower id -> [B, N, C]). images is None where all features are known. fitted: tokens [B, T, D] that were fitted to the
    pictures, NaN for a picture without, or None."""

    latents: Tensor
    images: Tensor | None
    features: dict[str, Tensor] = field(default_factory=dict)
    fitted: Tensor | None = None


def named_hierarchy(name: str) -> Hierarchy:
    """A preset, or `global<n>` for n tokens of the whole image."""
    if name in PRESETS:
        return PRESETS[name]
    if name.startswith("global") and name[6:].isdigit():
        return Hierarchy((Level(1, 1, int(name[6:])),))
    raise ValueError(f"Unknown preset '{name}'; use one of {', '.join(PRESETS)} or global<n>.")


def load_adapter(path: Path, device: torch.device) -> tuple[Adapter, dict]:
    """A frozen adapter in float32, and its record."""
    adapter, record = read_adapter(path)
    return adapter.to(device).eval().requires_grad_(False), record


def regions_for(hierarchy: Hierarchy, grid: tuple[int, int], device: torch.device) -> Regions:
    """The visibility of a hierarchy whose tokens are the whole text of the joint sequence."""
    boxes = hierarchy.boxes()
    return Regions(region_bias(boxes, torch.zeros(len(boxes)), grid, len(boxes)).to(device))


# Boxes (x0, y0, x1, y1): the quadrants, and a half either way.
PARTS = ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1), (0.5, 0, 1, 1), (0, 0.5, 1, 1))


def neighbours(x: Tensor) -> Tensor:
    """Every sample's neighbour in the batch: the two of each pair exchanged, an odd last one its own."""
    order = torch.arange(len(x), device=x.device) ^ 1
    return x[torch.where(order < len(x), order, order ^ 1)]


def composed(latents: Tensor, tokens: Tensor, hierarchy: Hierarchy, part: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Latents [B, C, H, W] and tokens [B, T, D] with those of the neighbour in a part of the picture. Tokens whose box
    reaches beyond the part stay."""
    rows, cols = ((torch.arange(size, device=latents.device) + 0.5) / size for size in latents.shape[-2:])
    x0, y0, x1, y1 = part
    inside = ((rows > y0) & (rows < y1))[:, None] & ((cols > x0) & (cols < x1))
    boxes = hierarchy.boxes().to(tokens.device)
    own = (boxes[:, 0] >= x0) & (boxes[:, 1] >= y0) & (boxes[:, 2] <= x1) & (boxes[:, 3] <= y1)
    if not own.any():
        return latents, tokens
    return (torch.where(inside, neighbours(latents), latents),
            torch.where(own[:, None], neighbours(tokens), tokens))


class AdapterObjective:
    """loss(batch, step) of the adapter under a frozen Flux with a RegionAttention in its blocks. distilled: the hierarchy
    of the batches' fitted tokens."""

    def __init__(self, flux: nn.Module, attention: RegionAttention, adapter: Adapter, towers: dict[str, VisionTower],
                 settings: AdapterTraining, distilled: Hierarchy | None = None):
        self.flux, self.attention, self.adapter, self.towers, self.settings = flux, attention, adapter, towers, settings
        self.distilled = distilled
        self._regions: dict[tuple, Regions] = {}

    def regions(self, hierarchy: Hierarchy, grid: tuple[int, int], device: torch.device) -> Regions | None:
        if not self.settings.masked:
            return None
        key = (hierarchy, grid)
        if key not in self._regions:
            if len(self._regions) >= 16:  # buckets x presets are many, and each is large at 1024 px
                del self._regions[next(iter(self._regions))]
            self._regions[key] = regions_for(hierarchy, grid, device)
        return self._regions[key]

    def features(self, images: Tensor | None, known: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Tower id -> patch features of images in [0, 1]. Features in `known` are taken as they are."""
        known = known or {}
        return known | {name: tower(images) for name, tower in self.towers.items() if name not in known}

    def embed(self, batch: Batch, hierarchy: Hierarchy) -> tuple[Tensor, Tensor]:
        """(tokens [B, T, D], pooled [B, P]) of the pictures. The pooled vector is zero for an adapter without a head
        for it."""
        tokens, pooled = self.adapter(self.features(batch.images, batch.features), hierarchy)
        return tokens, tokens.new_zeros(len(tokens), self.flux.config.pooled_projection_dim) if pooled is None else pooled

    def flow(self, latents: Tensor, noise: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor,
             hierarchy: Hierarchy) -> Tensor:
        """[B] mean squared error of the velocity that Flux predicts at times t under the embedding."""
        x = latents + network_time(self.flux, t)[:, None, None, None] * (noise - latents)
        guidance = torch.full_like(t, self.settings.guidance) if self.flux.config.guidance_embeds else None
        self.attention.regions = self.regions(hierarchy, (x.shape[-2] // 2, x.shape[-1] // 2), x.device)
        found = velocity(self.flux, x, t, tokens, pooled, guidance).float()
        return (found - (noise - latents)).square().flatten(1).mean(1)

    def loss(self, batch: Batch, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the samples of a micro-batch, which are those of the step's positions."""
        settings, x0 = self.settings, batch.latents
        hierarchy = settings.draw(step)
        tokens, pooled = self.embed(batch, hierarchy)
        more = {"distil": self.distance(tokens, batch.fitted, hierarchy)} if settings.distil else {}
        if settings.composed and float(torch.rand((), generator=step.shared())) < settings.composed:
            part = PARTS[int(torch.randint(len(PARTS), (), generator=step.shared()))]
            x0, tokens = composed(x0, tokens, hierarchy, part)
        mu = settings.mu if settings.mu != "resolution" else mu_of(self.flux, x0.shape[-2] * x0.shape[-1] // 4)
        t = sample_times(step, mu, settings.uniform)
        flow = self.flow(x0, step.randn(*x0.shape[1:]), t, tokens, pooled, hierarchy).mean()
        similarity = token_similarity(tokens)
        total = flow + settings.similarity * similarity + settings.distil * more.get("distil", 0)
        return total, {"flow": flow, "similarity": similarity, **more}

    def distance(self, tokens: Tensor, fitted: Tensor | None, hierarchy: Hierarchy) -> Tensor:
        """Mean squared distance of tokens [B, T, D] from fitted ones, in deviations of the text space. Those of NaN, and of
        another hierarchy, count nothing."""
        if fitted is None or hierarchy != self.distilled:
            return tokens.new_zeros(())
        known = fitted.isfinite().flatten(1).all(1)
        apart = (tokens.float() - fitted.nan_to_num()) / self.adapter.text_std
        return (apart.square().mean((1, 2)) * known).mean()

    def unlock(self) -> list[nn.Parameter]:
        """Let the last blocks of the DINOv2 towers learn; returns their parameters."""
        found = []
        for tower in self.towers.values():
            if tower.config.kind == "dinov2" and self.settings.unlock_blocks:
                for block in tower.blocks[-self.settings.unlock_blocks:]:
                    found += list(block.requires_grad_(True).parameters())
        return found
