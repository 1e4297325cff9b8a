"""Edit by Inversion in core's SamplerCustomAdvanced, against the walks written out with the bare network."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
from comfy_extras import nodes_custom_sampler, nodes_model_advanced  # noqa: E402
from semantic_diffusion_adapter.kernels import inversion as walks  # noqa: E402
from semantic_diffusion_adapter.nodes import guide  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux, inversion  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

from .flow_edits import EDITED, NEGATIVE, SOURCE, latent, plain, watched  # noqa: E402

CLOSE = {"rtol": 2e-3, "atol": 2e-3}
NOISE = nodes_custom_sampler.Noise_RandomNoise(3)


def ours(model, method: str = "uniedit", source=SOURCE, edited=EDITED, omega=1.0, eta=0.9, eta_stop=0.5, gamma=0.5, cfg=1.0, **rest):
    """(guider, sampler)"""
    return guide.InversionEdit.execute(model, source, edited, method, omega, eta, eta_stop, gamma, cfg, **rest).result


def sigmas_of(model, steps: int = 3, denoise: float = 1.0) -> torch.Tensor:
    return nodes_custom_sampler.BasicScheduler.execute(model, "simple", steps, denoise).result[0]


def paint(made, start=None, noise=NOISE, sigmas=None, **schedule) -> torch.Tensor:
    guider, sampler = made
    start = latent() if start is None else start
    sigmas = sigmas_of(guider.model_patcher, **schedule) if sigmas is None else sigmas
    with torch.no_grad():
        return nodes_custom_sampler.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, start).result[0]["samples"]


def written_out(toy, method: str, start: dict, steps: int, denoise: float, cfg: float) -> torch.Tensor:
    base = toy.model.model
    x0 = base.process_latent_in(start["samples"])
    noise = NOISE.generate_noise(start)
    times = sigmas_of(toy.model, steps, denoise).tolist()

    def under(conditioning):
        tokens, settings = conditioning[0]

        def velocity(x, time):
            sigma = torch.full((len(x),), max(time, inversion.LEAST))
            return toy.network(x, sigma, tokens.expand(len(x), -1, -1), settings["pooled_output"].expand(len(x), -1))

        return velocity

    def of_edited(x, time):
        away, there = under(NEGATIVE)(x, time), under(EDITED)(x, time)
        return there if cfg == 1 else away + cfg * (there - away)

    up, down = {
        "uniedit": (walks.corrected, walks.plain), "fireflow": (walks.reused,) * 2, "rf_solver": (walks.midpoint,) * 2,
        "rf_inversion": (
            lambda x, times, v: walks.pulled(x, times, v, noise, 0.5), lambda x, times, v: walks.held(x, times, v, x0, 0.9, 0.5),
        ),
    }[method]  # fmt: skip
    with torch.no_grad():
        *_, x = up(x0, times[::-1], under(SOURCE))
        below = of_edited
        if method == "uniedit":
            below = lambda x, time: walks.joined(of_edited(x, time), under(SOURCE)(x, time), 1.0)  # noqa: E731
        *_, x = down(x, times, below)
    return base.process_latent_out(x)


@pytest.mark.parametrize("method", inversion.METHODS)
@pytest.mark.parametrize("batch, size, denoise, cfg", [(1, (8, 8), 1.0, 1.0), (2, (7, 10), 0.6, 3.0)])
def test_it_is_the_walks_written_out(toy, method, batch, size, denoise, cfg):
    start = latent(size, batch)
    found = paint(ours(toy.model, method, cfg=cfg, negative=NEGATIVE), start, denoise=denoise)
    assert torch.allclose(found, written_out(toy, method, start, 3, denoise, cfg), **CLOSE)
    assert not torch.allclose(found, start["samples"], rtol=0.1, atol=0.1), "the edit must do something"


@pytest.mark.parametrize("method", ["uniedit", "fireflow", "rf_solver"])
def test_an_edit_to_itself_comes_back_to_the_source_as_steps_grow_finer(toy, method):
    made, source = ours(toy.model, method, edited=SOURCE), latent()["samples"]
    coarse, fine = ((paint(made, steps=steps, denoise=0.6) - source).abs().max() for steps in (8, 32))
    assert fine < 0.05 and fine < 0.5 * coarse


def test_rf_inversion_pulled_all_the_way_gives_the_source_back(toy):
    found = paint(ours(toy.model, "rf_inversion", eta=1.0, eta_stop=1.0))
    assert torch.allclose(found, latent()["samples"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", inversion.METHODS)
def test_outside_the_mask_is_the_source(toy, method):
    start, mask = latent((8, 10), 2), torch.zeros(1, 1, 64, 80)
    mask[..., :32, :] = 1
    found = paint(ours(toy.model, method), {**start, "noise_mask": mask})
    assert torch.allclose(found[:, :, 4:], start["samples"][:, :, 4:], rtol=0, atol=1e-6)
    assert ((found - start["samples"]).abs() > 1e-3)[:, :, :4].float().mean() > 0.9


def test_a_white_mask_changes_nothing(toy):
    white = {**latent(), "noise_mask": torch.ones(1, 1, 64, 64)}
    assert torch.equal(paint(ours(toy.model), white), paint(ours(toy.model)))


@pytest.mark.parametrize("method, evaluations", [("uniedit", 4 + 6), ("fireflow", 4 + 4), ("rf_solver", 6 + 6), ("rf_inversion", 6)])
def test_its_cost(toy, method, evaluations):
    model, sizes = watched(toy.model)
    paint(ours(model, method, negative=NEGATIVE))
    assert sizes == [1] * evaluations


@pytest.mark.parametrize("method", inversion.METHODS[:3])
def test_the_noise_is_not_used_but_by_rf_inversion(toy, method):
    none = nodes_custom_sampler.Noise_EmptyNoise()
    assert torch.equal(paint(ours(toy.model, method)), paint(ours(toy.model, method), noise=none))
    with pytest.raises(ValueError, match="connect RandomNoise in place of DisableNoise"):
        paint(ours(toy.model, "rf_inversion"), noise=none)
    paint(ours(toy.model, "rf_inversion", gamma=0.0), noise=none)


def test_conditionings_of_other_lengths_and_embeddings(toy, embedding):
    assert paint(ours(toy.model, edited=plain(4, length=9))).isfinite().all()
    source, edited = to_conditioning(embedding("tree64", seed=1)), to_conditioning(embedding("quad64", seed=2))
    masked, free = (paint(ours(model, "fireflow", source, edited)) for model in (flux.patch(toy.model), toy.model))
    assert not torch.allclose(masked, free, **CLOSE), "the masks must matter"


def test_progress_goes_up_to_the_last_of_both_ways(toy):
    seen = []
    guider, sampler = ours(toy.model)
    sigmas = sigmas_of(toy.model)
    samples = latent()["samples"]
    with torch.no_grad():
        guider.sample(samples, samples, sampler, sigmas, callback=lambda *said: seen.append(said))
    assert [(step, total) for step, *_, total in seen] == [(step, 6) for step in range(6)]
    assert all(denoised.shape == x.shape == samples.shape for _, denoised, x, _ in seen)


def test_interrupted_and_rerun_it_is_the_same_picture(toy):
    expected, made = paint(ours(toy.model)), ours(toy.model)
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        paint(made)
    assert torch.equal(paint(made), expected)
    assert "source" not in toy.model.model_options


def test_refusals(toy):
    guider, sampler = ours(toy.model)
    with pytest.raises(ValueError, match="connect its own sampler output, beside"):
        paint((guider, comfy.samplers.sampler_object("euler")))
    (other,) = nodes_custom_sampler.BasicGuider.execute(toy.model, EDITED).result
    with pytest.raises(ValueError, match="connect the guider of its Edit by Inversion"):
        paint((other, sampler))
    with pytest.raises(ValueError, match="latent_image is empty: connect VAE Encode"):
        paint((guider, sampler), {"samples": torch.zeros(1, 8, 8, 8)})
    with pytest.raises(ValueError, match="stop before it: connect the low_sigmas"):
        paint((guider, sampler), sigmas=torch.tensor([1.0, 0.5]))
    (eps,) = nodes_model_advanced.ModelSamplingDiscrete().patch(toy.model, "eps", False)
    with pytest.raises(ValueError, match="Edit by Inversion needs a flow model"):
        ours(eps)
