"""The flow edit guider in core's SamplerCustomAdvanced, against the paper's steps written out with the bare network."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import node_helpers  # noqa: E402
from comfy_extras import nodes_model_advanced  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

from .flow_edits import CLOSE, NEGATIVE, SOURCE, latent, ours, paint, plain, watched, written_out  # noqa: E402


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


def test_every_picture_of_a_batch_has_its_own_mask(toy):
    start, masks = latent(batch=3), torch.zeros(3, 64, 64)
    masks[1, :32], masks[2] = 1, 1
    found = paint(ours(toy.model, start=start, mask=masks), start)
    free = paint(ours(toy.model, start=start), start)
    assert torch.equal(found[0], start["samples"][0]) and torch.equal(found[1, :, 4:], start["samples"][1, :, 4:])
    assert not torch.allclose(found[1, :, :4], start["samples"][1, :, :4], **CLOSE)
    assert torch.allclose(found[2], free[2], rtol=1e-4, atol=1e-4)


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
