"""The gate on reference latents, against core's own sequence with one dense mask over the references' keys."""

from __future__ import annotations

import math

import node_helpers
import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

from semantic_diffusion_adapter.kernels import visibility  # noqa: E402
from semantic_diffusion_adapter.kernels.area import resample  # noqa: E402
from semantic_diffusion_adapter.kernels.gate import gate  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux, reference_gate, source_gate  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
OVERRIDE = "optimized_attention_override"


def corner() -> torch.Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, :32, :32] = 1
    mask[:, :32, 32:48] = 0.4
    return mask


def referring(positive: list, *sizes: tuple[int, int]) -> list:
    """With reference latents of these sizes, odd ones too."""
    latents = [torch.randn(1, 8, *size, generator=torch.Generator().manual_seed(place)) for place, size in enumerate(sizes)]
    return node_helpers.conditioning_set_values(positive, {"reference_latents": latents})


def oracle(toy, mask, strength, text, text_gate, sizes, e=None):
    """Core's sequence under log gates on the references' keys, in float64."""
    references = sum(rows * cols for rows, cols in (visibility.patch_grid(*size) for size in sizes))
    gates = gate(resample(mask, 4, 4), strength, 0.0, 1.0).flatten()

    def override(func, q, k, v, heads, transformer_options, **kwargs):
        scores = q.double() @ k.double().mT / math.sqrt(q.shape[-1])
        everyone = torch.cat([torch.full((text,), text_gate), gates, torch.ones(references)]).double()
        scores[..., -references:] += everyone.log()[:, None]
        if e is not None:
            scores[..., : e.token_count] += visibility.region_bias(e.boxes, e.strengths, (4, 4), text, references).double()
        return (scores.softmax(-1) @ v.double()).to(q.dtype).transpose(1, 2).flatten(2)

    model = toy.model.clone()
    model.model_options["transformer_options"] = {OVERRIDE: override}
    return model


@pytest.mark.parametrize("text_gate", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("sizes", [((8, 8),), ((5, 6), (7, 9))])
def test_equals_the_dense_mask_for_any_references(toy, sizes, text_gate):
    positive = referring(toy.plain(5), *sizes)
    expected = toy.sample(oracle(toy, corner(), 1.4, 5, text_gate, sizes), positive)
    found = toy.sample(reference_gate.patch(toy.model, corner(), 1.4, text_gate=text_gate), positive)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, toy.sample(toy.model, positive), **CLOSE)


@pytest.mark.parametrize("first", ["boxes", "gate"])
def test_the_boxes_are_obeyed_as_well_whatever_the_order(toy, embedding, first):
    e, sizes = embedding("tree64"), ((5, 6),)
    positive = referring(to_conditioning(e), *sizes)
    expected = toy.sample(oracle(toy, corner(), 1.0, 64, 0.5, sizes, e), toy.without_layout(positive))
    steps = [flux.patch, lambda model: reference_gate.patch(model, corner(), text_gate=0.5)]
    model = toy.model
    for step in steps if first == "boxes" else steps[::-1]:
        model = step(model)
    torch.testing.assert_close(toy.sample(model, positive), expected, **CLOSE)


def test_as_trained_and_without_references_it_is_core_bit_for_bit(toy):
    text, with_one = toy.plain(5), referring(toy.plain(5), (5, 6))
    assert torch.equal(toy.sample(reference_gate.patch(toy.model), with_one), toy.sample(toy.model, with_one))
    closed = reference_gate.patch(toy.model, strength=0.0, text_gate=0.0)
    assert torch.equal(toy.sample(closed, text), toy.sample(toy.model, text))
    late = reference_gate.patch(toy.model, strength=0.0, start=1.0)
    assert torch.equal(toy.sample(late, with_one), toy.sample(toy.model, with_one))


def test_a_closed_gate_hears_nothing_of_them(toy):
    """All closed, text too: whatever the references show, bit for bit the same picture; and that without any."""
    closed = reference_gate.patch(toy.model, strength=0.0, text_gate=0.0)
    one, other = (toy.sample(closed, node_helpers.conditioning_set_values(toy.plain(5), {"reference_latents": [
        torch.randn(1, 8, 5, 6, generator=torch.Generator().manual_seed(seed))]})) for seed in (1, 2))  # fmt: skip
    assert torch.equal(one, other)
    torch.testing.assert_close(one, toy.sample(toy.model, toy.plain(5)), **CLOSE)


def test_guidance_and_batches(toy):
    positive, negative = referring(toy.plain(5), (5, 6)), toy.plain(5, seed=6)
    model = reference_gate.patch(toy.model, corner())
    guided = toy.sample(model, positive, negative, cfg=3.0, steps=1, batch=2)
    one, other = (toy.sample(model, each, steps=1, batch=2) for each in (positive, negative))
    torch.testing.assert_close(guided, other + 3.0 * (one - other), rtol=1e-3, atol=1e-3)


def test_keys_that_were_kept_are_gated_too(toy):
    """FluxKVCache of newer cores takes the references away after the first step and keeps their keys."""
    stock = pytest.importorskip("comfy_extras.nodes_flux")
    if not hasattr(stock, "FluxKVCache"):
        pytest.skip("this core has no FluxKVCache")
    positive = node_helpers.conditioning_set_values(referring(toy.plain(5), (5, 6)), {"reference_latents_method": "index"})
    cached = stock.FluxKVCache.execute(toy.model).args[0]
    closed = dict(strength=0.0, text_gate=0.0)
    found = toy.sample(reference_gate.patch(cached, **closed), positive, steps=3)
    torch.testing.assert_close(found, toy.sample(toy.model, toy.plain(5), steps=3), **CLOSE)
    made = [
        toy.sample(model, positive, steps=3)
        for model in (reference_gate.patch(cached, corner()), stock.FluxKVCache.execute(reference_gate.patch(toy.model, corner())).args[0])
    ]
    torch.testing.assert_close(*made, **CLOSE)


def test_two_gates_on_one_model_are_refused(toy):
    there = {"samples": torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3))}
    model = reference_gate.patch(source_gate.patch(toy.model, toy.plain(5, seed=2), there), corner())
    with pytest.raises(ValueError, match="do not work on one model together: remove one of the two"):
        toy.sample(model, referring(toy.plain(5), (5, 6)))
