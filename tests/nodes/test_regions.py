"""The Regions node: many regions in one, with core's own CLIP, each as the single nodes make it; schedules in the sampling."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import folder_paths  # noqa: E402
from semantic_diffusion_adapter.kernels import algebra, region_list  # noqa: E402
from semantic_diffusion_adapter.kernels import regions as kernel  # noqa: E402
from semantic_diffusion_adapter.nodes import prompt  # noqa: E402
from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402
from semantic_diffusion_adapter.nodes.region import ComposeEmbeddings, PlaceEmbedding, RegionalPrompt  # noqa: E402
from semantic_diffusion_adapter.nodes.regions import Regions  # noqa: E402

LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 0.5, 1.0]
CIRCLE = {"name": "left", "box": LEFT, "prompt": "a red circle"}


def text(*regions: dict) -> str:
    return json.dumps({"version": 1, "regions": regions})


def same(a, b) -> bool:
    fields = ("tokens", "boxes", "levels", "strengths", "pooled", "masks", "masked_by", "schedule")
    return all(
        x is y if x is None or y is None else torch.equal(x, y) for x, y in ((getattr(a, f), getattr(b, f)) for f in fields)
    )


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


def test_a_list_is_the_chain_of_the_single_nodes(clip, embedding):
    base, other = embedding(seed=0), embedding(seed=1)
    (chain,) = RegionalPrompt.execute(clip, "a red circle", *LEFT, "replace", embedding=base).result
    (chain,) = ComposeEmbeddings.execute(chain, other, *RIGHT, "join").result
    (chain,) = PlaceEmbedding.execute(chain, other, 0.25, 0.25, 0.5, 0.5, "replace").result
    listed = text(
        CIRCLE,
        {"box": RIGHT, "speaks": 2, "mode": "join"},
        {"box": [0.25, 0.25, 0.5, 0.5], "speaks": 2, "placed": True},
        {"box": LEFT, "on": False},  # neither a prompt nor an embedding, and nobody asks
    )
    made, masks = Regions.execute(listed, clip, base, other_2=other).result
    assert same(made, chain) and masks.shape == (3, 256, 256)
    assert torch.equal(masks[0], kernel.box_mask((0, 0, 0.5, 1)))
    _, sized = Regions.execute(listed, clip, base, image=torch.zeros(1, 40, 60, 3), other_2=other).result
    assert sized.shape == (3, 40, 60) and sized[0, :, :29].min() == 1 and sized[0, :, 31:].max() == 0


def test_a_painted_shape_its_border_its_strength_and_its_balance(clip, embedding):
    base, other = embedding(seed=0), embedding(seed=1)
    disc = ((torch.arange(256) - 128) ** 2 + (torch.arange(256)[:, None] - 100) ** 2 < 60**2).float()
    region = {"mask": region_list.runs(disc), "box": LEFT, "feather": 0.1, "speaks": 1, "strength": 1.5, "balance": 0.5}
    made, masks = Regions.execute(text(region), embedding=base, other_1=other).result
    soft = kernel.feather(disc, 0.1)
    assert torch.equal(masks[0], soft), "what is painted goes before the box"
    loud = algebra.with_balance(algebra.with_strength(other, 1.5), 0.5)
    assert same(made, kernel.insert(base, loud, soft))


def test_detections_are_shapes_in_the_order_of_the_list(clip):
    mask = torch.zeros(2, 32, 32)
    mask[0, :, 24:], mask[1, 16:] = 1, 1
    prompts = ("a red circle", "remove the circle", "a circle")
    three = text(*({"name": str(at), "box": LEFT, "prompt": prompt} for at, prompt in enumerate(prompts)))
    answer = Regions.execute(three, clip, masks=mask)
    shapes = answer.result[1]
    assert torch.equal(shapes[2], kernel.box_mask((0, 0, 0.5, 1))), "the third keeps its own"
    assert (shapes[0] > 0.5).float().mean() == 0.25 and (shapes[1] > 0.5).float().mean() == 0.5
    assert [found["box"] for found in answer.ui["found"]] == [[0.75, 0, 0.25, 1], [0, 0.5, 1, 0.5]]
    again = text(*(CIRCLE | {"mask": found["mask"]} for found in answer.ui["found"]))
    assert torch.equal(Regions.execute(again, clip).result[1], shapes[:2]), "the page may keep what was found"
    picture, found = torch.zeros(1, 200, 100, 3), [{"x": 50, "y": 0, "width": 50, "height": 100}]
    answer = Regions.execute(three, clip, image=picture, bboxes=found)
    assert answer.ui["found"] == [{"box": [0.5, 0.0, 0.5, 0.5], "mask": None}]
    assert answer.result[1][0, :99, 51:].min() == 1 and answer.result[1][0].mean() == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match="mask of the region is empty"):
        Regions.execute(three, clip, masks=torch.zeros(1, 8, 8))


def test_what_is_missing_is_named(clip, embedding):
    for regions, given, sentence in (
        ((CIRCLE,), {}, "The region 'left' has a prompt, and no CLIP is connected"),
        (({"name": "sky", "box": LEFT, "speaks": 3},), {}, "The region 'sky' shows other_3 and nothing is connected there"),
        ((), {}, "No region is on"),
        ((CIRCLE | {"on": False},), {}, "No region is on"),
        (({"name": "dot", "box": [0.2, 0.2, 0, 0.1], "prompt": "a circle"},), {"clip": clip}, "Of the region 'dot': The box"),
        ((CIRCLE,), {"clip": clip, "embedding": embedding(width=8)}, "The region 'left' cannot be laid on what is there: Emb"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Regions.execute(text(*regions), **given)
    base = embedding()
    assert Regions.execute("", embedding=base).result[0] is base


def test_the_queue_refuses_what_cannot_run():
    assert Regions.validate_inputs(regions=text(CIRCLE)) is True and Regions.validate_inputs(regions=None) is True
    assert "broken" in Regions.validate_inputs(regions="{")
    assert "The region 'left' has an empty prompt" in Regions.validate_inputs(regions=text(CIRCLE | {"prompt": " "}))
    assert Regions.validate_inputs(regions=text(CIRCLE | {"prompt": "", "on": False})) is True


@pytest.mark.parametrize("settings", [{}, {"blocks": "single 0", "end": 0.2}], ids=["everywhere", "some blocks and steps"])
@pytest.mark.parametrize("time", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.7)])
def test_out_of_its_time_nothing_of_a_region_reaches_the_attention(toy, clip, embedding, time, settings, monkeypatch):
    """Step by step from the same noise, with quite other tokens in the region's place: out of its time what the model gives
    differs by exactly 0, and within it differs, also in blocks and steps in which Masked Attention leaves boxes alone."""
    base, region = embedding("tree64"), CIRCLE | {"start": time[0], "end": time[1]}
    e = Regions.execute(text(region), clip, base).result[0]
    own = (e.tokens[0, :, None] == prompt.words(clip, "a red circle")[0][0]).all(-1).any(1)
    assert own.sum() == 4 and e.token_count > 64 + 4, "what is beneath comes back"
    loud = dataclasses.replace(e, tokens=torch.where(own[:, None], -20 * e.tokens, e.tokens))
    noise, steps, seen = comfy.sample.prepare_noise(torch.zeros(1, 8, 8, 8), 0), 6, []
    model = flux.patch(toy.model, **settings)
    schedule = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(schedule, "simple", steps)
    for step in range(steps):
        outputs = []
        for tokens in (e, loud):
            positive = to_conditioning(tokens, toy.plain(5))
            outputs.append(comfy.sample.sample(
                model, noise, steps, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise), disable_pbar=True,
                start_step=step, last_step=step + 1, seed=0,
            ))  # fmt: skip
        due = schedule.percent_to_sigma(time[0]) >= float(sigmas[step]) > schedule.percent_to_sigma(time[1])
        assert ((outputs[0] - outputs[1]).abs().max() > 0) == due, (step, float(sigmas[step]))
        seen.append(due)
    assert any(seen) and not all(seen)


def test_out_of_its_time_what_is_beneath_shows(toy, clip, embedding):
    """A region whose time is over before the first step is not there, and one that begins at once and never ends is."""
    base = embedding("tree64")

    def painted(**times):
        return toy.sample(flux.patch(toy.model), to_conditioning(Regions.execute(text(CIRCLE | times), clip, base).result[0]))

    bare = toy.sample(flux.patch(toy.model), to_conditioning(base))
    assert torch.allclose(painted(start=0.3, end=0.3), bare, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(painted(), bare, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(painted(end=0.4), painted(), rtol=1e-2, atol=1e-2)


def test_schedules_without_a_base_and_on_either_side_of_the_guidance(toy, clip, embedding):
    """When nothing of an embedding is there the text alone is read, and without any text as little as a model can read; rows
    of one batch have times of their own."""
    alone, _ = Regions.execute(text(CIRCLE | {"end": 0.4}), clip).result
    model, words = flux.patch(toy.model), toy.plain(5)
    assert torch.isfinite(toy.sample(model, to_conditioning(alone), steps=4)).all()
    never = Regions.execute(text(CIRCLE | {"start": 0.4, "end": 0.4}), clip).result[0]
    assert torch.equal(toy.sample(model, to_conditioning(never, words)), toy.sample(toy.model, words))
    base = embedding("tree64")
    one, two = (Regions.execute(text(CIRCLE | part), clip, base).result[0] for part in ({"end": 0.4}, {"start": 0.4}))
    guided = toy.sample(model, to_conditioning(one), to_conditioning(two), cfg=3.0, steps=1)
    first, second = (toy.sample(model, to_conditioning(e), steps=1) for e in (one, two))
    assert torch.allclose(guided, second + 3.0 * (first - second), rtol=1e-3, atol=1e-3)

