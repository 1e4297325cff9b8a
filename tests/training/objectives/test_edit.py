from __future__ import annotations

import pytest
import torch
from semantic_diffusion_adapter.kernels.edit_decoder import T5EditDecoder, T5EditDecoderConfig
from semantic_diffusion_adapter.kernels.hierarchy import PRESETS
from semantic_diffusion_adapter.training.engine import Step
from semantic_diffusion_adapter.training.objectives.edit import EditorTraining, corrupt, editor_loss

TREE = PRESETS["tree64"]


def step(batch: int) -> Step:
    return Step(0, 1, 0, "editor", torch.device("cpu"), range(batch), batch)


def setup(seed: int = 0):
    """(decoder with statistics, source, target, instruction)"""
    torch.manual_seed(seed)
    decoder = T5EditDecoder(T5EditDecoderConfig(12, 8, TREE.to_json(), width=16, heads=2, layers=1))
    decoder.set_token_statistics(torch.randn(12), torch.rand(12) + 0.5)
    return decoder, torch.randn(3, 64, 12), torch.randn(3, 64, 12), torch.randn(3, 5, 8)


def loss(decoder, source, target, instruction, **settings):
    return editor_loss(decoder, source, target, TREE.boxes(), TREE.level_ids(), instruction, EditorTraining(**settings),
                       step(len(source)))


def test_corruption_adds_noise_in_the_spaces_units_and_takes_tokens_from_the_source():
    _, source, target, _ = setup()
    target, source, std = target.repeat(40, 1, 1), source.repeat(40, 1, 1), torch.full((12,), 2.0)
    clean = corrupt(target, source, std, EditorTraining(noise=0, replaced=0), step(120))
    assert torch.equal(clean, target)
    swapped = corrupt(target, source, std, EditorTraining(noise=0, replaced=0.2), step(120))
    from_source = (swapped == source).all(-1)
    assert ((swapped == target).all(-1) ^ from_source).all() and abs(float(from_source.float().mean()) - 0.2) < 0.02
    noise = corrupt(target, source, std, EditorTraining(noise=0.3, replaced=0), step(120)) - target
    assert abs(float(noise.std()) - 0.6) < 0.01 and abs(float(noise.mean())) < 0.01


def test_an_untrained_decoder_copies_and_pays_for_it():
    total, parts = loss(*setup())
    assert parts["parallel"].item() == pytest.approx(parts["copy"].item(), rel=1e-4)
    assert parts["autoregressive"].item() == pytest.approx(parts["copy"].item(), rel=1e-4)
    assert total.item() == pytest.approx(2 * parts["copy"].item(), rel=1e-4)


def test_nothing_to_change_costs_nothing():
    decoder, source, _, instruction = setup()
    assert loss(decoder, source, source, instruction)[0].item() < 1e-9


def test_changed_tokens_weigh_more():
    """An error of equal size costs more on a token that was to change than on one that was not."""
    decoder, source, _, instruction = setup()
    target = source.clone()
    target[:, 7] += 3 * decoder.token_std
    with torch.no_grad():
        missed = loss(decoder, source, target, instruction, changed=4.0)[1]["parallel"].item()
        even = loss(decoder, source, target, instruction, changed=0.0)[1]["parallel"].item()
    # Weights 5 and 1 with mean 1: the changed one of 64 tokens counts 5 / (68 / 64).
    assert even == pytest.approx(9 / 64, rel=1e-3) and missed == pytest.approx(9 / 64 * 5 * 64 / 68, rel=1e-3)


def test_both_modes_learn_and_stay_finite():
    decoder, source, target, instruction = setup()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    first = None
    for _ in range(25):
        total, parts = loss(decoder, source, target, instruction)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        first = first or {k: v.item() for k, v in parts.items()}
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters() if p.grad is not None)
    assert parts["parallel"] < first["parallel"] and parts["autoregressive"] < first["autoregressive"]
