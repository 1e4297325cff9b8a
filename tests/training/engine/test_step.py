"""The random numbers of a step."""
from __future__ import annotations

import numpy as np
import torch
from semantic_diffusion_adapter.training.engine import Step, World

CPU = torch.device("cpu")


def step(positions=range(8), number: int = 5, seed: int = 0, stage: str = "toy") -> Step:
    return Step(number, 10, seed, stage, CPU, positions, 8)


def draws(s: Step) -> list[torch.Tensor]:
    return [s.randn(2, 3), s.rand(), s.randn()]


def test_a_sample_gets_the_same_numbers_in_every_world_and_micro_batch():
    whole = draws(step())
    for size, micro in ((1, 2), (2, 0), (2, 2), (4, 1), (8, 1)):
        shares = [positions for rank in range(size) for positions in World(rank, size, rank, size, CPU).share(8, micro)]
        assert [p for positions in shares for p in positions] == list(range(8)), "every sample once"
        for rows, each in zip(whole, zip(*(draws(step(positions)) for positions in shares))):
            assert torch.equal(torch.cat(each), rows)


def test_the_numbers_depend_on_seed_stage_step_position_and_call():
    rows = [step().randn(4), step(number=6).randn(4), step(seed=1).randn(4), step(stage="yot").randn(4)]
    s = step()
    s.randn(4)
    rows = torch.cat([*rows, s.randn(4)])
    assert len(rows.unique(dim=0)) == 5 * 8 and torch.equal(step().randn(4), rows[:8])


def test_the_numbers_are_normal_and_uniform():
    s = step(range(200))
    normal, uniform = s.randn(500).double().numpy(), s.rand(500).double().numpy()
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(normal) - np.eye(200)).max() < 0.25, "samples are independent"


def test_the_shared_stream_is_one_for_all_and_goes_on():
    a, b = step(range(2)), step(range(4, 8))
    for _ in range(2):
        drawn = [torch.rand(3, generator=s.shared()) for s in (a, b)]
        assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], torch.rand(3, generator=step().shared()))
