"""The stage that teaches the text encoder to say what is where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from semantic_diffusion_adapter.training.config import RunConfig
from semantic_diffusion_adapter.training.miniature import reader
from semantic_diffusion_adapter.training.miniature.text import load_text_encoder


@pytest.fixture
def stage(tmp_path: Path) -> reader.ReaderStage:
    torch.manual_seed(0)
    run = RunConfig(out=tmp_path, max_steps=1, batch=16, device="cpu")
    return reader.ReaderStage(reader.Config(run, tmp_path / "text.safetensors", scenes=16), torch.device("cpu"))


def test_a_few_steps_teach_it_something_and_reach_the_encoder(stage: reader.ReaderStage) -> None:
    optimizer = torch.optim.AdamW(stage.trainables.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):  # the same step, so the same texts and scenes
        loss, _ = stage.loss(0, torch.Generator().manual_seed(0))
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
        assert torch.allclose(loaded.state_dict()[name], tensor, atol=2e-3), name
