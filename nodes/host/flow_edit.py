"""The guider of a flow edit: from the source's own latent to the edited picture, without a sampler of our own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import comfy.samplers
import comfy.utils
import node_helpers
import torch
from torch import Tensor

from ...kernels.flow_edit import coupled, interval
from ...kernels.noise import own_noise
from .guider import CALC_COND_BATCH, check_strength
from .source import check_flow, source_of

# In the names of core's samplers that add noise of their own.
_NOISY = ("ancestral", "sde", "ddpm", "lcm", "seeds", "sa_solver")
# What makes a conditioning look at more of x than its place in the batch: then each side is evaluated by itself.
_OF_X = ("area", "control", "gligen")


class Run(NamedTuple):
    """What one sampling starts from: the source in the model's own scale [B, C, H, W], its pictures' numbers, the sigmas."""

    source: Tensor
    pictures: list[int]
    sigmas: Tensor


class FlowEditGuider(comfy.samplers.CFGGuider):
    """`kernels/flow_edit.py` as the denoised latent that any of core's samplers asks for.

    Core begins at sigma * noise + (1 - sigma) * latent, which is the source at every sigma if it is handed as both. The
    edited side's velocity is v(source) + strength * (v(edited) - v(source)), as in Edit Guider; so at strength 0 the two
    sides are one, and what comes out is the source.
    """

    def set_edit(
        self, source: list, edited: list, latent: dict, strength: float, negative: list | None = None, cfg: float = 1.0,
        source_cfg: float = 1.0,
    ) -> None:  # fmt: skip
        """CONDITIONINGs, the source's LATENT, a finite strength, and optionally a negative with its cfg on either side."""
        check_strength(strength)
        check_flow(self.model_patcher, "Flow Edit Guider")
        self.latent, self.edit_strength = latent, strength
        source_of(latent)
        # Core passes the name on as the kind of prompt, and models know only two kinds.
        conds = {"positive": edited, "source": node_helpers.conditioning_set_values(source, {"prompt_type": "positive"})}
        if negative is not None:
            conds["negative"] = negative
        self.inner_set_conds(conds)
        # Without a negative core would scale the prediction itself by the cfg.
        self.set_cfg(1.0 if negative is None else cfg)
        self.source_cfg = 1.0 if negative is None else source_cfg

    def set_noise(self, seed: int, n_avg: int = 1, mask: Tensor | None = None) -> None:
        """seed: of the noise that both sides share; n_avg: at how many of them a step is averaged; mask: MASK outside of
        which the source is held."""
        self.seed, self.n_avg, self.mask = seed, n_avg, mask

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None
    ):
        samples, pictures = self._fit(latent_image)
        if len(sigmas) == 0:
            return samples
        mask = self._mask(denoise_mask, samples.shape)
        _check_sampler(sampler, mask is not None)
        if float(sigmas[-1]) != 0:
            raise ValueError(
                "Flow Edit Guider paints down to the last sigma, 0, and these sigmas stop before it: connect the low_sigmas "
                "of a split, or all of them."
            )
        start = self.model_patcher.model.process_latent_in(samples)
        self._run = Run(start, pictures, sigmas.cpu())
        try:
            made = super().sample(start, samples, sampler, sigmas, mask, callback, disable_pbar, seed)
        finally:
            del self._run
        if mask is None:
            return made
        return torch.where((mask > 0).to(made.device), made, samples.to(made))

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  (core's own signature; never written to)
        run = self._run
        source = run.source.to(x)
        if self.edit_strength == 0:
            return source
        time = timestep.reshape(-1, *[1] * (x.ndim - 1))
        step, change = interval(float(timestep.max()), run.sigmas), torch.zeros_like(x)
        for draw in range(self.n_avg):
            noise = own_noise(x.shape[1:], run.pictures, self.seed, step, draw).to(x)
            sides = coupled(x, source, noise, time)
            edited, unedited = self._predictions(sides, timestep, model_options, seed)
            change += edited - unedited
        return source + change / self.n_avg

    def _predictions(self, sides: tuple[Tensor, Tensor], timestep: Tensor, model_options: dict, seed) -> list[Tensor]:
        """What core's sampling_function says on the edited and on the source's side."""
        scales = (self.cfg, self.source_cfg)
        once = not model_options.get("disable_cfg1_optimization", False)
        negatives = [None if once and math.isclose(scale, 1.0) else self.conds.get("negative") for scale in scales]
        positives = [self.conds["positive"], self.conds["source"]]
        evaluated = self._evaluated(sides, positives, negatives, timestep, model_options)
        return [
            comfy.samplers.sampling_function(
                self.inner_model, x, timestep, self.conds.get("negative"), positive, scale,
                {**model_options, CALC_COND_BATCH: lambda args, pair=pair: list(pair)}, seed,
            )
            for x, positive, scale, pair in zip(sides, positives, scales, evaluated)
        ]  # fmt: skip

    def _evaluated(self, sides, positives: list, negatives: list, timestep: Tensor, model_options: dict) -> list[list]:
        """[edited, negative] of the edited side and [source, negative] of the source's."""
        between = [] if self.edit_strength == 1 else [positives[1]]
        # Patches that ask `cond_or_uncond` know 0 as positive and 1 as negative.
        conds, there = [positives[0], negatives[0], *between], [positives[1], negatives[1]]
        if previous := model_options.get(CALC_COND_BATCH):  # another pack's or core's, which expects a pair
            args = {"input": sides[0], "sigma": timestep, "model": self.inner_model, "model_options": model_options}
            out = [*previous({**args, "conds": conds[:2]}), *(previous({**args, "conds": [c, None]})[0] for c in between)]
            other = previous({**args, "input": sides[1], "conds": there})
        elif self._together(model_options):
            options = {**model_options, "model_function_wrapper": _moved(sides[1], len(conds), model_options)}
            out = comfy.samplers.calc_cond_batch(self.inner_model, conds + there, sides[0], timestep, options)
            out, other = out[: len(conds)], out[len(conds) :]
        else:
            out, other = (
                comfy.samplers.calc_cond_batch(self.inner_model, asked, x, timestep, model_options)
                for asked, x in ((conds, sides[0]), (there, sides[1]))
            )
        edited = out[2] + self.edit_strength * (out[0] - out[2]) if between else out[0]
        return [[edited, out[1]], list(other)]

    def _together(self, model_options: dict) -> bool:
        entries = (entry for conds in self.conds.values() for entry in conds)
        return "context_handler" not in model_options and not any(entry.get(key) for entry in entries for key in _OF_X)

    def _fit(self, latent_image: Tensor) -> tuple[Tensor, list[int]]:
        """The source, once for every picture of the connected latent."""
        samples, pictures = source_of(self.latent)
        if samples.shape[1:] != latent_image.shape[1:] or len(samples) not in (1, len(latent_image)):
            raise ValueError(
                f"The latent_image is {list(latent_image.shape)} and the source's latent {list(samples.shape)}: connect the "
                "source's latent to both."
            )
        if len(samples) < len(latent_image):
            return samples.repeat(len(latent_image), 1, 1, 1), list(range(len(latent_image)))
        return samples, pictures

    def _mask(self, connected: Tensor | None, shape) -> Tensor | None:
        """What may change, [B, 1, H, W]: our mask and the one that the latent carries."""
        masks = [mask for mask in (self.mask, connected) if mask is not None]
        masks = [comfy.utils.reshape_mask(mask, (shape[0], 1, *shape[2:])).cpu() for mask in masks]
        return math.prod(masks[1:], start=masks[0]) if masks else None


def _moved(x: Tensor, first: int, model_options: dict) -> Callable:
    """A model function for core: conditionings from the number `first` on are evaluated at another x."""
    previous = model_options.get("model_function_wrapper")

    def evaluate(apply_model: Callable, args: dict) -> Tensor:
        chunks = args["input"].chunk(len(args["cond_or_uncond"]))
        moved = [x.to(chunk) if index >= first else chunk for chunk, index in zip(chunks, args["cond_or_uncond"])]
        args = {**args, "input": torch.cat(moved)}
        if previous is not None:
            return previous(apply_model, args)
        return apply_model(args["input"], args["timestep"], **args["c"])

    return evaluate


def _check_sampler(sampler, masked: bool) -> None:
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__).removeprefix("sample_")
    if any(part in name for part in _NOISY):
        raise ValueError(f"The sampler {name} adds noise of its own, which a flow edit has no use for: choose euler or dpmpp_2m.")
    if "cfg_pp" in name:
        raise ValueError(f"The sampler {name} steps by the negative alone, which a flow edit does not have: choose euler.")
    if masked and getattr(sampler, "inpaint_options", {}).get("random"):
        raise ValueError("The sampler ddim puts noise outside of the mask, where the source is to be held: choose euler.")
