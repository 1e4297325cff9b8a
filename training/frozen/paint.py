"""Painting in training: Euler's method along Flux's velocity, for validation and for judging."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ...kernels.attention import Regions
from .encoders import Latents
from .flux import mu_of, shifted, velocity


def schedule(steps: int, mu: float) -> list[float]:
    """The times of `steps` Euler steps, from 1 to 0, spaced by Flux's time shift."""
    return [*shifted(torch.linspace(1, 0, steps + 1)[:-1], mu).tolist(), 0.0]


def starting_noise(seeds: Sequence[int], channels: int, height: int, width: int) -> Tensor:
    """[len(seeds), channels, height, width] float32 on the CPU. Every row depends on its own seed alone."""
    return torch.stack([torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed))
                        for seed in seeds])


@torch.no_grad()
def paint(flux: FluxTransformer2DModel, vae: Latents, tokens: Tensor, pooled: Tensor | None, regions: Regions | None,
          height: int, width: int, seed: int | Sequence[int] = 0, steps: int = 28, guidance: float = 3.5,
          reference: Tensor | None = None) -> Tensor:
    """Pictures [B, 3, height, width] float32 in [0, 1], on the tokens' device, that Flux paints from embeddings.

    flux: with a RegionAttention in its blocks (`attend_by_region`); its regions are set for this call and taken away
    after. tokens [B, T, D], pooled [B, P] or None for zeros; regions: of the latent's grid of patches, None where all
    see all.
    height, width: in pixels, multiples of twice the VAE's downsampling (16 for FLUX.1).
    seed: of the starting noise, one for each picture; a single number is that of the first, and the others follow it.
    guidance: the guidance scale for a guidance-distilled Flux; unused for another.
    reference: latents of as many pictures to read, for a Flux with a GatedAttention whose gates are set.
    """
    side = 2 * vae.downsample
    if height % side or width % side:
        raise ValueError(f"{height} x {width} pixels cannot be cut into patches of {side}; choose multiples of {side}.")
    device, count = tokens.device, len(tokens)
    if pooled is None:
        pooled = tokens.new_zeros(count, flux.config.pooled_projection_dim)
    scale = torch.full((count,), guidance, device=device) if flux.config.guidance_embeds else None
    rows, cols = height // vae.downsample, width // vae.downsample
    seeds = range(seed, seed + count) if isinstance(seed, int) else seed
    x = starting_noise(seeds, vae.channels, rows, cols).to(device)
    times = schedule(steps, mu_of(flux, rows * cols // 4))
    attention = next(iter(flux.attn_processors.values()))
    attention.regions = regions
    try:
        for now, later in zip(times[:-1], times[1:]):
            t = torch.full((count,), now, device=device)
            x = x + (later - now) * velocity(flux, x, t, tokens, pooled, scale, reference).float()
    finally:
        attention.regions = None
    return vae.decode(x)
