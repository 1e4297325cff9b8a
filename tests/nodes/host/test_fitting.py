"""A fit inside core's own sampling: it works, is checked before it begins, can be stopped, and leaves nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.cli_args  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.utils  # noqa: E402
from semantic_diffusion_adapter.kernels.fit import Fit, FitSettings  # noqa: E402
from semantic_diffusion_adapter.kernels.text_space import TextSpace  # noqa: E402
from semantic_diffusion_adapter.nodes.host import fits, fitting, flux, gradient_check, gradients  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

SPACE = TextSpace(torch.zeros(24), torch.ones(24))
LATENTS = torch.randn(1, 8, 6, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    fits._kept.clear()


def fit(model, start, steps: int = 6, latents=LATENTS, minutes: float = 0.0, **settings):
    with torch.inference_mode():  # as core runs nodes
        return fitting.fit_embedding(model, latents.clone(), start, SPACE, FitSettings(steps=steps, **settings), minutes)


@pytest.fixture
def hook():
    """hook(function) hears the progress as (value, total, preview, whatever newer cores add). Those tell the first step and
    the last, and of others no more than ten a second."""
    yield comfy.utils.set_progress_bar_global_hook
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.model_management.interrupt_current_processing(False)


@pytest.mark.parametrize("preset", ["tree64", "global16"], ids=["regions", "trivial layout"])
@pytest.mark.parametrize("pooled", [False, True], ids=["tokens", "pooled too"])
def test_the_loss_falls(toy, embedding, preset, pooled):
    start = embedding(preset)
    fitted, losses = fit(toy.model, start, 24, pooled=pooled)
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    assert fitted.source["fit"]["steps"] == len(losses) == 24
    assert torch.equal(fitted.boxes, start.boxes) and not torch.equal(fitted.tokens, start.tokens)
    assert torch.equal(fitted.pooled, start.pooled) is not pooled


@pytest.mark.parametrize("preset", ["tree64", "global16"], ids=["regions", "trivial layout"])
def test_running_blocks_again_changes_no_loss(toy, embedding, monkeypatch, preset):
    start = embedding(preset, batch=2)
    latents = torch.cat([LATENTS, LATENTS.flip(-1)])
    _, kept = fit(toy.model, start, 3, latents)
    fits._kept.clear()
    monkeypatch.setattr(fitting, "_SPARE", 0)
    _, again = fit(toy.model, start, 3, latents)
    assert again == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("preset", ["tree64", "global16"], ids=["regions", "trivial layout"])
def test_gradients_pass_a_stricter_check_through_lora_and_another_packs_kernel(toy, embedding, monkeypatch, preset):
    monkeypatch.setattr(gradient_check, "_FINE", ((1e-3,), 0.005))
    plain = fit(toy.model, embedding(preset), 2, pooled=True)[1]
    low = 0.2 * torch.randn(192, 64, generator=torch.Generator().manual_seed(3))
    patched = toy.model.clone()
    assert patched.add_patches({"diffusion_model.double_blocks.0.img_attn.qkv.weight": (low,)})
    kernel = toy.model.clone()
    kernel.model_options["transformer_options"] = {
        "optimized_attention_override": lambda func, q, k, v, heads, **more: func(q.detach(), k.detach(), v.detach(), heads, **more)
    }
    assert fit(kernel, embedding(preset), 2, pooled=True)[1] == pytest.approx(plain, rel=1e-5)
    assert fit(patched, embedding(preset), 2, pooled=True)[1] != pytest.approx(plain, rel=1e-3)


def guided(model, start, run):
    """What `run(guider, latents)` gives inside core's sampling, in the place of the fit."""

    class Probe(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *rest):
            self.found = run(model_wrap, extra_args["model_options"], latent_image.clone())
            return latent_image

    guider, probe = comfy.samplers.CFGGuider(flux.patch(model)), Probe()
    guider.inner_set_conds({"positive": to_conditioning(start)})
    guider.sample(torch.zeros_like(LATENTS), LATENTS, probe, torch.tensor([1.0, 0.0]))
    return probe.found


def test_the_check_finds_the_known_wrong_way(toy, embedding):
    start = embedding("tree64")

    def run(guider, options, latents):
        base = guider.inner_model

        def difference(velocity):
            with torch.enable_grad():
                return gradient_check.difference(Fit(start, SPACE, FitSettings()), latents, velocity, torch.float32)

        # Core's forward as it is, under one checkpoint, as core's own training node does by default.
        options = gradients.differentiable_options(options, base.diffusion_model, recompute=False)
        plain = fitting.velocity_of(base, guider.conds["positive"][0], options, latents.device)
        base.diffusion_model.requires_grad_(False)
        wrong = difference(lambda *arguments: checkpoint(plain, *arguments, use_reentrant=False))
        with gradients.differentiable():
            return wrong, difference(plain)

    wrong, right = guided(toy.model, start, run)
    assert right is None and wrong is not None


