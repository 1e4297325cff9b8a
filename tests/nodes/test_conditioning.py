"""What becomes of layout, tokens, text and pooled on the way to KSampler."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

from semantic_diffusion_adapter.kernels import algebra, layout  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import LAYOUT_KEY, MASKS_KEY, to_conditioning  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def test_pooled_is_the_texts_else_the_adapters_else_zeros(embedding):
    e, text = embedding(), [[torch.randn(1, 3, 24), {"pooled_output": torch.ones(1, 24), "guidance": 2.0}]]
    with_text = to_conditioning(e, text)[0][1]
    assert torch.equal(with_text["pooled_output"], torch.ones(1, 24)) and with_text["guidance"] == 2.0
    assert torch.equal(to_conditioning(e)[0][1]["pooled_output"], e.pooled)
    bare = embedding(pooled=False, batch=2)
    told = dataclasses.replace(bare, source={"pooled_width": 24})
    assert torch.equal(to_conditioning(told)[0][1]["pooled_output"], torch.zeros(2, 24))
    assert to_conditioning(bare)[0][1]["pooled_output"].shape == (2, 768), "wide enough for FLUX.1, core cuts it"


def test_text_follows_the_region_tokens_and_is_left_as_it_was(embedding):
    e = embedding(batch=2)
    prompt = torch.randn(1, 3, 24)
    text = [[prompt, {"pooled_output": torch.ones(1, 24)}], [prompt * 2, {"start_percent": 0.5}]]
    result = to_conditioning(e, text)
    assert len(result) == 2 and result[1][1]["start_percent"] == 0.5
    assert torch.equal(result[1][0], torch.cat([e.tokens, (prompt * 2).expand(2, -1, -1)], dim=1))
    assert set(text[0][1]) == {"pooled_output"} and text[0][0] is prompt


def test_two_embeddings_are_decoded_together(embedding):
    a, b = embedding(seed=1), embedding("global16", seed=2)
    text = [[torch.randn(1, 3, 24), {"pooled_output": torch.ones(1, 24)}]]
    tokens, settings = to_conditioning(a, to_conditioning(b, text))[0]
    assert torch.equal(tokens, torch.cat([a.tokens, b.tokens, text[0][0]], dim=1))
    conds = settings["model_conds"]
    assert torch.equal(conds[LAYOUT_KEY].cond, torch.cat([layout.encode(a)[0], layout.encode(b)[0]], dim=1))
    assert set(conds) == {LAYOUT_KEY}, "without a mask there is no second key"


def confined(e, *masks):
    """Tokens in turn in each of the masks and in none."""
    return dataclasses.replace(e, masks=torch.stack(masks), masked_by=torch.arange(e.token_count) % (len(masks) + 1) - 1)


def test_core_s_concat_and_average_lose_boxes_as_the_help_says(embedding):
    """What is lost cannot be seen afterwards, so the tooltip and the page warn of it: this is what they say."""
    from semantic_diffusion_adapter.nodes.decode import EmbeddingToConditioning

    from nodes import ConditioningAverage, ConditioningConcat

    def layouts(conditioning):
        return [settings["model_conds"][LAYOUT_KEY].cond for _, settings in conditioning if "model_conds" in settings]

    one, two = (embedding("tree64", seed=seed) for seed in (1, 2))
    x0, y0, x1, y1 = two.boxes.unbind(1)
    mirrored = dataclasses.replace(two, boxes=torch.stack([1 - x1, y0, 1 - x0, y1], 1))
    text = [[torch.randn(1, 5, 24), {"pooled_output": torch.randn(1, 24)}]]
    first, second = to_conditioning(one), to_conditioning(mirrored)
    concat, average = ConditioningConcat().concat, ConditioningAverage().addWeighted
    assert layouts(concat(text, first)[0]) == []
    assert torch.equal(layouts(concat(first, second)[0])[0], layouts(first)[0])
    assert torch.equal(layouts(to_conditioning(one, second))[0], torch.cat([layouts(first)[0], layouts(second)[0]], 1))
    mixed = average(first, second, 0.5)[0]
    assert torch.equal(layouts(mixed)[0], layouts(first)[0]) and torch.equal(mixed[0][0], (one.tokens + two.tokens) / 2)

    tooltip = next(i.tooltip for i in EmbeddingToConditioning.GET_SCHEMA().inputs if i.id == "text")
    page = (ROOT / "web" / "docs" / "SDAEmbeddingToConditioning.md").read_text(encoding="utf-8")
    for name in ("Conditioning (Concat)", "Conditioning (Average)"):
        assert name in tooltip and name in page
    assert "Blend Embeddings" in page and "Compose Embeddings" in page and "`text`" in page


def test_joined_masks_stay_with_their_tokens(embedding):
    masks = torch.randint(0, 256, (3, 256, 256)) / 255
    a, b, free = confined(embedding(seed=1), masks[0], masks[1]), confined(embedding(seed=2), masks[2]), embedding(seed=3)
    joined = to_conditioning(a, to_conditioning(free, to_conditioning(b)))[0][1]["model_conds"]
    boxes, _, table, rows = layout.decode(joined[LAYOUT_KEY].cond, joined[MASKS_KEY].cond)
    assert torch.allclose(table, masks) and boxes.shape == (192, 4)
    assert torch.equal(rows[:64], a.masked_by) and (rows[64:128] == -1).all()
    assert torch.equal(rows[128:], torch.where(b.masked_by < 0, -1, b.masked_by + 2))
    last = to_conditioning(free, to_conditioning(b))[0][1]["model_conds"]
    assert torch.equal(layout.decode(last[LAYOUT_KEY].cond, last[MASKS_KEY].cond)[3][64:], b.masked_by)
    composed = to_conditioning(algebra.compose([a, free, b]))[0][1]["model_conds"]
    assert all(torch.equal(joined[key].cond, composed[key].cond) for key in (LAYOUT_KEY, MASKS_KEY))


def test_refusals(embedding):
    e = embedding(batch=2)
    with pytest.raises(ValueError, match="width 8 and the embedding 24"):
        to_conditioning(e, [[torch.randn(1, 3, 8), {}]])
    with pytest.raises(ValueError, match="2 images and the text conditioning 3 prompts"):
        to_conditioning(e, [[torch.randn(3, 3, 24), {}]])
    with pytest.raises(ValueError, match="attention mask"):
        to_conditioning(e, [[torch.randn(1, 3, 24), {"attention_mask": torch.zeros(1, 4, 4)}]])
