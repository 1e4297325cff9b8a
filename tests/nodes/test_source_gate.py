"""The source gate in core's own sampling loop, against two forwards that share what the gate says by one dense attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.sample  # noqa: E402
from semantic_diffusion_adapter.kernels import visibility  # noqa: E402
from semantic_diffusion_adapter.kernels.area import resample  # noqa: E402
from semantic_diffusion_adapter.kernels.gate import gate  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux, source_gate  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
OVERRIDE = "optimized_attention_override"


def latent(*size: int, batch: int = 1, seed: int = 3) -> dict:
    return {"samples": torch.randn(batch, 8, *(size or (8, 8)), generator=torch.Generator().manual_seed(seed))}


def corner(*size: int, batch: int = 1) -> torch.Tensor:
    """MASK in pixels: the upper left quarter may change, softly at its edge."""
    height, width = (8 * side for side in (size or (8, 8)))
    mask = torch.zeros(batch, height, width)
    mask[:, : height // 2, : width // 2] = 1
    mask[:, : height // 2, width // 2 : 5 * width // 8] = 0.4
    return mask


def oracle(toy, source: list, source_latent: dict, mask: torch.Tensor | None, strength: float, text_gate: float, e=None, own=None):
    """A model each of whose forwards is two: of the source, whose image keys are kept, and of the picture, which reads them.
    e: the embedding whose boxes the picture obeys; own: that of the source."""
    model, base, noises = toy.model.clone(), toy.model.model, []

    def scores_of(q, k, patches, grid, boxes):
        scores, text = q @ k.mT / math.sqrt(q.shape[-1]), q.shape[2] - patches
        if boxes is not None:
            bias = visibility.region_bias(boxes.boxes, boxes.strengths, grid, text)
            scores[..., : bias.shape[-1]] += bias
        return scores, text

    def out_of(scores, v):
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def wrapper(apply_model, args):
        x, sigma, c = args["input"], args["timestep"], args["c"]
        grid = visibility.patch_grid(*x.shape[-2:], 2)
        patches, kept = grid[0] * grid[1], {}
        noises.append(x.clone())  # the first sigma is 1
        at = sigma.reshape(-1, 1, 1, 1)
        there = (1 - at) * base.process_latent_in(source_latent["samples"]).to(x) + at * noises[0]

        def keep(func, q, k, v, heads, transformer_options, **kwargs):
            scores, text = scores_of(q, k, patches, grid, own)
            kept[transformer_options["block_type"], transformer_options["block_index"]] = k[:, :, text:], v[:, :, text:]
            return out_of(scores, v)

        def read(func, q, k, v, heads, transformer_options, **kwargs):
            keys, values = kept[transformer_options["block_type"], transformer_options["block_index"]]
            scores, text = scores_of(q, torch.cat([k, keys], 2), patches, grid, e)
            change = torch.zeros(1, *grid) if mask is None else resample(mask, *grid)
            gates = gate(change, strength, 0.0, 1.0).flatten(1)
            everyone = torch.cat([torch.full((len(gates), text), text_gate), gates], 1)
            scores[..., k.shape[2] :] += everyone.log()[:, None, :, None]
            scores[..., text : k.shape[2]] += (1 - everyone).clamp(min=0).log()[:, None, :, None]
            return out_of(scores, torch.cat([v, values], 2))

        def run(x, override, **more):
            told = {key: value for key, value in c.items() if key not in ("sda_layout", "sda_masks")}
            options = {**c["transformer_options"], OVERRIDE: override}
            return apply_model(x, sigma, **{**told, **more, "transformer_options": options})

        tokens, settings = source[0]
        rows = len(x)
        run(there, keep, c_crossattn=tokens.expand(rows, -1, -1), y=settings["pooled_output"].expand(rows, -1))
        return run(x, read)

    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize("text_gate", [0.0, 0.5])
@pytest.mark.parametrize("size, batch", [((8, 8), 1), ((7, 9), 2)])
def test_equals_two_forwards_that_share_by_the_gate(toy, size, batch, text_gate):
    edited, source, there = toy.plain(5, seed=1), toy.plain(5, seed=2), latent(*size)
    mask = corner(*size)
    strength = 1.3 if batch == 1 else 0.7
    expected = toy.sample(oracle(toy, source, there, mask, strength, text_gate), edited, size=size, batch=batch)
    model = source_gate.patch(toy.model, source, there, mask, strength, text_gate=text_gate)
    found = toy.sample(model, edited, size=size, batch=batch)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, toy.sample(toy.model, edited, size=size, batch=batch), **CLOSE), "it reads at all"


@pytest.mark.parametrize("first", ["boxes", "gate"])
def test_the_boxes_are_obeyed_as_well_whatever_the_order(toy, embedding, first):
    e, own, there = embedding("tree64", seed=1), embedding("tree64", seed=2), latent()
    edited, source = to_conditioning(e), to_conditioning(own)
    expected = toy.sample(oracle(toy, source, there, corner(), 1.0, 0.0, e, own), edited)
    steps = [flux.patch, lambda model: source_gate.patch(model, source, there, corner())]
    model = toy.model
    for step in steps if first == "boxes" else steps[::-1]:
        model = step(model)
    torch.testing.assert_close(toy.sample(model, edited), expected, **CLOSE)


@pytest.mark.parametrize("lengths", [("tree64", 5), (7, "tree64"), (9, 4)])
def test_texts_of_other_lengths_and_layouts_are_what_they_are_alone(toy, embedding, lengths):
    e, own = (embedding(each, seed=place) if isinstance(each, str) else None for place, each in enumerate(lengths))
    edited, source = (
        to_conditioning(known) if known is not None else toy.plain(each, seed=place)
        for place, (each, known) in enumerate(zip(lengths, (e, own)))
    )
    there = latent()
    expected = toy.sample(oracle(toy, source, there, corner(), 1.0, 0.3, e, own), edited)
    model = source_gate.patch(flux.patch(toy.model), source, there, corner(), text_gate=0.3)
    torch.testing.assert_close(toy.sample(model, edited), expected, **CLOSE)


@pytest.mark.parametrize("part", [dict(blocks="double"), dict(end=0.5)])
def test_texts_of_other_lengths_and_boxes_in_some_blocks_are_one_sentence(toy, part):
    """The added padding would be seen in the others."""
    source, there = toy.plain(4, seed=2), latent()
    model = source_gate.patch(flux.patch(toy.model, **part), source, there, corner())
    with pytest.raises(ValueError, match="works in some blocks or steps only"):
        toy.sample(model, toy.plain(9, seed=1))
    assert torch.isfinite(toy.sample(model, toy.plain(4, seed=1))).all()


def test_texts_of_other_lengths_need_no_masked_attention(toy):
    edited, source, there = toy.plain(9, seed=1), toy.plain(4, seed=2), latent()
    expected = toy.sample(oracle(toy, source, there, corner(), 1.0, 0.3), edited)
    found = toy.sample(source_gate.patch(toy.model, source, there, corner(), text_gate=0.3), edited)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_queries_and_keys_are_those_of_a_forward_of_the_source(toy, strength):
    """Two forwards by core's own mathematics: the second compares its patches by the first's queries and keys."""
    edited, source, there = toy.plain(5, seed=1), toy.plain(5, seed=2), latent()
    base, noises = toy.model.model, []
    gates = gate(resample(corner(), 4, 4), strength, 0.0, 1.0).reshape(1, 1, -1, 1)

    def wrapper(apply_model, args):
        x, sigma, c, kept = args["input"], args["timestep"], args["c"], {}
        noises.append(x.clone())
        at = sigma.reshape(-1, 1, 1, 1)

        def attend(q, k, v):
            return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)

        def keep(func, q, k, v, heads, transformer_options, **kwargs):
            kept[transformer_options["block_type"], transformer_options["block_index"]] = q[:, :, 5:], k[:, :, 5:]
            return attend(q, k, v)

        def share(func, q, k, v, heads, transformer_options, **kwargs):
            there = kept[transformer_options["block_type"], transformer_options["block_index"]]
            q, k = (torch.cat([own[:, :, :5], own[:, :, 5:] * (1 - gates) + his * gates], 2) for own, his in zip((q, k), there))
            return attend(q, k, v)

        def run(x, override, **more):
            return apply_model(x, sigma, **{**c, **more, "transformer_options": {**c["transformer_options"], OVERRIDE: override}})

        tokens, settings = source[0]
        noised = (1 - at) * base.process_latent_in(there["samples"]) + at * noises[0]
        run(noised, keep, c_crossattn=tokens, y=settings["pooled_output"])
        return run(x, share)

    oracle = toy.model.clone()
    oracle.set_model_unet_function_wrapper(wrapper)
    expected = toy.sample(oracle, edited)
    found = toy.sample(source_gate.patch(toy.model, source, there, corner(), strength, share=source_gate.SHARES[1]), edited)
    torch.testing.assert_close(found, expected, **CLOSE)
    other = toy.sample(source_gate.patch(toy.model, source, there, corner(), strength), edited)
    assert not torch.allclose(found, other, **CLOSE) and not torch.allclose(found, toy.sample(toy.model, edited), **CLOSE)


def test_closed_gates_are_core_bit_for_bit(toy):
    edited, source, there = toy.plain(5, seed=1), toy.plain(5, seed=2), latent()
    before = toy.sample(toy.model, edited)
    assert torch.equal(toy.sample(source_gate.patch(toy.model, source, there, strength=0.0), edited), before)
    assert torch.equal(toy.sample(source_gate.patch(toy.model, source, there, torch.ones(1, 64, 64)), edited), before)
    closed = source_gate.patch(toy.model, source, there, torch.ones(1, 64, 64), share=source_gate.SHARES[1])
    assert torch.equal(toy.sample(closed, edited), before)
    late = source_gate.patch(toy.model, source, there, start=1.0, end=1.0)
    assert torch.equal(toy.sample(late, edited), before)
    opened = source_gate.patch(toy.model, source, there)
    assert not torch.equal(toy.sample(opened, edited), before)
    assert torch.equal(toy.sample(toy.model, edited), before), "nothing may survive outside the clone"
    assert torch.equal(toy.sample(opened, edited), toy.sample(opened, edited)), "asked again, it is the same"


def test_nothing_leaks_into_a_closed_patch(toy):
    """The first attention of a patch of gate 0 is the same, bit for bit, whatever the source says."""
    closed = (corner() == 1).float()

    def first_attention(source: list) -> torch.Tensor:
        seen = []
        handle = toy.network.double_blocks[0].img_attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        try:
            toy.sample(source_gate.patch(toy.model, source, latent(), closed), toy.plain(5, seed=1), steps=1)
        finally:
            handle.remove()
        return seen[0][0].unflatten(0, (4, 4))  # the picture's own row

    one, other = first_attention(toy.plain(5, seed=2)), first_attention(toy.plain(5, seed=4))
    assert torch.equal(one[:2, :2], other[:2, :2])
    for part in (np.s_[2:], np.s_[:2, 2:]):
        assert (one[part] != other[part]).any(-1).all()


def test_guidance_reads_the_same_source_on_either_side(toy):
    edited, negative, source, there = (*(toy.plain(5, seed=seed) for seed in (1, 6, 2)), latent())
    model = source_gate.patch(toy.model, source, there, corner())
    guided = toy.sample(model, edited, negative, cfg=3.0, steps=1)
    positive, other = toy.sample(model, edited, steps=1), toy.sample(model, negative, steps=1)
    torch.testing.assert_close(guided, other + 3.0 * (positive - other), rtol=1e-3, atol=1e-3)


def test_a_batch_is_its_pictures_one_by_one(toy):
    edited, source, there = toy.plain(5, seed=1), toy.plain(5, seed=2), latent(batch=2)
    masks = torch.cat([corner(), 1 - corner()])
    noise = comfy.sample.prepare_noise(torch.zeros(2, 8, 8, 8), 0)
    together = toy.sample(source_gate.patch(toy.model, source, there, masks), edited, batch=2)
    for row in range(2):
        own = {"samples": there["samples"][row : row + 1]}
        model = source_gate.patch(toy.model, source, own, masks[row : row + 1])
        with torch.no_grad():
            alone = comfy.sample.sample(
                model, noise[row : row + 1], 2, 1.0, "euler", "simple", edited, edited, torch.zeros(1, 8, 8, 8), disable_pbar=True
            )
        torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)


def test_only_the_chosen_blocks_read(toy):
    edited, source, there = toy.plain(5, seed=1), toy.plain(5, seed=2), latent()
    made = {blocks: toy.sample(source_gate.patch(toy.model, source, there, blocks=blocks), edited)
            for blocks in ("all", "double", "single 1")}  # fmt: skip
    assert len({value.sum().item() for value in made.values()}) == 3
    both = source_gate.patch(toy.model, source, there, blocks="double, single")
    assert torch.equal(toy.sample(both, edited), made["all"])


def test_references_are_there_for_both(toy):
    import node_helpers

    edited, source, there = toy.plain(5, seed=1), toy.plain(5, seed=2), latent()
    edited = node_helpers.conditioning_set_values(edited, {"reference_latents": [torch.randn(1, 8, 5, 6)]})
    found = toy.sample(source_gate.patch(toy.model, source, there, corner()), edited)
    assert torch.isfinite(found).all() and not torch.allclose(found, toy.sample(toy.model, edited), **CLOSE)


def test_another_override_is_still_called(toy):
    edited, source, there = toy.plain(5, seed=1), toy.plain(5, seed=2), latent()
    calls = []

    def count(func, *args, **kwargs):
        calls.append(0)
        return func(*args, **kwargs)

    model = toy.model.clone()
    model.model_options["transformer_options"] = {OVERRIDE: count}
    hard = (corner() == 1).float()
    found = toy.sample(source_gate.patch(model, source, there, hard), edited)
    assert calls
    torch.testing.assert_close(found, toy.sample(source_gate.patch(toy.model, source, there, hard), edited), **CLOSE)


@pytest.mark.parametrize("change, words", [
    (dict(strength=2.5), "strength of a gate lies between"), (dict(lo=0.6, hi=0.5), "A gate opens from lo to hi"),
    (dict(text_gate=-1.0), "gate of the text lies between"), (dict(start=0.6, end=0.5), "swap them"),
    (dict(blocks="double 9"), "There is no double block 9"),
])  # fmt: skip
def test_what_is_out_of_range_is_refused_at_once(toy, change, words):
    with pytest.raises(ValueError, match=words):
        source_gate.patch(toy.model, toy.plain(5), latent(), **change)


def test_what_does_not_belong_together_is_one_sentence(toy):
    edited = toy.plain(5)
    with pytest.raises(ValueError, match="conditioning of one entry and this one has 2"):
        source_gate.patch(toy.model, toy.plain(5) * 2, latent())
    with pytest.raises(ValueError, match="source's latent is empty"):
        source_gate.patch(toy.model, edited, {"samples": torch.zeros(1, 8, 8, 8)})
    with pytest.raises(ValueError, match="use one size, and one source"):
        toy.sample(source_gate.patch(toy.model, edited, latent(6, 8)), edited)
    with pytest.raises(ValueError, match="has 3 masks for 2 pictures"):
        toy.sample(source_gate.patch(toy.model, edited, latent(), torch.zeros(3, 64, 64)), edited, batch=2)