def test_a_node_that_breaks_the_gradients_is_named_and_refused(toy, embedding):
    def caching(args, more):  # of another pack: what it gives has no gradient
        return {name: value.detach() for name, value in more["original_block"](args).items()}

    def adding(args, more):  # a statement whose effect would be lost
        out = more["original_block"](args)
        out["img"].add_(out["img"].mean(1, keepdim=True))
        return out

    caching.__module__ = "custom_nodes.ComfyUI-SomeCache.nodes"
    for patch in (caching, adding):
        model = toy.model.clone()
        model.set_model_patch_replace(patch, "dit", "double_block", 1)
        with pytest.raises(ValueError, match="gradients through this model are wrong .* connect the model from before"):
            fit(model, embedding("tree64"))


def test_nothing_outlives_a_fit(toy, embedding):
    model, positive = flux.patch(toy.model), to_conditioning(embedding("tree64"))

    def state():
        modules = list(toy.network.modules())
        return (
            [parameter.requires_grad for parameter in toy.network.parameters()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training) for m in modules],
            getattr(comfy.model_management, "in_training", None),
            copy.deepcopy(model.model_options),
            {kind: sorted(keys) for kind, keys in model.wrappers.items()},
        )

    before, picture = state(), toy.sample(model, positive)
    fit(model, embedding("tree64", seed=1))
    assert state() == before
    assert torch.equal(toy.sample(model, positive), picture)
    assert not toy.model.wrappers.get("diffusion_model")


def test_an_interrupted_fit_goes_on_where_it_was(toy, embedding, hook, caplog):
    caplog.set_level("INFO")
    start, values = embedding("tree64"), []
    whole, losses = fit(toy.model, start)
    fits._kept.clear()

    def listen(value, *_, **__):
        values.append(value)
        if value == 1:
            comfy.model_management.interrupt_current_processing(True)

    hook(listen)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        fit(toy.model, start)
    assert values == [1] and "stopped at step 1 and kept" in caplog.text
    again, joined = fit(toy.model, start)
    assert (values[1], values[-1]) == (2, 6) and "goes on at step 1" in caplog.text
    assert joined == losses and torch.equal(again.tokens, whole.tokens)


def test_a_fit_goes_on_for_more_steps_and_begins_anew_for_anything_else(toy, embedding, hook):
    start, values = embedding("tree64"), []
    hook(lambda value, *_, **__: values.append(value))
    for settings, expected in (
        ({"steps": 2}, [1, 2]),
        ({"steps": 2}, []),
        ({"steps": 3}, [3]),
        ({"steps": 1}, [1]),
        ({"steps": 2, "seed": 1}, [1, 2]),
        ({"steps": 2, "latents": -LATENTS}, [1, 2]),
    ):
        fit(toy.model, start, **settings)
        assert values == expected, settings
        values.clear()
    fit(toy.model.clone(), start, 2)
    assert values == [1, 2]
    assert len(fits._kept) <= fits.MOST


def test_minutes_end_a_fit_early(toy, embedding):
    fitted, losses = fit(toy.model, embedding("tree64"), 50, minutes=1e-9)
    assert len(losses) == 1 and fitted.source["fit"]["steps"] == 1


def test_previews_are_cores(toy, embedding, hook, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", comfy.cli_args.LatentPreviewMethod.Latent2RGB)
    toy.model.model.latent_format.latent_rgb_factors = torch.eye(8, 3).tolist()
    shown = {}
    hook(lambda value, total, preview, *_, **__: shown.setdefault(value, preview))
    fit(toy.model, embedding("tree64"), 8)
    pictures = {value: preview[1].size for value, preview in shown.items() if preview is not None}
    assert pictures == {1: (8, 6), 2: (8, 6), 4: (8, 6), 6: (8, 6)}


def test_what_cannot_be_fitted_is_refused(toy, embedding):
    with pytest.raises(ValueError, match="2 pictures and 1 embeddings"):
        fit(toy.model, embedding("tree64"), latents=LATENTS.expand(2, -1, -1, -1))
    other = toy.model.clone()
    other.add_object_patch("model_sampling", torch.nn.Module())
    with pytest.raises(ValueError, match="A fit needs a flow model .*connect it from before the node"):
        fit(other, embedding("tree64"))
