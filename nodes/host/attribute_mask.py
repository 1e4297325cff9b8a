"""Where an Attribute Edit acts on a picture, heard in noisy versions of it by core's own guider (as `change`)."""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...kernels.change_map import times
from ...kernels.noise import own_noise
from ...kernels.visibility import patch_grid
from .directions import DIRECTIONS_KEY, RECORD_KEY
from .source import check_flow, source_of


def attribute_mask(model, positive: list, latent: dict, noises: int, seed: int) -> Tensor:
    """[B, rows, cols] float32 in 0..1 on the CPU: the mean over blocks and noises of the mask of the model's last direction.

    ValueError where the model has none, or none that acts.
    """
    samples, pictures = source_of(latent)
    check_flow(model, "Attribute Mask")
    if not model.get_attachment(DIRECTIONS_KEY):
        raise ValueError("This model has no Attribute Edit: connect the one that comes out of that node.")
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    listen = Listen(pictures, seed)
    guider.sample(torch.zeros_like(samples), samples, listen, torch.tensor(times(noises)), seed=seed)
    if not listen.heard:
        raise ValueError(
            "The last Attribute Edit of this model does nothing here: give it a strength, a mask that is not black, and a start "
            "and end that are apart."
        )
    patch = model.get_model_object("diffusion_model").patch_size
    return torch.stack(listen.heard).mean(0).unflatten(1, patch_grid(*samples.shape[-2:], patch))


class Listen(comfy.samplers.Sampler):
    """Collects, where core would run a sampler, the masks of every sigma. What core is given back is the latent that it
    gave."""

    def __init__(self, pictures: list[int], seed: int) -> None:
        self._pictures, self._seed = pictures, seed
        self.heard: list[Tensor] = []

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        base, options = model_wrap.inner_model, dict(extra_args["model_options"])
        # A function: of lists core makes its own.
        options["transformer_options"] = {**options.get("transformer_options", {}), RECORD_KEY: self.heard.append}
        progress = comfy.utils.ProgressBar(len(sigmas))
        for step, sigma in enumerate(sigmas):
            comfy.model_management.throw_exception_if_processing_interrupted()
            drawn = own_noise(latent_image.shape[1:], self._pictures, self._seed, step).to(latent_image)
            x = base.model_sampling.noise_scaling(sigma, drawn, latent_image)
            comfy.samplers.calc_cond_batch(base, [model_wrap.conds["positive"], None], x, sigma.expand(len(x)), options)
            progress.update(1)
        return latent_image
