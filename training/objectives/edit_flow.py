"""Fine-tuning an edit decoder through the frozen Flux: the embedding that it writes has to paint the edited picture.

Most of an edited picture is unchanged, so the plain flow loss says little about the edit. Changed areas weigh more, the
smaller the more (UniWorld-V1, arXiv 2506.03147).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.hierarchy import Hierarchy
from ..engine.stage import Step
from ..frozen.encoders import Latents
from ..frozen.flux import mu_of, network_time, velocity
from ..frozen.region_attention import attend_by_region
from .reconstruct import regions_for
from .times import sample_times


@dataclass(frozen=True)
class FlowTraining:
    weight: float = 0.0
    """Weight of the flow loss beside the loss on tokens. 0 leaves Flux out."""
    threshold: float = 0.1
    """Smallest difference of a channel, 0 to 1, that counts as a change of a pixel. JPEG's noise stays below it."""
    share: float = 0.25
    """Share of a latent's pixels that must have changed for it to count, so that specks do not."""
    mu: float | Literal["resolution"] = "resolution"
    """Time shift of training. "resolution": the shift that Flux itself samples with."""
    uniform: float = 0.2
    """Share of uniform times beside the shifted logit-normal ones."""
    guidance: float = 1.0
    """Guidance that a guidance-distilled base (FLUX.1-dev) is given. At 1.0 it predicts the plain velocity."""


def area_weights(source: Tensor, target: Tensor, rows: int, cols: int, settings: FlowTraining) -> Tensor:
    """Weight of every latent, [B, 1, rows, cols] float32 with mean 1 in each sample.

    source, target: pictures [B, 3, H, W] in [0, 1]. Changed latents and their neighbours weigh log2(x) + 1, where x is
    the whole area over the changed one; all others weigh 1 (before the mean is made 1). A picture without a change, or
    with nothing but changes, weighs 1 everywhere.
    """
    differs = ((source - target).abs().amax(1, keepdim=True) > settings.threshold).float()
    changed = (F.adaptive_avg_pool2d(differs, (rows, cols)) >= settings.share).float()
    changed = F.max_pool2d(changed, 3, stride=1, padding=1)
    area = changed.mean((1, 2, 3), keepdim=True)
    weight = 1 + changed * torch.log2(1 / area.clamp(min=1 / (rows * cols)))
    return weight / weight.mean((1, 2, 3), keepdim=True)


class EditFlow:
    """The area-weighted flow loss of written embeddings, through a frozen Flux. masked: the adapter's record says
    whether it was trained under the visibility."""

    def __init__(self, flux: nn.Module, vae: Latents, settings: FlowTraining, masked: bool = True):
        self.flux, self.vae, self.settings, self.masked = flux, vae, settings, masked
        self.attention = attend_by_region(flux)

    def loss(self, tokens: Tensor, pooled: Tensor | None, hierarchy: Hierarchy, source: Tensor, target: Tensor,
             step: Step) -> Tensor:
        """A scalar: weighted squared error of the velocity towards the target picture.

        tokens [B, T, D] of the hierarchy as the decoder writes them, with gradient; pooled [B, P] of the source's
        embedding or None; source, target: pictures [B, 3, H, W] in [0, 1].
        """
        settings = self.settings
        mean, deviation = self.vae.moments(target)
        x0 = mean + deviation * step.randn(*mean.shape[1:])
        rows, cols = x0.shape[-2:]
        mu = mu_of(self.flux, rows * cols // 4) if settings.mu == "resolution" else settings.mu
        t, noise = sample_times(step, mu, settings.uniform), step.randn(*x0.shape[1:])
        if pooled is None:
            pooled = tokens.new_zeros(len(tokens), self.flux.config.pooled_projection_dim)
        guidance = torch.full_like(t, settings.guidance) if self.flux.config.guidance_embeds else None
        self.attention.regions = regions_for(hierarchy, (rows // 2, cols // 2), x0.device) if self.masked else None
        x = x0 + network_time(self.flux, t)[:, None, None, None] * (noise - x0)
        found = velocity(self.flux, x, t, tokens, pooled, guidance).float()
        weight = area_weights(source, target, rows, cols, settings)
        return ((found - (noise - x0)).square() * weight).mean()
