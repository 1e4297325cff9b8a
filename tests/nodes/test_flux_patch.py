"""The patch in core's own sampling loop: exact where nothing is masked, exactly the dense mask where something is."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import node_helpers  # noqa: E402
from semantic_diffusion_adapter.kernels import (  # noqa: E402
    algebra,
    blocks,  # noqa: E402
    regions,
    visibility,
)
from semantic_diffusion_adapter.kernels.embedding import from_hierarchy  # noqa: E402
from semantic_diffusion_adapter.kernels.hierarchy import hierarchy  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
OVERRIDE = "optimized_attention_override"


def without_layout(positive: list) -> list:
    return [[tokens, {k: v for k, v in settings.items() if k != "model_conds"}] for tokens, settings in positive]


def test_bypassed_removed_and_all_visible_are_core_bit_for_bit(toy, embedding):
    text = toy.plain(9)
    before = toy.sample(toy.model, text)
    patched = flux.patch(toy.model)
    assert torch.equal(toy.sample(patched, text), before), "a conditioning without a layout must be left alone"
    everywhere = embedding("global16")
    assert torch.equal(
        toy.sample(patched, to_conditioning(everywhere)), toy.sample(toy.model, without_layout(to_conditioning(everywhere)))
    )
    tree = to_conditioning(embedding("tree64"))
    masked = toy.sample(patched, tree)
    unpatched = toy.sample(toy.model, tree)
    assert not torch.allclose(masked, unpatched, **CLOSE), "the mask must do something at all"
    assert torch.equal(unpatched, toy.sample(toy.model, without_layout(tree))), "an unpatched Flux must ignore the layout"
    assert torch.equal(toy.sample(toy.model, text), before), "nothing may survive outside the clone"


@pytest.mark.parametrize("mixing", ["all", "overlap"])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (12, 5)])
def test_equals_the_dense_mask_for_any_latent(toy, embedding, size, mixing):
    e = algebra.with_strength(embedding("tree64"), 0.5, levels={1})
    positive = to_conditioning(e, toy.plain(5))
    calls = []
    oracle = toy.dense(toy.model, e, visibility.patch_grid(*size), 64 + 5, mixing=mixing, calls=calls)
    expected = toy.sample(oracle, without_layout(positive), size=size)
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
    expected = toy.sample(oracle, without_layout(positive), size=size, steps=1)
    result = toy.sample(flux.patch(toy.model, mixing=mixing), positive, size=size, steps=1)
    assert torch.allclose(result, expected, **CLOSE)


def test_an_unpatched_flux_ignores_masks(toy, embedding):
    positive = to_conditioning(regions.confine(embedding(), soft_mask()))
    assert torch.equal(toy.sample(toy.model, positive, steps=1), toy.sample(toy.model, without_layout(positive), steps=1))


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


@pytest.mark.parametrize("text", ["double", "single 1", "double 0, single 0-0", "double 1-1,SINGLE"])
def test_only_the_chosen_blocks_are_masked(toy, embedding, text):
    chosen = blocks.parse_blocks(text, 2, 2)
    e = embedding("tree64")
    calls = []
    oracle = toy.dense(toy.model, e, (4, 4), 64, where=lambda *here: here in chosen, calls=calls)
    expected = toy.sample(oracle, without_layout(to_conditioning(e)))
    assert len(calls) == 2 * 4
    result = toy.sample(flux.patch(toy.model, blocks=text), to_conditioning(e))
    assert torch.allclose(result, expected, **CLOSE)
    assert not torch.allclose(result, toy.sample(flux.patch(toy.model), to_conditioning(e)), **CLOSE)


def test_the_text_form_of_blocks():
    assert blocks.parse_blocks("all", 19, 38) is blocks.parse_blocks("", 19, 38) is blocks.parse_blocks("single, double", 19, 38) is None
    assert blocks.parse_blocks("double 0-9, single 20-37", 19, 38) == {("double", i) for i in range(10)} | {
        ("single", i) for i in range(20, 38)
    }
    assert blocks.parse_blocks("double 3", 19, 38) == {("double", 3)}
    for text, message in (
        ("double 19", "no double block 19: this model has 19"),
        ("single 3-99", "no single block 99: this model has 38"),
        ("single 9-3", "run backwards"),
        ("triple", "'triple' are not understood"),
        ("double 0-", "are not understood"),
        ("0-9", "are not understood"),
        ("double,,single", "are not understood"),
        ("all, double", "are not understood"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            blocks.parse_blocks(text, 19, 38)
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


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


def test_a_batch_is_its_images_one_by_one(toy, embedding):
    import comfy.sample

    many = embedding(batch=3)
    model = flux.patch(toy.model)
    together = toy.sample(model, to_conditioning(many), batch=3)
    noise = comfy.sample.prepare_noise(torch.zeros(3, 8, 8, 8), 0)
    for i in range(3):
        one = dataclasses.replace(many, tokens=many.tokens[i : i + 1], pooled=many.pooled[i : i + 1])
        with torch.no_grad():
            alone = comfy.sample.sample(
                model, noise[i : i + 1], 2, 1.0, "euler", "simple", to_conditioning(one), to_conditioning(one),
                torch.zeros(1, 8, 8, 8), disable_pbar=True,
            )  # fmt: skip
        assert torch.allclose(together[i : i + 1], alone, **CLOSE)


def test_two_layouts_in_one_batch_keep_their_own(toy, embedding):
    """Core joins conditionings of equal shapes into one forward: each must be masked by its own boxes."""
    e = embedding("tree64")
    mirrored = dataclasses.replace(e, boxes=torch.stack([1 - e.boxes[:, 2], e.boxes[:, 1], 1 - e.boxes[:, 0], e.boxes[:, 3]], 1))
    model = flux.patch(toy.model)
    widths = []
    original = toy.network.forward_orig
    toy.network.forward_orig = lambda img, *args, **kwargs: widths.append(img.shape[0]) or original(img, *args, **kwargs)
    guided = toy.sample(model, to_conditioning(e), to_conditioning(mirrored), cfg=3.0, steps=1)
    assert set(widths) == {2}, "core should have run both in one forward, or this test shows nothing"
    first = toy.sample(model, to_conditioning(e), steps=1)
    second = toy.sample(model, to_conditioning(mirrored), steps=1)
    assert not torch.allclose(first, second, **CLOSE)
    assert torch.allclose(guided, second + 3.0 * (first - second), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [5, 64])
def test_guidance_with_a_plain_negative(toy, embedding, length):
    """Also where the negative has as many tokens as the embedding: it has no layout and must not get one."""
    e, negative = embedding("tree64"), toy.plain(length)
    model = flux.patch(toy.model)
    guided = toy.sample(model, to_conditioning(e), negative, cfg=3.0, steps=1)
    positive, unmasked = toy.sample(model, to_conditioning(e), steps=1), toy.sample(toy.model, negative, steps=1)
    assert torch.allclose(guided, unmasked + 3.0 * (positive - unmasked), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reference", [(8, 8), (5, 6)])
def test_reference_latents_see_every_token(toy, embedding, reference):
    e = embedding("tree64")
    references = [torch.randn(1, 8, *reference), torch.randn(1, 8, 3, 4)]
    positive = node_helpers.conditioning_set_values(to_conditioning(e), {"reference_latents": references})
    count = sum(rows * cols for rows, cols in (visibility.patch_grid(*r.shape[-2:]) for r in references))
    oracle = toy.dense(toy.model, e, (4, 4), 64, references=count)
    expected = toy.sample(oracle, without_layout(positive))
    assert torch.allclose(toy.sample(flux.patch(toy.model), positive), expected, **CLOSE)


def test_another_packs_override_is_chained(toy, embedding):
    """An override that changes the values: it must be asked, and our mask must hold around it."""
    e = embedding("tree64")
    positive = to_conditioning(e)
    seen = []

    def louder(func, q, k, v, heads, **kwargs):
        seen.append(q.shape)
        return func(q, k, v * 1.5, heads, **kwargs)

    model = flux.patch(toy.model)
    model.model_options["transformer_options"][OVERRIDE] = louder
    result = toy.sample(model, positive)
    assert seen
    oracle = toy.dense(toy.model, e, (4, 4), 64)
    dense = oracle.model_options["transformer_options"][OVERRIDE]
    oracle.model_options["transformer_options"][OVERRIDE] = lambda func, q, k, v, heads, **kw: dense(func, q, k, v * 1.5, heads, **kw)
    assert torch.allclose(result, toy.sample(oracle, without_layout(positive)), **CLOSE)
    assert model.model_options["transformer_options"][OVERRIDE] is louder


def test_an_attention_mask_of_the_conditioning_is_added(toy, embedding):
    """A style model after Embedding to Conditioning brings a mask of the whole sequence along."""
    e = embedding("tree64")
    sequence = 64 + 16
    extra = torch.randn(1, sequence, sequence)
    positive = node_helpers.conditioning_set_values(
        to_conditioning(e), {"attention_mask": extra, "attention_mask_img_shape": (4, 4)}
    )

    def with_mask(func, q, k, v, heads, mask=None, **kwargs):
        bias = visibility.region_bias(e.boxes, e.strengths, (4, 4), 64).double()
        full = extra[0].double().clone()
        full[:, :64] += bias
        logits = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1]) + full
        return (logits.softmax(-1) @ v.double()).to(q.dtype).transpose(1, 2).flatten(2)

    oracle = toy.model.clone()
    oracle.model_options["transformer_options"] = {OVERRIDE: with_mask}
    result = toy.sample(flux.patch(toy.model), positive)
    assert torch.allclose(result, toy.sample(oracle, without_layout(positive)), **CLOSE)


@pytest.mark.parametrize("skip_reshape", [True, False])
@pytest.mark.parametrize("skip_output_reshape", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_every_shape_in_which_core_calls_attention(embedding, skip_reshape, skip_output_reshape, soft):
    from comfy.ldm.modules.attention import attention_pytorch

    e = algebra.with_strength(embedding(), 0.5 if soft else 1.0)
    bias = visibility.region_bias(e.boxes, e.strengths, (4, 4), 64)
    q, k, v = torch.randn(3, 2, 2, 80, 32)
    full = torch.zeros(80, 80)
    full[:, :64] = bias
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=full.double()).float()
    override = flux.regional_attention(flux.Regions(bias), None)
    if not skip_reshape:
        q, k, v = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    out = override(attention_pytorch, q, k, v, 2, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
    assert torch.allclose(out, expected if skip_output_reshape else expected.transpose(1, 2).flatten(2), atol=1e-5)


def test_an_attention_that_is_not_the_joint_one_is_passed_on(embedding):
    from comfy.ldm.modules.attention import attention_pytorch

    e = embedding()
    override = flux.regional_attention(flux.Regions(visibility.region_bias(e.boxes, e.strengths, (4, 4), 64)), None)
    q, k, v = torch.randn(1, 2, 7, 32), torch.randn(1, 2, 11, 32), torch.randn(1, 2, 11, 32)
    assert torch.equal(
        override(attention_pytorch, q, k, v, 2, skip_reshape=True), attention_pytorch(q, k, v, 2, skip_reshape=True)
    )


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


def test_a_compiled_model_gives_the_same(toy, embedding):
    positive = to_conditioning(embedding())
    model = flux.patch(toy.model)
    expected = toy.sample(model, positive, steps=1)
    toy.network.forward = torch.compile(toy.network.forward, backend="eager")
    assert torch.allclose(toy.sample(model, positive, steps=1), expected, **CLOSE)


def test_patching_twice_is_patching_once(toy, embedding):
    positive = to_conditioning(embedding())
    twice = flux.patch(flux.patch(toy.model, strength=0.5), strength=1.5)
    assert torch.equal(toy.sample(twice, positive), toy.sample(flux.patch(toy.model, strength=1.5), positive))


def test_a_saved_patch_survives_clones_and_keeps_no_second_model(toy, embedding):
    positive = to_conditioning(embedding())
    patched = flux.patch(toy.model)
    again = patched.clone().clone()
    assert again.model is toy.model.model
    assert torch.equal(toy.sample(again, positive), toy.sample(patched, positive))


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
    assert torch.equal(made.bias[0, 18:] == 0, visibility.visible(grids.boxes(), (12, 12)))


def test_half_precision_does_not_change_a_mask(toy, embedding, monkeypatch):
    """Core casts the masks' bytes to the model's dtype, which holds them all."""
    e = regions.confine(embedding("global16"), (torch.arange(65536) % 256).view(256, 256).T / 255)
    prepared = []
    prepare = flux.prepare
    monkeypatch.setattr(flux, "prepare", lambda *arguments: prepared.append(prepare(*arguments)) or prepared[-1])
    toy.model.model.manual_cast_dtype = torch.bfloat16
    toy.sample(flux.patch(toy.model), to_conditioning(e), size=(24, 24), steps=1)
    expected = visibility.region_bias(e.boxes, e.strengths, (12, 12), 16, masks=e.masks, masked_by=e.masked_by)
    assert torch.allclose(prepared[0].bias[0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["SD15", "SDXL", "Flux2"])
def test_another_kind_of_model_is_refused_by_name(toy, kind):
    """Flux.2's network is of FLUX.1's class."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models

    if not hasattr(comfy.supported_models, kind):
        pytest.skip(f"this core does not know {kind}")
    config = {"in_channels": 4, "hidden_size": 64, "disable_unet_model_creation": True}
    base = getattr(comfy.supported_models, kind)(config).get_model({})
    base.diffusion_model = toy.network
    if kind != "Flux2":
        base.diffusion_model = openaimodel.UNetModel(
            image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=[1], channel_mult=(1,), num_heads=1,
            transformer_depth=[0], transformer_depth_output=[0, 0], transformer_depth_middle=-2,
            operations=comfy.ops.manual_cast, dtype=torch.float32,
        )  # fmt: skip
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=f"works on FLUX.1 models and this is {kind}: load a FLUX.1 model"):
        flux.patch(comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu))


def test_refusals(toy, embedding):
    e = embedding()
    with pytest.raises(ValueError, match="start_percent"):
        flux.patch(toy.model, start=0.7, end=0.2)
    with pytest.raises(ValueError, match="strength"):
        flux.patch(toy.model, strength=-1.0)
    with pytest.raises(ValueError, match="no single block 2: this model has 2"):
        flux.patch(toy.model, blocks="single 0-2")
    model = flux.patch(toy.model)
    with pytest.raises(ValueError, match="width 16 and this model reads 24"):
        toy.sample(model, to_conditioning(embedding(width=16)))
    cut = [[tokens[:, :10], settings] for tokens, settings in to_conditioning(e)]
    with pytest.raises(ValueError, match="10 tokens but a layout of 64"):
        toy.sample(model, cut)
    narrow = [[tokens, {**settings, "pooled_output": torch.zeros(1, 8)}] for tokens, settings in to_conditioning(e)]
    with pytest.raises(ValueError, match="pooled vector has width 8"):
        toy.sample(model, narrow)
