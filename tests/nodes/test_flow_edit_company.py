"""The flow edit guider beside core's samplers, hooks and guidance, and other packs' functions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.hooks  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.utils  # noqa: E402
from comfy_extras import nodes_model_advanced, nodes_slg  # noqa: E402

from .flow_edits import CLOSE, EDITED, NEGATIVE, SOURCE, latent, ours, paint, watched  # noqa: E402


def test_functions_around_the_guidance_see_either_side(toy):
    model = toy.model.clone()
    seen = []
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args) or args["denoised"] + 1)
    assert torch.allclose(paint(ours(model), steps=1), paint(ours(toy.model), steps=1), **CLOSE), "what both add cancels"
    assert len(seen) == 2 and not torch.equal(*(args["cond_denoised"] for args in seen))


def test_another_way_to_evaluate_conditionings_is_kept(toy):
    """Core's Skip Layer Guidance unpacks exactly a pair, and evaluates its negative without a block."""
    (skipping,) = nodes_slg.SkipLayerGuidanceDiTSimple.execute(
        toy.model, double_layers="1", single_layers="0", start_percent=0.0, end_percent=1.0
    ).result
    model, sizes = watched(skipping)
    case = {"negative": NEGATIVE, "cfg": 3.0, "source_cfg": 3.0}
    found = paint(ours(model, strength=0.5, **case))
    assert len(sizes) > 3
    assert not torch.allclose(found, paint(ours(toy.model, strength=0.5, **case)), **CLOSE)
    assert torch.allclose(paint(ours(skipping, edited=SOURCE, **case)), latent()["samples"], rtol=1e-4, atol=1e-4)


def test_another_packs_model_function_is_called(toy):
    model, calls = toy.model.clone(), []

    def function(apply_model, args):
        calls.append(tuple(args["input"].shape))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(function)
    assert torch.equal(paint(ours(model)), paint(ours(toy.model)))
    assert calls == [(2, 8, 8, 8)] * 3


def test_hooks_of_one_conditioning_stay_with_it(toy):
    """A LoRA that hangs on the edited conditioning alone."""
    lora = {
        "diffusion_model.txt_in.lora_up.weight": torch.randn(64, 2),
        "diffusion_model.txt_in.lora_down.weight": torch.randn(2, 24),
    }
    hooked = comfy.hooks.set_hooks_for_conditioning(EDITED, comfy.hooks.create_hook_lora(lora, 1.0, 0.0))
    before = paint(ours(toy.model))
    assert not torch.allclose(paint(ours(toy.model, edited=hooked)), before, **CLOSE), "the LoRA must do something"
    assert torch.equal(paint(ours(toy.model)), before)


@pytest.mark.parametrize("where", ["between steps", "in a forward"])
def test_interrupted_and_rerun_it_is_the_same_picture(toy, monkeypatch, where):
    expected, guider = paint(ours(toy.model)), ours(toy.model)
    options, stop = dict(guider.model_options), comfy.model_management.InterruptProcessingException

    def interrupt(*args, **kwargs):
        raise stop

    with monkeypatch.context() as broken:
        if where == "between steps":
            broken.setattr(comfy.utils, "PROGRESS_BAR_HOOK", interrupt)
        else:
            broken.setattr(toy.network.single_blocks[1], "forward", interrupt)
        with pytest.raises(stop):
            paint(guider)
    assert guider.model_options == options == toy.model.model_options, "nothing may be left behind"
    assert torch.equal(paint(guider), expected)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "res_multistep", "uni_pc", "lms", "deis", "ipndm", "ddim"])
def test_cores_samplers_find_the_same_picture(toy, sampler):
    """With one noise at every step the field is smooth, and fine steps of every sampler end at one place."""
    (model,) = nodes_model_advanced.ModelSamplingFlux().patch(toy.model, 1.15, 0.5, 64, 64)
    guider = ours(model, n_avg=1)
    fine, coarse = paint(guider, steps=60), paint(guider, steps=60, sampler=sampler)
    moved = (fine - latent()["samples"]).abs().mean()
    assert (fine - coarse).abs().mean() < 0.25 * moved


NOISY = [
    name for name in comfy.samplers.SAMPLER_NAMES
    if any(part in name for part in ("ancestral", "sde", "ddpm", "lcm", "seeds", "sa_solver"))
]  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_samplers_with_noise_of_their_own_are_refused_by_name(toy, name):
    with pytest.raises(ValueError, match=f"{name.removesuffix('_gpu')}.* adds noise of its own.*choose euler"):
        paint(ours(toy.model), sampler=name)


def test_every_other_sampler_of_core_holds_the_source(toy):
    """Noise that a sampler added would show where nothing is edited."""
    for name in set(comfy.samplers.SAMPLER_NAMES) - set(NOISY):
        guider = ours(toy.model, edited=SOURCE)
        if "cfg_pp" in name:
            with pytest.raises(ValueError, match=f"{name} steps by the negative alone"):
                paint(guider, sampler=name)
        elif name != "dpm_adaptive":  # decides on its number of steps, thousands of them where it sees noise
            found = paint(guider, sampler=name, steps=4)
            assert torch.allclose(found, latent()["samples"], rtol=1e-3, atol=1e-3), name
