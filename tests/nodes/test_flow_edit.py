"""The flow edit guider in core's SamplerCustomAdvanced, against the paper's steps written out with the bare network."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.hooks  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.utils  # noqa: E402
import node_helpers  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from comfy_extras import nodes_custom_sampler, nodes_model_advanced, nodes_slg  # noqa: E402
from semantic_diffusion_adapter.kernels.noise import own_noise  # noqa: E402
from semantic_diffusion_adapter.nodes import guide  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
SEED = 5


def plain(seed: int, length: int = 5) -> list:
    """An ordinary text conditioning."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 24, generator=generator)
    return [[torch.randn(1, length, 24, generator=generator), {"pooled_output": pooled}]]


SOURCE, EDITED, NEGATIVE = plain(1), plain(2), plain(3)


def latent(size=(8, 8), batch: int = 1, seed: int = 9) -> dict:
    return {"samples": torch.randn(batch, 8, *size, generator=torch.Generator().manual_seed(seed))}


def ours(model, source=SOURCE, edited=EDITED, start=None, strength=1.0, n_avg=1, seed=SEED, cfg=1.0, source_cfg=1.0, **rest):
    start = latent() if start is None else start
    return guide.FlowEditGuider.execute(model, source, edited, start, strength, n_avg, seed, cfg, source_cfg, **rest).result[0]


def paint(guider, start=None, steps: int = 3, sampler: str = "euler", denoise: float = 1.0, noise: int = 0, sigmas=None):
    schedule = guider.model_patcher
    if sigmas is None:
        (sigmas,) = nodes_custom_sampler.BasicScheduler.execute(schedule, "simple", steps, denoise).result
    start = latent() if start is None else start
    chosen = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    with torch.no_grad():
        return nodes_custom_sampler.SamplerCustomAdvanced.execute(
            nodes_custom_sampler.Noise_RandomNoise(noise), guider, chosen, sigmas, start
        ).result[0]["samples"]


def written_out(toy, start: dict, steps: int, strength=1.0, n_avg=1, cfg=1.0, source_cfg=1.0, denoise=1.0, mask=1.0):
    """The paper's algorithm in velocities, with the bare network."""
    x0 = toy.model.model.process_latent_in(start["samples"])
    (sigmas,) = nodes_custom_sampler.BasicScheduler.execute(toy.model, "simple", steps, denoise).result
    pictures = start.get("batch_index", range(len(x0)))
    z = x0

    def velocity(x, conditioning, sigma):
        tokens, settings = conditioning[0]
        rows = len(x)
        return toy.network(x, sigma.expand(rows), tokens.expand(rows, -1, -1), settings["pooled_output"].expand(rows, -1))

    def guided(x, positive, scale, sigma):
        away = velocity(x, NEGATIVE, sigma)
        return away + scale * (positive - away)

    with torch.no_grad():
        for step, (sigma, later) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            total = 0
            for draw in range(n_avg):
                noise = own_noise(x0.shape[1:], pictures, SEED, step, draw)
                zs = (1 - sigma) * x0 + sigma * noise
                zt = z + zs - x0
                there = velocity(zt, SOURCE, sigma)
                edited = there + strength * (velocity(zt, EDITED, sigma) - there)
                total = total + guided(zt, edited, cfg, sigma) - guided(zs, velocity(zs, SOURCE, sigma), source_cfg, sigma)
            z = z + mask * (later - sigma) * total / n_avg
    return toy.model.model.process_latent_out(z)


