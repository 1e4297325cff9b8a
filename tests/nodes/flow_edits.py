"""Flow edits of a toy model, painted by core's SamplerCustomAdvanced and written out by hand."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_custom_sampler
from semantic_diffusion_adapter.kernels.noise import own_noise
from semantic_diffusion_adapter.nodes import guide

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
SEED = 5


def plain(seed: int, length: int = 5) -> list:
    """An ordinary text conditioning."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 24, generator=generator)
    return [[torch.randn(1, length, 24, generator=generator), {"pooled_output": pooled}]]


SOURCE, EDITED, NEGATIVE = plain(1), plain(2), plain(3)


def latent(size=(8, 8), batch: int = 1, seed: int = 9) -> dict:
    return {"samples": torch.randn(batch, 8, *size, generator=torch.Generator().manual_seed(seed))}


def ours(model, source=SOURCE, edited=EDITED, start=None, strength=1.0, n_avg=1, seed=SEED, cfg=1.0, source_cfg=1.0, **rest):
    start = latent() if start is None else start
    return guide.FlowEditGuider.execute(model, source, edited, start, strength, n_avg, seed, cfg, source_cfg, **rest).result[0]


def paint(guider, start=None, steps: int = 3, sampler: str = "euler", denoise: float = 1.0, noise: int = 0, sigmas=None):
    schedule = guider.model_patcher
    if sigmas is None:
        (sigmas,) = nodes_custom_sampler.BasicScheduler.execute(schedule, "simple", steps, denoise).result
    start = latent() if start is None else start
    chosen = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    with torch.no_grad():
        return nodes_custom_sampler.SamplerCustomAdvanced.execute(
            nodes_custom_sampler.Noise_RandomNoise(noise), guider, chosen, sigmas, start
        ).result[0]["samples"]


def written_out(toy, start: dict, steps: int, strength=1.0, n_avg=1, cfg=1.0, source_cfg=1.0, denoise=1.0, mask=1.0):
    """The paper's algorithm in velocities, with the bare network."""
    x0 = toy.model.model.process_latent_in(start["samples"])
    (sigmas,) = nodes_custom_sampler.BasicScheduler.execute(toy.model, "simple", steps, denoise).result
    pictures = start.get("batch_index", range(len(x0)))
    z = x0

    def velocity(x, conditioning, sigma):
        tokens, settings = conditioning[0]
        rows = len(x)
        return toy.network(x, sigma.expand(rows), tokens.expand(rows, -1, -1), settings["pooled_output"].expand(rows, -1))

    def guided(x, positive, scale, sigma):
        away = velocity(x, NEGATIVE, sigma)
        return away + scale * (positive - away)

    with torch.no_grad():
        for step, (sigma, later) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            total = 0
            for draw in range(n_avg):
                noise = own_noise(x0.shape[1:], pictures, SEED, step, draw)
                zs = (1 - sigma) * x0 + sigma * noise
                zt = z + zs - x0
                there = velocity(zt, SOURCE, sigma)
                edited = there + strength * (velocity(zt, EDITED, sigma) - there)
                total = total + guided(zt, edited, cfg, sigma) - guided(zs, velocity(zs, SOURCE, sigma), source_cfg, sigma)
            z = z + mask * (later - sigma) * total / n_avg
    return toy.model.model.process_latent_out(z)


def watched(model) -> tuple[object, list[int]]:
    """A clone of the model, and the list of what each of its forwards will have had as a batch."""
    sizes = []

    def watch(executor, x, *args, **kwargs):
        sizes.append(x.shape[0])
        return executor(x, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    return clone, sizes
