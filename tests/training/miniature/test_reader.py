"""The stage that teaches the text encoder to say what is where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from semantic_diffusion_adapter.training.config import RunConfig
from semantic_diffusion_adapter.training.engine import Step
from semantic_diffusion_adapter.training.miniature import reader
from semantic_diffusion_adapter.training.miniature.captions import VOCABULARY
from semantic_diffusion_adapter.training.miniature.text import build_text_encoder, load_text_encoder, token_ids, waves


@pytest.fixture
def stage(tmp_path: Path) -> reader.ReaderStage:
    torch.manual_seed(0)
    run = RunConfig(out=tmp_path, max_steps=1, batch=16, device="cpu")
    return reader.ReaderStage(reader.Config(run, tmp_path / "text.safetensors", tmp_path, scenes=16), torch.device("cpu"))


def test_a_few_steps_teach_it_something_and_reach_the_encoder(stage: reader.ReaderStage) -> None:
    optimizer = torch.optim.AdamW(stage.trainables.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):  # the same step, so the same texts and scenes
        loss, _ = stage.loss(Step(0, 1, 0, "text", torch.device("cpu"), range(16), 16))
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in stage.trainables["text"].parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_exported_encoder_is_the_trained_one(stage: reader.ReaderStage) -> None:
    stage.export(3)
    loaded = load_text_encoder(stage.config.export, torch.device("cpu"))
    for name, tensor in stage.trainables["text"].state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], tensor, atol=0.03), name  # stored in eight bits


def test_recall_counts_the_words_about_shapes_and_nothing_else() -> None:
    ids = token_ids(["a small red circle at 34 88, a large blue cross at the top left, on a grey ground"])
    codes = torch.randn(len(VOCABULARY), 6, generator=torch.Generator().manual_seed(0))
    about = [["small", "red", "34", "88", "a"], ["large", "blue", "the", "top", "left"]]
    perfect = torch.full((1, ids.shape[1], 5 * 6), 7.0)  # wrong wherever no shape stands
    for shape, words in zip(("circle", "cross"), about):
        at = int((ids[0] == VOCABULARY.index(shape)).nonzero())
        perfect[0, at] = torch.cat([codes[VOCABULARY.index(word)] for word in words])
    assert reader.recall_loss(perfect, ids, codes) == 0
    assert reader.recall_loss(torch.zeros_like(perfect), ids, codes) > 0.3
    assert reader.recall_loss(perfect, token_ids([""]), codes) == 0


def test_near_coordinates_have_near_words() -> None:
    torch.manual_seed(0)
    rows = waves([float(n) for n in range(0, 128, 2)], 192)
    assert 0.8 < rows.std() < 1.25
    likeness = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert likeness.diagonal(1).min() > 0.8 > 0.5 > likeness.diagonal(16).max()  # 2 px and 32 px apart
    table = build_text_encoder().shared.weight
    words = [table[VOCABULARY.index(word)] for word in ("34", "36", "red")]
    assert torch.cosine_similarity(words[0], words[1], dim=0) > 0.8 > 0.4 > torch.cosine_similarity(words[0], words[2], dim=0).abs()