def watched(model) -> tuple[object, list[int]]:
    """A clone of the model, and the list of what each of its forwards will have had as a batch."""
    sizes = []

    def watch(executor, x, *args, **kwargs):
        sizes.append(x.shape[0])
        return executor(x, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", watch)
    return clone, sizes


@pytest.mark.parametrize(
    "case",
    [{}, {"n_avg": 3}, {"strength": 0.5}, {"strength": -0.5, "n_avg": 2}, {"cfg": 3.0, "source_cfg": 1.5}, {"denoise": 0.6}],
    ids=str,
)
@pytest.mark.parametrize("batch, size", [(1, (8, 8)), (2, (7, 10))])
def test_it_is_the_papers_algorithm(toy, case, batch, size):
    start = latent(size, batch)
    expected = written_out(toy, start, 3, **case)
    case = dict(case)
    denoise = case.pop("denoise", 1.0)
    found = paint(ours(toy.model, start=start, negative=NEGATIVE, **case), start, denoise=denoise)
    assert torch.allclose(found, expected, **CLOSE)
    assert not torch.allclose(found, start["samples"], rtol=0.1, atol=0.1), "the edit must do something"


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "res_multistep", "uni_pc", "lms", "deis"])
def test_strength_0_and_an_edit_to_itself_give_the_source_back(toy, sampler):
    for guider in (ours(toy.model, strength=0.0), ours(toy.model, edited=SOURCE), ours(toy.model, edited=SOURCE, strength=2.0)):
        close = 2e-3 if sampler == "uni_pc" else 1e-4  # core ends it at sigma 0.001 and scales by that
        assert torch.allclose(paint(guider, sampler=sampler, steps=5), latent()["samples"], rtol=close, atol=close)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "res_multistep", "uni_pc", "lms", "deis", "ipndm", "ddim"])
def test_cores_samplers_find_the_same_picture(toy, sampler):
    """With one noise at every step the field is smooth, and fine steps of every sampler end at one place."""
    (model,) = nodes_model_advanced.ModelSamplingFlux().patch(toy.model, 1.15, 0.5, 64, 64)
    guider = ours(model, n_avg=1)
    fine, coarse = paint(guider, steps=60), paint(guider, steps=60, sampler=sampler)
    moved = (fine - latent()["samples"]).abs().mean()
    assert (fine - coarse).abs().mean() < 0.25 * moved


