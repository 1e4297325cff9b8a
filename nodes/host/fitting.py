"""A fit at work: an embedding optimised through core's loaded Flux.

It runs as a sampler of ours inside core's own guider, so that loading, offloading, LoRAs, hooks and cleaning up are
core's, and it evaluates the model as every sampler does, by a processed CONDITIONING. The fit itself lives on the CPU.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

import comfy.conds
import comfy.model_management
import comfy.samplers
import comfy.utils
import node_helpers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...kernels.embedding import SemanticEmbedding
from ...kernels.fit import Fit, FitSettings, Velocity
from ...kernels.fit_memory import FitMemory, FluxSize, fit_memory
from ...kernels.text_space import TextSpace
from ...kernels.visibility import patch_grid
from . import fits, flux
from .conditioning import to_conditioning
from .fit_preview import Preview
from .gradient_check import check_gradients
from .gradients import differentiable, differentiable_options
from .source import check_flow

GUIDANCE = 3.5  # what core tells a model with guidance where no node says otherwise
_SPARE = 0.7  # share of the free memory that may be used to run no block twice


def fit_embedding(
    model, latents: Tensor, start: SemanticEmbedding, space: TextSpace, settings: FitSettings, minutes: float = 0.0,
    guidance: float = GUIDANCE,
) -> tuple[SemanticEmbedding, list[float]]:  # fmt: skip
    """(the fitted embedding, the loss of every step).

    model: a MODEL of FLUX.1. One that has not been through Masked Attention gets it with its defaults.
    latents: [B, C, H, W] as core's VAE gives them, a picture for each of the start's.
    settings: all but the shift, which is the model's own.
    minutes: at most so long, 0 for no limit. guidance: what a model with guidance (FLUX.1-dev) is told; fit with what
        the pictures are to be painted with.

    A fit that was interrupted or ran out of minutes is kept in memory (`fits`): asked for again, also for more steps, it
    goes on where it was.
    """
    if len(latents) != start.batch:
        raise ValueError(
            f"There are {len(latents)} pictures and {start.batch} embeddings to start from: use as many of both."
        )
    masked = model.get_wrappers(WrappersMP.DIFFUSION_MODEL, flux.WRAPPER_KEY)
    clone = model.clone() if masked else flux.patch(model)
    schedule = clone.get_model_object("model_sampling")
    check_flow(clone, "A fit")
    settings = replace(settings, shift=getattr(schedule, "shift", settings.shift))
    key = fits.fingerprint(
        (latents, start.tokens, start.boxes, start.levels, start.strengths, start.pooled, start.masks, start.masked_by,
         space.mean, space.deviation),
        replace(settings, steps=1), guidance,
    )  # fmt: skip
    fit = fits.find(model, key, settings.steps)
    if fit is None:
        with torch.inference_mode(False):  # an optimiser's state must be ordinary tensors
            fit = Fit(start.to("cpu", torch.float32), space, settings)
    elif not fit.done:
        logging.info("Fit Embedding: goes on at step %d, where it was stopped.", fit.count)
    if not fit.done:
        positive = node_helpers.conditioning_set_values(to_conditioning(start), {"guidance": guidance})
        guider = comfy.samplers.CFGGuider(clone)
        guider.inner_set_conds({"positive": positive})
        tokens = len(latents) * (start.token_count + math.prod(patch_grid(*latents.shape[-2:])))
        clone.add_wrapper_with_key(
            WrappersMP.PREPARE_SAMPLING, flux.WRAPPER_KEY, _room(_memory(clone, tokens).gradients)
        )
        try:
            guider.sample(
                torch.zeros_like(latents), latents, FitSampler(fit, tokens, minutes), torch.tensor([1.0, 0.0])
            )
        except comfy.model_management.InterruptProcessingException:
            logging.info("Fit Embedding: stopped at step %d and kept; queue it again to go on from there.", fit.count)
            raise
        finally:
            if fit.count:
                fits.keep(model, key, fit)
    return fit.result(), list(fit.losses)


class FitSampler(comfy.samplers.Sampler):
    """Runs a fit where core would run a sampler. What core is given back is the latent that it gave.

    tokens: text and patches of all pictures. minutes: see `fit_embedding`.
    """

    def __init__(self, fit: Fit, tokens: int, minutes: float) -> None:
        self._fit, self._tokens, self._minutes = fit, tokens, minutes

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        base, device = model_wrap.inner_model, latent_image.device
        recompute = _recompute(model_wrap.model_patcher, self._tokens, device)
        with differentiable():
            options = differentiable_options(extra_args["model_options"], base.diffusion_model, recompute)
            velocity = velocity_of(base, model_wrap.conds["positive"][0], options, device)
            # Core's are inference tensors.
            latents = latent_image.to("cpu", torch.float32, copy=True)
            if self._fit.count == 0:
                inner = options["transformer_options"]
                check_gradients(self._fit, latents, velocity, _dtype(base), base.diffusion_model, inner)
            self._run(latents, velocity, Preview(base, device, latents.shape[1:], self._fit.settings.steps))
        return latent_image

    def _run(self, latents: Tensor, velocity: Velocity, preview: Preview) -> None:
        fit, begun = self._fit, time.monotonic()
        progress = comfy.utils.ProgressBar(fit.settings.steps)
        while not fit.done:
            comfy.model_management.throw_exception_if_processing_interrupted()
            fit.step(latents, velocity)
            progress.update_absolute(fit.count, fit.settings.steps, preview.after(fit, velocity))
            if self._minutes and time.monotonic() - begun >= 60 * self._minutes:
                logging.info(
                    "Fit Embedding: %g minutes are over at step %d of %d.", self._minutes, fit.count, fit.settings.steps
                )
                return


def velocity_of(base, cond: dict, model_options: dict, device: torch.device) -> Velocity:
    """The velocity that a model of core predicts, by a processed conditioning whose tokens are replaced.

    base: core's BaseModel; cond: one entry of a guider's conds. Takes and gives tensors of any device.
    """

    def velocity(x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
        home = x.device
        x, t = x.to(device), t.to(device)
        conds = {**cond["model_conds"], "c_crossattn": comfy.conds.CONDRegular(tokens.to(device))}
        if pooled is not None:
            conds["y"] = comfy.conds.CONDRegular(pooled.to(device))
        entry = {**cond, "model_conds": conds}
        (denoised,) = comfy.samplers.calc_cond_batch(base, [[entry]], x, t, model_options)
        # Core gives x - t * velocity.
        return ((x - denoised) / t[:, None, None, None]).to(home)

    return velocity


def _dtype(base) -> torch.dtype:
    """Of the computation."""
    return base.manual_cast_dtype or base.get_dtype()


def _memory(patcher, tokens: int, recompute: bool = True) -> FitMemory:
    base, network = patcher.model, patcher.model.diffusion_model
    size = FluxSize(network.hidden_size, len(network.double_blocks), len(network.single_blocks))
    cast = base.manual_cast_dtype is not None
    return fit_memory(size, patcher.model_size(), tokens, _dtype(base).itemsize, cast, recompute)


def _recompute(patcher, tokens: int, device: torch.device) -> bool:
    """Whether blocks have to run again for their gradients to fit into what is free. Logs what the fit needs."""
    free = comfy.model_management.get_free_memory(device)
    recompute = _memory(patcher, tokens, recompute=False).gradients > _SPARE * free
    memory = _memory(patcher, tokens, recompute)
    logging.info(
        "Fit Embedding: needs %.1f GB beside the model's %.1f GB for %d tokens; %.1f GB are free.",
        memory.gradients / 1e9, memory.weights / 1e9, tokens, free / 1e9,
    )  # fmt: skip
    if memory.gradients > free:
        logging.warning("Fit Embedding: that may be too much; if it is, take a smaller picture or fp8 weights.")
    return recompute


def _room(needed: int) -> Callable:
    """A PREPARE_SAMPLING wrapper by which core leaves so many bytes free when it loads the model.

    Core reckons with the shape of the noise, so it is told of as many pictures as would need that much.
    """

    def wrapper(executor, model, noise_shape, conds, *args, **kwargs):
        one = model.model.memory_required([1, *noise_shape[1:]])
        pictures = max(noise_shape[0], math.ceil(needed / max(1, one)))
        return executor(model, [pictures, *noise_shape[1:]], conds, *args, **kwargs)

    return wrapper
