"""The guider of an edit: from the source towards the edited embedding or beyond, as far as the artist says."""

from __future__ import annotations

import math
from collections.abc import Callable

import comfy.samplers
import node_helpers

CALC_COND_BATCH = "sampler_calc_cond_batch_function"


def check_strength(strength: float) -> None:
    if not math.isfinite(strength):
        raise ValueError(f"The edit strength must be a finite number, not {strength}: 0 is the source and 1 the edit.")


class EditGuider(comfy.samplers.CFGGuider):
    """Samples with the velocity v(source) + strength * (v(edited) - v(source)).

    Strength 1 is core's own guider with the edited conditioning and strength 0 with the source: the other one is not
    even prepared. Anything else evaluates both, in one batch where their shapes allow it.
    """

    def set_edit(self, source: list, edited: list, strength: float, negative: list | None = None, cfg: float = 1.0) -> None:
        """CONDITIONINGs, a finite strength, and optionally a negative with its cfg, which needs the negative."""
        check_strength(strength)
        self.edit_strength = strength
        # Under core's name: from "positive" it shares with the others what asks for it (`control_apply_to_uncond`,
        # GLIGEN).
        conds = {"positive": source if strength == 0 else edited}
        if strength not in (0, 1):
            # Core passes the name on as the kind of prompt, and models know only two kinds.
            conds["source"] = node_helpers.conditioning_set_values(source, {"prompt_type": "positive"})
        if negative is not None:
            conds["negative"] = negative
        self.inner_set_conds(conds)
        # Without a negative core would scale the prediction itself by the cfg.
        self.set_cfg(1.0 if negative is None else cfg)

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  (core's own signature; never written to)
        if "source" in self.conds:
            # As the model's own way to evaluate conditionings: what core and other packs do before and after the
            # guidance (cfg, its functions, the optimisation at cfg 1) then sees an ordinary pair. None is copied here.
            model_options = {**model_options, CALC_COND_BATCH: self._between(model_options)}
        return super().predict_noise(x, timestep, model_options, seed)

    def _between(self, model_options: dict) -> Callable[[dict], list]:
        """A function for core's sampling_function: [edited, negative] -> [the guided prediction, the negative's]."""
        source, strength = self.conds["source"], self.edit_strength
        previous = model_options.get(CALC_COND_BATCH)

        def evaluate(args: dict) -> list:
            edited, negative = args["conds"]
            args = {**args, "model_options": model_options}
            if previous is None:
                # The source comes last: patches that ask `cond_or_uncond` know 0 as positive and 1 as negative.
                conds = [edited, negative, source]
                of_edited, of_negative, of_source = comfy.samplers.calc_cond_batch(
                    args["model"], conds, args["input"], args["sigma"], model_options
                )
            else:  # another pack's or core's, which expects a pair
                of_edited, of_negative = previous(args)
                of_source, _ = previous({**args, "conds": [source, None]})
            # Core predicts the denoised latent, not the velocity. At one x and one sigma the two (and the noise) are
            # affine in one another with the same factors for every conditioning, and a combination whose weights sum
            # to one commutes with an affine map: extrapolating the denoised latents is extrapolating the velocities.
            return [of_source + strength * (of_edited - of_source), of_negative]

        return evaluate
