"""A Flux of any shape and precision with random weights, block by block: benchmarks train through it."""
from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from .base import Precision, check_precision, filled
from .flux import build_flux


def random_flux(config: dict, precision: Precision, device: torch.device, seed: int = 0) -> FluxTransformer2DModel:
    """A frozen Flux in eval mode. Layers are drawn on the device and quantised one by one, so it needs room for itself
    and one layer. config: ComfyUI's field names, as `build_flux` takes them."""
    check_precision(precision)
    with torch.device("meta"):
        flux = build_flux(config)
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(name: str, leaf: str, dtype: torch.dtype) -> Tensor:
        module = flux.get_submodule(name)
        value = torch.ones(getattr(module, leaf).shape, device=device, dtype=dtype)
        if isinstance(module, nn.Linear):  # unit variance in gives unit variance out, roughly as in a trained layer
            value.normal_(std=value.shape[-1] ** -0.5, generator=generator) if leaf == "weight" else value.zero_()
        return value

    return filled(flux, precision, device, drawn)
