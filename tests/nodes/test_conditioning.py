"""The layout's fixed point, and what becomes of tokens, text and pooled on the way to KSampler."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("comfy.sd", reason="no ComfyUI here: set COMFYUI_PATH, or `python3 run.py test` makes one")

from semantic_diffusion_adapter.kernels import algebra  # noqa: E402
from semantic_diffusion_adapter.kernels.embedding import SemanticEmbedding  # noqa: E402
from semantic_diffusion_adapter.nodes.host import layout  # noqa: E402
from semantic_diffusion_adapter.nodes.host.conditioning import LAYOUT_KEY, to_conditioning  # noqa: E402

UNIT = st.floats(0, 1, width=32)


@given(
    st.lists(st.tuples(UNIT, UNIT, UNIT, UNIT, st.integers(0, 9), st.floats(-100, 100) | st.just(-torch.inf)), min_size=1)
)
@settings(deadline=None, max_examples=50)
def test_layout_round_trip(rows):
    rows = [row for row in rows if row[0] < row[2] and row[1] < row[3]] or [(0.0, 0.0, 1.0, 1.0, 0, 0.0)]
    table = torch.tensor(rows, dtype=torch.float64)
    e = SemanticEmbedding(
        torch.zeros(1, len(rows), 1), table[:, :4].float(), table[:, 4].long(), table[:, 5].float()
    )
    encoded = layout.encode(e)
    assert encoded.dtype == torch.int32 and encoded.shape == (1, len(rows), 6)
    boxes, strengths = layout.decode(encoded)
    assert (boxes - e.boxes).abs().max() <= 0.5 / 65536 + 1e-7
    assert torch.equal(strengths.isinf(), e.strengths.isinf())
    assert torch.allclose(strengths, e.strengths, atol=1e-5, rtol=1e-6)
    assert torch.equal(encoded[0, :, 4], e.levels.int())


def test_layout_of_a_batch_is_shared_where_it_is_one(embedding):
    e = embedding()
    one = layout.encode(e)
    assert layout.decode(one.repeat(3, 1, 1))[0].shape == (64, 4)
    other = layout.encode(algebra.with_strength(e, 0.0, levels={2}))
    boxes, strengths = layout.decode(torch.cat([one, other]))
    assert boxes.shape == (2, 64, 4) and strengths.shape == (2, 64)
    assert torch.equal(strengths[0], e.strengths) and torch.isinf(strengths[1, 32:]).all()


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
    assert torch.equal(settings["model_conds"][LAYOUT_KEY].cond, torch.cat([layout.encode(a), layout.encode(b)], dim=1))


def test_refusals(embedding):
    e = embedding(batch=2)
    with pytest.raises(ValueError, match="width 8 and the embedding 24"):
        to_conditioning(e, [[torch.randn(1, 3, 8), {}]])
    with pytest.raises(ValueError, match="2 images and the text conditioning 3 prompts"):
        to_conditioning(e, [[torch.randn(3, 3, 24), {}]])
    with pytest.raises(ValueError, match="attention mask"):
        to_conditioning(e, [[torch.randn(1, 3, 24), {"attention_mask": torch.zeros(1, 4, 4)}]])
