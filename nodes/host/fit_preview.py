"""What a fit would paint by now: a short repainting of the first picture, shown by core's own previewer."""

from __future__ import annotations

import math

import comfy.model_management
import comfy.samplers
import latent_preview
import torch
from torch import Tensor

from ...kernels.fit import Fit, Velocity

_SHARES = (0.1, 0.25, 0.5, 0.75)  # of the steps, after which there is one
_STEPS = 6


class Preview:
    """Nothing where core has no previewer for the model's latents, or the user wants none.

    shape: (C, H, W) of the latent. steps: of the whole fit.
    """

    def __init__(self, base, device: torch.device, shape: torch.Size, steps: int) -> None:
        self._previewer = latent_preview.get_previewer(device, base.latent_format)
        self._sigmas = comfy.samplers.calculate_sigmas(base.model_sampling, "simple", _STEPS).to("cpu", torch.float32)
        self._noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        self._turns = {math.ceil(share * steps) for share in _SHARES}
        self._device = device

    def after(self, fit: Fit, velocity: Velocity) -> tuple | None:
        """After a step, what a progress bar takes for a picture; None for none."""
        if self._previewer is None or fit.count not in self._turns:
            return None
        return self._previewer.decode_latent_to_preview_image("JPEG", self._paint(fit, velocity).to(self._device))

    @torch.no_grad()
    def _paint(self, fit: Fit, velocity: Velocity) -> Tensor:
        """[1, C, H, W] by Euler."""
        tokens, pooled = fit.tokens()
        tokens, pooled = tokens[:1], None if pooled is None else pooled[:1]
        x = self._noise
        for now, then in zip(self._sigmas[:-1], self._sigmas[1:]):
            comfy.model_management.throw_exception_if_processing_interrupted()
            x = x + (then - now) * velocity(x, now[None], tokens, pooled)
        return x