def test_neither_the_samplers_noise_nor_the_order_of_the_batch_counts(toy):
    start = latent((8, 8), 3)
    all_three = paint(ours(toy.model, start=start), start, noise=1)
    picked = {"samples": start["samples"][[2, 0]], "batch_index": [2, 0]}
    two = paint(ours(toy.model, start=picked), picked, noise=2)
    assert torch.allclose(two, all_three[[2, 0]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(paint(ours(toy.model, start=start, seed=6), start), all_three, **CLOSE)


def test_one_source_makes_as_many_pictures_as_the_latent_that_is_connected(toy):
    many = paint(ours(toy.model), {"samples": torch.zeros(3, 8, 8, 8)})
    assert many.shape[0] == 3 and not torch.allclose(many[0], many[1], **CLOSE)
    assert torch.allclose(many[:1], paint(ours(toy.model)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("through", ["guider", "latent", "both"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "uni_pc"])
def test_outside_the_mask_is_exactly_the_source(toy, through, sampler):
    start, mask, other = latent((8, 10), 2), torch.zeros(1, 64, 80), torch.zeros(1, 64, 80)
    mask[:, :32], other[:, :, 40:] = 1, 1
    carried = {**start, "noise_mask": other[:, None]} if through != "guider" else start
    given = {"mask": mask} if through != "latent" else {}
    found = paint(ours(toy.model, start=start, **given), carried, sampler=sampler)
    inside = torch.ones(8, 10, dtype=torch.bool)
    if through != "latent":
        inside[4:] = False
    if through != "guider":
        inside[:, :5] = False
    assert torch.equal(found[..., ~inside], start["samples"][..., ~inside])
    assert ((found - start["samples"]).abs() > 1e-3)[..., inside].float().mean() > 0.9


def test_the_masked_algorithm_is_the_papers_with_the_rest_held(toy):
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    found = paint(ours(toy.model, mask=mask.repeat_interleave(8, 0).repeat_interleave(8, 1)[None]))
    assert torch.allclose(found, written_out(toy, latent(), 3, mask=mask), **CLOSE)


@pytest.mark.parametrize(
    "case, evaluations",
    [
        ({}, 2), ({"n_avg": 2}, 2), ({"strength": 0.5}, 3), ({"cfg": 3.0}, 3), ({"cfg": 3.0, "source_cfg": 2.0}, 4),
        ({"cfg": 3.0, "source_cfg": 2.0, "strength": 2.0}, 5),
    ],
)  # fmt: skip
def test_both_sides_share_a_forward(toy, case, evaluations):
    model, sizes = watched(toy.model)
    paint(ours(model, negative=NEGATIVE, **case), steps=2)
    assert sizes == [evaluations] * 2 * case.get("n_avg", 1)


def test_strength_0_evaluates_nothing(toy):
    model, sizes = watched(toy.model)
    paint(ours(model, strength=0.0))
    assert sizes == []


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_apart_and_together_are_the_same(toy, strength, cfg):
    """An area of the whole picture makes core crop x, so the sides are evaluated by themselves."""
    case = {"strength": strength, "cfg": cfg, "source_cfg": 1.5, "negative": NEGATIVE}
    area = node_helpers.conditioning_set_values(SOURCE, {"area": (8, 8, 0, 0), "strength": 1.0})
    (model, sizes), (other, more) = watched(toy.model), watched(toy.model)
    assert torch.allclose(paint(ours(model, **case)), paint(ours(other, source=area, **case)), **CLOSE)
    assert len(more) > len(sizes) == 3


def test_conditionings_of_other_lengths(toy):
    longer = plain(4, length=9)
    model, sizes = watched(toy.model)
    found = paint(ours(model, edited=longer))
    assert sizes == [1] * 6
    same = node_helpers.conditioning_set_values(longer, {})
    assert torch.equal(found, paint(ours(toy.model, edited=same)))


def test_embeddings_keep_their_own_boxes(toy, embedding):
    model = flux.patch(toy.model)
    source, edited = to_conditioning(embedding("tree64", seed=1)), to_conditioning(embedding("quad64", seed=2))
    model_watched, sizes = watched(model)
    found = paint(ours(model_watched, source, edited))
    assert sizes == [2] * 3
    apart = node_helpers.conditioning_set_values(source, {"area": (8, 8, 0, 0), "strength": 1.0})
    assert torch.allclose(found, paint(ours(model, apart, edited)), **CLOSE)
    assert not torch.allclose(found, paint(ours(toy.model, source, edited)), **CLOSE), "the masks must matter"
    assert torch.allclose(paint(ours(model, source, source)), latent()["samples"], rtol=1e-4, atol=1e-4)


def test_functions_around_the_guidance_see_either_side(toy):
    model = toy.model.clone()
    seen = []
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args) or args["denoised"] + 1)
    assert torch.allclose(paint(ours(model), steps=1), paint(ours(toy.model), steps=1), **CLOSE), "what both add cancels"
    assert [args["cond"] is args["input_cond"] if "input_cond" in args else True for args in seen] == [True, True]
    assert not torch.equal(*(args["cond_denoised"] for args in seen))


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


def test_refusals(toy):
    for strength in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="edit strength must be a finite number"):
            ours(toy.model, strength=strength)
    with pytest.raises(ValueError, match="latent is empty: connect VAE Encode"):
        ours(toy.model, start={"samples": torch.zeros(1, 8, 8, 8)})
    with pytest.raises(ValueError, match="still pictures"):
        ours(toy.model, start={"samples": torch.ones(1, 8, 1, 8, 8)})
    for other in (latent((8, 10)), latent(batch=1)):
        with pytest.raises(ValueError, match="connect the source's latent to both"):
            paint(ours(toy.model, start=latent(batch=3)), other)
    with pytest.raises(ValueError, match="stop before it: connect the low_sigmas"):
        paint(ours(toy.model), sigmas=torch.tensor([1.0, 0.5]))
    mask = torch.ones(1, 64, 64)
    with pytest.raises(ValueError, match="ddim puts noise outside of the mask"):
        paint(ours(toy.model, mask=mask), sampler="ddim")
    (other,) = nodes_model_advanced.ModelSamplingDiscrete().patch(toy.model, "eps", False)
    with pytest.raises(ValueError, match="Flow Edit Guider needs a flow model"):
        ours(other)


def test_no_steps_are_the_source(toy):
    assert torch.equal(paint(ours(toy.model), sigmas=torch.FloatTensor([])), latent()["samples"])
