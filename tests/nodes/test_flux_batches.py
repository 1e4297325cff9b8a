"""Core joins conditionings into one forward, and a conditioning holds several images: each is masked by its own boxes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

from semantic_diffusion_adapter.nodes.host import flux  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import to_conditioning  # noqa: E402

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


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
