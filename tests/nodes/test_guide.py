"""The edit guider in core's SamplerCustomAdvanced: core's own guiders at its ends, velocities written out in between."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.hooks  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.utils  # noqa: E402
from comfy_extras import nodes_custom_sampler, nodes_slg  # noqa: E402
from semantic_diffusion_adapter.nodes import guide  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

from .flow_edits import watched  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def plain(seed: int, length: int = 5) -> list:
    """An ordinary text conditioning."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 24, generator=generator)
    return [[torch.randn(1, length, 24, generator=generator), {"pooled_output": pooled}]]


SOURCE, EDITED, NEGATIVE = plain(1), plain(2), plain(3)


def ours(model, strength: float, source=SOURCE, edited=EDITED, negative=None, cfg: float = 1.0):
    (guider,) = guide.EditGuider.execute(model, source, edited, strength, cfg, negative).result
    return guider


def cores(model, positive, negative=None, cfg: float = 1.0):
    if negative is None:
        return nodes_custom_sampler.BasicGuider.execute(model, positive).result[0]
    return nodes_custom_sampler.CFGGuider.execute(model, positive, negative, cfg).result[0]


def paint(guider, steps: int = 2, size=(8, 8), batch: int = 1) -> torch.Tensor:
    """The latent that core's SamplerCustomAdvanced gives (euler, simple, seed 0)."""
    schedule = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(schedule, "simple", steps)
    noise, sampler = nodes_custom_sampler.Noise_RandomNoise(0), comfy.samplers.sampler_object("euler")
    latent = {"samples": torch.zeros(batch, 8, *size)}
    with torch.no_grad():
        return nodes_custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).result[0]["samples"]


@pytest.mark.parametrize("negative, cfg", [(None, 1.0), (None, 4.0), (NEGATIVE, 1.0), (NEGATIVE, 4.0)])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_ends_are_cores_guiders_bit_for_bit(toy, strength, negative, cfg):
    expected = cores(toy.model, EDITED if strength else SOURCE, negative, cfg)
    assert torch.equal(paint(ours(toy.model, strength, negative=negative, cfg=cfg)), paint(expected))


@pytest.mark.parametrize("strength", [0.5, -1.0, 2.5])
def test_one_step_is_the_combination_of_the_two_denoised(toy, strength):
    """One euler step to sigma 0 is the denoised prediction itself."""
    source, edited = paint(cores(toy.model, SOURCE), steps=1), paint(cores(toy.model, EDITED), steps=1)
    result = paint(ours(toy.model, strength), steps=1)
    assert torch.allclose(result, source + strength * (edited - source), **CLOSE)
    if strength == 0.5:
        assert torch.allclose(result, (source + edited) / 2, **CLOSE)
    assert not torch.allclose(source, edited, **CLOSE), "the two must differ, or this test shows nothing"


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_whole_sampling_is_euler_with_the_guided_velocity(toy, batch, cfg):
    """The definition in velocities, by hand and with the bare network."""
    guider = ours(toy.model, 1.5, negative=NEGATIVE, cfg=cfg)
    result = paint(guider, steps=3, batch=batch)
    schedule = toy.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(schedule, "simple", 3)
    x = nodes_custom_sampler.Noise_RandomNoise(0).generate_noise({"samples": torch.zeros(batch, 8, 8, 8)})

    def velocity(conditioning, sigma):
        tokens, settings = conditioning[0]
        time = sigma.expand(batch)
        return toy.network(x, time, tokens.expand(batch, -1, -1), settings["pooled_output"].expand(batch, -1))

    with torch.no_grad():
        for sigma, following in zip(sigmas[:-1], sigmas[1:]):
            source, edited, negative = (velocity(c, sigma) for c in (SOURCE, EDITED, NEGATIVE))
            guided = source + 1.5 * (edited - source)
            x = x + (following - sigma) * (negative + cfg * (guided - negative))
    assert torch.allclose(result, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "strength, negative, cfg, evaluations",
    [
        (1.0, None, 1.0, 1), (0.0, None, 1.0, 1), (0.5, None, 1.0, 2), (0.5, None, 3.0, 2), (0.5, NEGATIVE, 1.0, 2),
        (1.0, NEGATIVE, 3.0, 2), (0.0, NEGATIVE, 3.0, 2), (0.5, NEGATIVE, 3.0, 3),
    ],
)  # fmt: skip
def test_a_step_costs_what_it_must_in_one_forward(toy, strength, negative, cfg, evaluations):
    model, sizes = watched(toy.model)
    paint(ours(model, strength, negative=negative, cfg=cfg))
    assert sizes == [evaluations, evaluations]


def test_conditionings_of_other_lengths_are_evaluated_apart(toy):
    model, sizes = watched(toy.model)
    longer = plain(4, length=9)
    result = paint(ours(model, 0.5, edited=longer), steps=1)
    assert sizes == [1, 1]
    halves = [paint(cores(toy.model, c), steps=1) for c in (SOURCE, longer)]
    assert torch.allclose(result, (halves[0] + halves[1]) / 2, **CLOSE)


