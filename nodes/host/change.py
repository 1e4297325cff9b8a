"""The change map of two conditionings, by the frozen model.

It runs as a sampler of ours inside core's own guider, so that loading, offloading, LoRAs, hooks and cleaning up are
core's.
"""

from __future__ import annotations

import comfy.model_management
import comfy.samplers
import comfy.utils
import node_helpers
import torch
from torch import Tensor

from ...kernels.change_map import patch_change, relative, times
from ...kernels.noise import own_noise
from .source import check_flow, source_of


def change_map(model, source: list, edited: list, latent: dict, noises: int, seed: int) -> Tensor:
    """[B, rows, cols] float32 in 0..1 on the CPU, of the picture's own maximum, by latent patches.

    source, edited: CONDITIONINGs; latent: the source's LATENT. noises: in how many noisy versions of it they are compared.
    """
    samples, pictures = source_of(latent)
    check_flow(model, "Change Mask")
    guider = comfy.samplers.CFGGuider(model)
    # Core passes a name on as the kind of prompt, and models know only two kinds.
    guider.inner_set_conds(
        {"positive": edited, "source": node_helpers.conditioning_set_values(source, {"prompt_type": "positive"})}
    )
    compare = Compare(pictures, seed)
    guider.sample(torch.zeros_like(samples), samples, compare, torch.tensor(times(noises)), seed=seed)
    return relative(compare.change)


class Compare(comfy.samplers.Sampler):
    """Adds up, where core would run a sampler, what changes at every sigma. What core is given back is the latent that it
    gave."""

    def __init__(self, pictures: list[int], seed: int) -> None:
        self._pictures, self._seed = pictures, seed
        self.change = torch.zeros(())

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        base, options, conds = model_wrap.inner_model, extra_args["model_options"], model_wrap.conds
        progress = comfy.utils.ProgressBar(len(sigmas))
        for step, sigma in enumerate(sigmas):
            comfy.model_management.throw_exception_if_processing_interrupted()
            drawn = own_noise(latent_image.shape[1:], self._pictures, self._seed, step).to(latent_image)
            x = base.model_sampling.noise_scaling(sigma, drawn, latent_image)
            # The source comes last, after the place of a negative: patches ask for 0 as positive and 1 as negative.
            asked = [conds["positive"], None, conds["source"]]
            edited, _, source = comfy.samplers.calc_cond_batch(base, asked, x, sigma.expand(len(x)), options)
            # Core gives x - sigma * velocity.
            self.change = self.change + patch_change(edited / sigma, source / sigma).cpu()
            progress.update(1)
        return latent_image
