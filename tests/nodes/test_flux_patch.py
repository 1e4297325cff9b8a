"""The patch in core's own sampling loop: exact where nothing is masked, exactly the dense mask where something is."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import node_helpers  # noqa: E402
from semantic_diffusion_adapter.kernels import algebra, regions, visibility  # noqa: E402
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
OVERRIDE = "optimized_attention_override"


def test_bypassed_removed_and_all_visible_are_core_bit_for_bit(toy, embedding):
    text = toy.plain(9)
    before = toy.sample(toy.model, text)
    patched = flux.patch(toy.model)
    assert torch.equal(toy.sample(patched, text), before), "a conditioning without a layout must be left alone"
    everywhere = embedding("global16")
    assert torch.equal(
        toy.sample(patched, to_conditioning(everywhere)), toy.sample(toy.model, toy.without_layout(to_conditioning(everywhere)))
    )
    tree = to_conditioning(embedding("tree64"))
    masked = toy.sample(patched, tree)
    unpatched = toy.sample(toy.model, tree)
    assert not torch.allclose(masked, unpatched, **CLOSE), "the mask must do something at all"
    assert torch.equal(unpatched, toy.sample(toy.model, toy.without_layout(tree))), "an unpatched Flux must ignore the layout"
    assert torch.equal(toy.sample(toy.model, text), before), "nothing may survive outside the clone"


@pytest.mark.parametrize("mixing", ["all", "overlap"])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (12, 5)])
def test_equals_the_dense_mask_for_any_latent(toy, embedding, size, mixing):
    e = algebra.with_strength(embedding("tree64"), 0.5, levels={1})
    positive = to_conditioning(e, toy.plain(5))
    calls = []
    oracle = toy.dense(toy.model, e, visibility.patch_grid(*size), 64 + 5, mixing=mixing, calls=calls)
    expected = toy.sample(oracle, toy.without_layout(positive), size=size)
    assert len(calls) == 2 * 4, "the oracle must have been every attention of two steps"
    result = toy.sample(flux.patch(toy.model, mixing=mixing), positive, size=size)
    assert torch.allclose(result, expected, **CLOSE)


def soft_mask(seed: int = 0) -> torch.Tensor:
    """Blocks of 0, 1 and between, in steps that bytes hold."""
    blocks = torch.randint(-64, 320, (5, 5), generator=torch.Generator().manual_seed(seed)).clamp(0, 255) / 255
    return torch.nn.functional.interpolate(blocks[None, None], (256, 256))[0, 0]


@pytest.mark.parametrize("mixing", ["all", "overlap"])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (12, 5)])
def test_masks_equal_the_dense_mask_for_any_latent(toy, embedding, size, mixing):
    e = regions.insert(embedding("tree64", seed=1), embedding("global16", seed=2), soft_mask())
    assert e.masks is not None
    positive = to_conditioning(e, toy.plain(5))
    oracle = toy.dense(toy.model, e, visibility.patch_grid(*size), e.token_count + 5, mixing=mixing)
    expected = toy.sample(oracle, toy.without_layout(positive), size=size, steps=1)
    result = toy.sample(flux.patch(toy.model, mixing=mixing), positive, size=size, steps=1)
    assert torch.allclose(result, expected, **CLOSE)


def test_an_unpatched_flux_ignores_masks(toy, embedding):
    positive = to_conditioning(regions.confine(embedding(), soft_mask()))
    assert torch.equal(toy.sample(toy.model, positive, steps=1), toy.sample(toy.model, toy.without_layout(positive), steps=1))


def test_two_masks_in_one_batch_keep_their_own(toy, embedding):
    """As many tokens and masks on either side of the guidance: core joins them into one forward."""
    one = regions.confine(embedding("global16", seed=1), soft_mask(1))
    two = regions.confine(embedding("global16", seed=2), soft_mask(2))
    model = flux.patch(toy.model)
    guided = toy.sample(model, to_conditioning(one), to_conditioning(two), cfg=3.0, steps=1)
    first, second = (toy.sample(model, to_conditioning(e), steps=1) for e in (one, two))
    assert torch.allclose(guided, second + 3.0 * (first - second), rtol=1e-3, atol=1e-3)
    mixed = toy.sample(model, to_conditioning(one), to_conditioning(embedding("global16", seed=2)), cfg=3.0, steps=1)
    assert not torch.allclose(mixed, guided, **CLOSE)


@pytest.mark.parametrize("kind", ["box", "hard", "soft"])
def test_nothing_leaks_out_of_a_region_at_the_injection_site(toy, embedding, kind, monkeypatch):
    """In Flux's first block, where only its own keys and values know of a token yet: with the region's tokens at full
    strength and quite others in their place, the attention output of every patch outside differs by exactly 0."""
    first = []
    make = flux.regional_attention

    def recording(*arguments):
        override = make(*arguments)

        def record(*inputs, **more):
            first.append(override(*inputs, **more))
            return first[-1]

        return record

    monkeypatch.setattr(flux, "regional_attention", recording)
    base, other = embedding("tree64", seed=1), algebra.with_strength(embedding("global16", seed=2), 2.0)
    if kind == "box":
        e = algebra.compose([base, regions.move_into(other, (0.5, 0.25, 1.0, 0.75))])
    else:
        mask = regions.box_mask((0.5, 0.25, 1.0, 0.75))
        e = regions.insert(base, other, mask if kind == "hard" else regions.feather(mask, 0.4), "join")
    loud = e.tokens.clone()
    loud[:, 64:] *= -20
    outputs = []
    for tokens in (e.tokens, loud):
        first.clear()
        toy.sample(flux.patch(toy.model), to_conditioning(dataclasses.replace(e, tokens=tokens)), size=(10, 14), steps=1)
        outputs.append(first[0][0, e.token_count :])
    seen = visibility.region_bias(e.boxes, e.strengths, (5, 7), e.token_count, masks=e.masks, masked_by=e.masked_by)
    seen = (seen[e.token_count :, 64:] > -math.inf).any(1)
    change = (outputs[0] - outputs[1]).abs().amax(1)
    assert 0 < seen.sum() < 35 and len(change) == 35
    assert (change[~seen] == 0).all() and (change[seen] > 0).all()


def test_strength_off_for_a_cell_is_deleting_its_tokens(toy, embedding):
    e = embedding("tree64")
    cell = e.boxes[20:21]
    keep = ~(e.boxes == cell).all(-1)
    assert (~keep).sum() == 4
    off = algebra.with_strength(e, 0.0, boxes=cell)
    deleted = dataclasses.replace(
        e, tokens=e.tokens[:, keep], boxes=e.boxes[keep], levels=e.levels[keep], strengths=e.strengths[keep]
    )
    model = flux.patch(toy.model)
    assert torch.allclose(
        toy.sample(model, to_conditioning(off)), toy.sample(model, to_conditioning(deleted)), **CLOSE
    )


def test_strength_zero_leaves_the_text_alone(toy, embedding):
    text = toy.plain(5)
    result = toy.sample(flux.patch(toy.model, strength=0.0), to_conditioning(embedding(), text))
    assert torch.isfinite(result).all()
    assert torch.allclose(result, toy.sample(toy.model, text), **CLOSE)


def test_strength_is_a_factor(toy, embedding):
    e = embedding()
    through_patch = toy.sample(flux.patch(toy.model, strength=0.6), to_conditioning(e))
    through_tokens = toy.sample(flux.patch(toy.model), to_conditioning(algebra.with_strength(e, 0.6)))
    assert torch.allclose(through_patch, through_tokens, **CLOSE)
    assert not torch.allclose(through_patch, toy.sample(flux.patch(toy.model), to_conditioning(e)), **CLOSE)


@pytest.mark.parametrize("reference", [(8, 8), (5, 6)])
def test_reference_latents_see_every_token(toy, embedding, reference):
    e = embedding("tree64")
    references = [torch.randn(1, 8, *reference), torch.randn(1, 8, 3, 4)]
    positive = node_helpers.conditioning_set_values(to_conditioning(e), {"reference_latents": references})
    count = sum(rows * cols for rows, cols in (visibility.patch_grid(*r.shape[-2:]) for r in references))
    oracle = toy.dense(toy.model, e, (4, 4), 64, references=count)
    expected = toy.sample(oracle, toy.without_layout(positive))
    assert torch.allclose(toy.sample(flux.patch(toy.model), positive), expected, **CLOSE)


def test_percentages_follow_the_models_own_schedule(toy, embedding):
    """Of four euler steps the patch must be there in exactly those whose sigma lies in the window, also if a node after
    ours changed the schedule."""
    import comfy.model_sampling

    positive = to_conditioning(embedding())
    masked = []

    def watch(executor, x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs):
        masked.append((float(transformer_options["sigmas"].max()), OVERRIDE in transformer_options))
        return executor(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)

    model = flux.patch(toy.model, start=0.3, end=0.8)
    class Shifted(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
        pass

    schedule = Shifted()
    schedule.set_parameters(shift=2.5)
    model.add_object_patch("model_sampling", schedule)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "watch", watch)
    toy.sample(model, positive, steps=6)
    low, high = schedule.percent_to_sigma(0.8), schedule.percent_to_sigma(0.3)
    assert len(masked) == 6 and {on for _, on in masked} == {True, False}
    assert all(on == (low < sigma <= high) for sigma, on in masked)


def test_half_precision_does_not_move_a_border(toy, embedding, monkeypatch):
    """In bfloat16 a border of the 3 x 3 grid would be off by more than the tolerance; as integers it is not."""
    grids = hierarchy([[3, 3, 2]])
    prepared = []
    prepare = flux.prepare
    monkeypatch.setattr(flux, "prepare", lambda layout, x, *rest: prepared.append((x.dtype, prepare(layout, x, *rest))) or prepared[-1][1])
    toy.model.model.manual_cast_dtype = torch.bfloat16
    toy.sample(flux.patch(toy.model), to_conditioning(from_hierarchy(torch.randn(1, 18, 24), grids)), size=(24, 24), steps=1)
    dtype, made = prepared[0]
    assert dtype == torch.bfloat16
    assert torch.equal(made.regions.bias[0, 18:] == 0, visibility.visible(grids.boxes(), (12, 12)))


def test_half_precision_does_not_change_a_mask(toy, embedding, monkeypatch):
    """Core casts the masks' bytes to the model's dtype, which holds them all."""
    e = regions.confine(embedding("global16"), (torch.arange(65536) % 256).view(256, 256).T / 255)
    prepared = []
    prepare = flux.prepare
    monkeypatch.setattr(flux, "prepare", lambda *arguments: prepared.append(prepare(*arguments)) or prepared[-1])
    toy.model.model.manual_cast_dtype = torch.bfloat16
    toy.sample(flux.patch(toy.model), to_conditioning(e), size=(24, 24), steps=1)
    expected = visibility.region_bias(e.boxes, e.strengths, (12, 12), 16, masks=e.masks, masked_by=e.masked_by)
    assert torch.allclose(prepared[0].regions.bias[0], expected, atol=1e-5)
