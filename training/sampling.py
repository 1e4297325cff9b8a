"""Painting in training: Euler's method along Flux's velocity, for validation and for judging."""
from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ..kernels.attention import Regions
from .encoders import Latents
from .flux import mu_of, shifted, velocity


def schedule(steps: int, mu: float) -> list[float]:
    """The times of `steps` Euler steps, from 1 to 0, spaced by Flux's time shift."""
    return [*shifted(torch.linspace(1, 0, steps + 1)[:-1], mu).tolist(), 0.0]


def starting_noise(count: int, channels: int, height: int, width: int, seed: int) -> Tensor:
    """[count, channels, height, width] float32 on the CPU; row i comes from seed + i, however many rows are painted at once."""
    return torch.stack([torch.randn(channels, height, width, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)])


@torch.no_grad()
def paint(flux: FluxTransformer2DModel, vae: Latents, tokens: Tensor, pooled: Tensor | None, regions: Regions | None,
          height: int, width: int, seed: int = 0, steps: int = 28, guidance: float = 3.5) -> Tensor:
    """Pictures [B, 3, height, width] float32 in [0, 1], on the device of the tokens, that Flux paints from embeddings.

    flux: with a RegionAttention in its blocks (`attend_by_region`); its regions are set for this call and taken away after.
    tokens [B, T, D], pooled [B, P] or None for zeros; regions: of the latent's grid of patches, None where all see all.
    height, width: in pixels, multiples of twice the VAE's downsampling (16 for FLUX.1).
    guidance: what a guidance-distilled Flux is told; no meaning for another.
    """
    side = 2 * vae.downsample
    if height % side or width % side:
        raise ValueError(f"{height} x {width} pixels cannot be cut into patches of {side}; choose multiples of {side}.")
    device, count = tokens.device, len(tokens)
    if pooled is None:
        pooled = tokens.new_zeros(count, flux.config.pooled_projection_dim)
    scale = torch.full((count,), guidance, device=device) if flux.config.guidance_embeds else None
    rows, cols = height // vae.downsample, width // vae.downsample
    x = starting_noise(count, vae.channels, rows, cols, seed).to(device)
    times = schedule(steps, mu_of(flux, rows * cols // 4))
    attention = next(iter(flux.attn_processors.values()))
    attention.regions = regions
    try:
        for now, later in zip(times[:-1], times[1:]):
            t = torch.full((count,), now, device=device)
            x = x + (later - now) * velocity(flux, x, t, tokens, pooled, scale).float()
    finally:
        attention.regions = None
    return vae.decode(x)