def test_embeddings_keep_their_own_boxes(toy, embedding):
    model = flux.patch(toy.model)
    source, edited = to_conditioning(embedding("tree64", seed=1)), to_conditioning(embedding("quad64", seed=2))
    watched_model, sizes = watched(model)
    result = paint(ours(watched_model, 0.5, source, edited), steps=1)
    assert sizes == [2], "equal token counts should share one forward, or this test shows little"
    halves = [paint(cores(model, c), steps=1) for c in (source, edited)]
    assert torch.allclose(result, (halves[0] + halves[1]) / 2, **CLOSE)
    unmasked = [paint(cores(toy.model, c), steps=1) for c in (source, edited)]
    assert not torch.allclose(result, (unmasked[0] + unmasked[1]) / 2, **CLOSE), "the masks must matter"


def test_functions_around_the_guidance_see_an_ordinary_pair(toy):
    """What other nodes hang before and after the cfg, and what they ask for by `disable_cfg1_optimization`."""
    model, sizes = watched(toy.model)
    seen = []
    model.set_model_sampler_pre_cfg_function(
        lambda args: seen.append(args) or args["conds_out"], disable_cfg1_optimization=True
    )
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args) or args["denoised"] + 1)
    result = paint(ours(model, 0.5, negative=NEGATIVE, cfg=1.0), steps=1)
    before, after = seen
    source, edited, negative = (paint(cores(toy.model, c), steps=1) for c in (SOURCE, EDITED, NEGATIVE))
    middle = (source + edited) / 2
    assert sizes == [3], "the negative was asked for although cfg is 1"
    assert len(before["conds"]) == len(before["conds_out"]) == 2
    for prediction, expected in zip(before["conds_out"], (middle, negative)):
        assert torch.allclose(prediction, expected, **CLOSE)
    assert torch.allclose(after["cond_denoised"], middle, **CLOSE)
    assert torch.allclose(result, middle + 1, **CLOSE)


def test_another_way_to_evaluate_conditionings_is_kept(toy):
    """Core's Skip Layer Guidance unpacks exactly a pair, and evaluates its negative without a block."""
    (skipping,) = nodes_slg.SkipLayerGuidanceDiTSimple.execute(
        toy.model, double_layers="1", single_layers="0", start_percent=0.0, end_percent=1.0
    ).result
    result = paint(ours(skipping, 0.5, negative=NEGATIVE, cfg=3.0), steps=1)
    source, edited = (paint(cores(toy.model, c), steps=1) for c in (SOURCE, EDITED))
    skipped = paint(cores(skipping, SOURCE, NEGATIVE, 3.0), steps=1)
    negative = (3.0 * source - skipped) / 2.0
    assert not torch.allclose(negative, paint(cores(toy.model, NEGATIVE), steps=1), **CLOSE), "a block must be skipped"
    assert torch.allclose(result, negative + 3.0 * ((source + edited) / 2 - negative), rtol=1e-3, atol=1e-3)


def test_hooks_of_one_conditioning_stay_with_it(toy):
    """A LoRA that hangs on the edited conditioning alone."""
    lora = {
        "diffusion_model.txt_in.lora_up.weight": torch.randn(64, 2),
        "diffusion_model.txt_in.lora_down.weight": torch.randn(2, 24),
    }
    hooked = comfy.hooks.set_hooks_for_conditioning(EDITED, comfy.hooks.create_hook_lora(lora, 1.0, 0.0))
    before = paint(cores(toy.model, EDITED), steps=1)
    source, edited = paint(cores(toy.model, SOURCE), steps=1), paint(cores(toy.model, hooked), steps=1)
    assert not torch.allclose(edited, before, **CLOSE), "the LoRA must do something"
    assert torch.allclose(paint(ours(toy.model, 0.5, edited=hooked), steps=1), (source + edited) / 2, **CLOSE)
    assert torch.equal(paint(cores(toy.model, EDITED), steps=1), before)


def test_models_are_told_the_kind_of_prompt_they_know(toy, monkeypatch):
    kinds = []
    network = toy.model.model
    original = network.extra_conds
    monkeypatch.setattr(network, "extra_conds", lambda **kwargs: kinds.append(kwargs["prompt_type"]) or original(**kwargs))
    paint(ours(toy.model, 0.5, negative=NEGATIVE, cfg=2.0), steps=1)
    assert sorted(kinds) == ["negative", "positive", "positive"]
    assert SOURCE[0][1].keys() == {"pooled_output"}, "the artist's conditioning must be left as it was"


@pytest.mark.parametrize("where", ["between steps", "in a forward"])
def test_interrupted_and_rerun_it_is_the_same_picture(toy, embedding, monkeypatch, where):
    model = flux.patch(toy.model)
    source, edited = to_conditioning(embedding(seed=1)), to_conditioning(embedding(seed=2))
    expected = paint(ours(model, 0.5, source, edited))
    stop = comfy.model_management.InterruptProcessingException

    def interrupt(*args, **kwargs):
        raise stop

    guider = ours(model, 0.5, source, edited)
    options = dict(guider.model_options)
    with monkeypatch.context() as broken:
        if where == "between steps":
            broken.setattr(comfy.utils, "PROGRESS_BAR_HOOK", interrupt)
        else:
            broken.setattr(toy.network.single_blocks[1], "forward", interrupt)
        with pytest.raises(stop):
            paint(guider)
    assert guider.model_options == options == model.model_options, "nothing may be left behind"
    assert torch.equal(paint(guider), expected) and torch.equal(paint(ours(model, 0.5, source, edited)), expected)


def test_refusals(toy):
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="edit strength must be a finite number"):
            ours(toy.model, strength)
