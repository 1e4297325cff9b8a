"""Editing by inversion: the guider that holds both conditionings, and the sampler that walks up and down again.

Both ways lie in one sampler: core divides what a sampler gives it by 1 - sigma, which at sigma 1, where an inversion ends,
is zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import comfy.model_management
import comfy.samplers
import node_helpers
import torch
from torch import Tensor

from ...kernels import inversion
from .source import check_flow

METHODS = ("uniedit", "fireflow", "rf_solver", "rf_inversion")
LEAST = 1e-3  # of a sigma at which the model is asked: core gives x - sigma * velocity, which at 0 says nothing


class InversionGuider(comfy.samplers.CFGGuider):
    """Evaluates either conditioning for `InversionSampler`."""

    def set_edit(self, source: list, edited: list, negative: list | None = None, cfg: float = 1.0) -> None:
        """CONDITIONINGs, and optionally a negative with its cfg on the edited side."""
        check_flow(self.model_patcher, "Edit by Inversion")
        # Core passes the name on as the kind of prompt, and models know only two kinds.
        conds = {"positive": edited, "source": node_helpers.conditioning_set_values(source, {"prompt_type": "positive"})}
        if negative is not None:
            conds["negative"] = negative
        self.inner_set_conds(conds)
        # Without a negative core would scale the prediction itself by the cfg.
        self.set_cfg(1.0 if negative is None else cfg)

    def sample(self, noise, latent_image, sampler, *args, **kwargs):
        if not isinstance(sampler, InversionSampler):
            raise ValueError("Edit by Inversion is a sampler as well: connect its own sampler output, beside its guider.")
        return super().sample(noise, latent_image, sampler, *args, **kwargs)

    def predict_source(self, x: Tensor, timestep: Tensor, model_options: dict, seed) -> Tensor:
        """The denoised latent under the source's conditioning."""
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, None, self.conds["source"], 1.0, model_options, seed
        )


class InversionSampler(comfy.samplers.Sampler):
    """`kernels/inversion.py` from the source's latent to the first sigma, and from there down to 0."""

    def __init__(self, method: str, omega: float, eta: float, eta_stop: float, gamma: float) -> None:
        """method: one of METHODS; omega is uniedit's, the others rf_inversion's, as the kernel takes them."""
        self.method, self.omega, self.eta, self.eta_stop, self.gamma = method, omega, eta, eta_stop, gamma

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> Tensor:
        self._check(model_wrap, sigmas, noise, latent_image)
        options, seed, last = extra_args["model_options"], extra_args.get("seed"), {}

        def velocity(predict):
            def at(x: Tensor, time: float) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                sigma = max(time, LEAST)
                last["denoised"] = predict(x, sigmas.new_full((len(x),), sigma), options, seed)
                return (x - last["denoised"]) / sigma

            return at

        of_edited, of_source = velocity(model_wrap.predict_noise), velocity(model_wrap.predict_source)
        times, rising = sigmas.tolist(), sigmas.tolist()[::-1]
        steps, passed = len(times) - 1, [latent_image]

        def seen(step: int, x: Tensor) -> None:
            if callback is not None:
                callback(step, last.get("denoised", x), x, 2 * steps)

        for step, x in enumerate(self._up(latent_image, rising, of_source, noise)):
            passed.append(x)
            seen(step, x)
        for step, x in enumerate(self._down(passed[-1], times, of_edited, of_source, latent_image)):
            if denoise_mask is not None:  # the rest goes back the way that it came
                x.copy_(denoise_mask * x + (1 - denoise_mask) * passed[steps - 1 - step])
            seen(steps + step, x)
        return x

    def _up(self, x: Tensor, times: list[float], velocity: inversion.Velocity, noise: Tensor) -> Iterator[Tensor]:
        if self.method == "rf_inversion":
            return inversion.pulled(x, times, velocity, noise, self.gamma)
        walk = {"uniedit": inversion.corrected, "fireflow": inversion.reused, "rf_solver": inversion.midpoint}
        return walk[self.method](x, times, velocity)

    def _down(self, x: Tensor, times: list[float], edited, source, latent: Tensor) -> Iterator[Tensor]:
        if self.method == "rf_inversion":
            return inversion.held(x, times, edited, latent, self.eta, self.eta_stop)
        if self.method == "uniedit":
            joined = lambda x, time: inversion.joined(edited(x, time), source(x, time), self.omega)  # noqa: E731
            return inversion.plain(x, times, joined)
        return {"fireflow": inversion.reused, "rf_solver": inversion.midpoint}[self.method](x, times, edited)

    def _check(self, guider, sigmas: Tensor, noise: Tensor, latent: Tensor | None) -> None:
        if not isinstance(guider, InversionGuider):
            raise ValueError("This sampler inverts under the source's conditioning: connect the guider of its Edit by Inversion.")
        if latent is None or not torch.any(latent):
            raise ValueError("The latent_image is empty: connect VAE Encode of the source picture.")
        if latent.ndim != 4:
            raise ValueError(f"The source's latent must be of still pictures, not of shape {list(latent.shape)}.")
        if len(sigmas) < 2 or float(sigmas[-1]) != 0:
            raise ValueError(
                "Edit by Inversion walks up from sigma 0 and down to it again, and these sigmas stop before it: connect the "
                "low_sigmas of a split, or all of them."
            )
        if self.method == "rf_inversion" and self.gamma > 0 and not torch.any(noise):
            raise ValueError("rf_inversion is led towards a noise: connect RandomNoise in place of DisableNoise, or set gamma to 0.")
