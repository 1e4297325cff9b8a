"""Batches that other processes prepare are those of the steps, in their order."""
from __future__ import annotations

import torch
from semantic_diffusion_adapter.training.engine import Ahead, Step
from semantic_diffusion_adapter.training.engine.ahead import in_order

CPU = torch.device("cpu")


def prepare(step: Step) -> dict[str, torch.Tensor]:
    return {"noise": step.randn(3), "number": torch.tensor(step.number)}


def steps(first: int, count: int, positions: range = range(4)) -> list[Step]:
    return [Step(number, 10, 0, "toy", CPU, positions, 4) for number in range(first, first + count)]


def test_processes_prepare_what_the_step_itself_would():
    alone, beside = Ahead(prepare, CPU, 2), Ahead(prepare, CPU, 2)
    assert alone.processes == 0  # a CPU keeps its cores
    beside.processes = 2
    # A run of steps, a micro-batch of two of their samples, and a step back as after a resume.
    for step in (*steps(3, 4), *steps(3, 2, range(2, 4)), *steps(5, 2)):
        expected, made = alone(step), beside(step)
        assert int(made["number"]) == step.number
        assert torch.equal(made["noise"], expected["noise"])


def test_calls_come_back_in_their_order():
    made = in_order(lambda item: {"twice": torch.tensor(2 * item)}, range(5, 9), CPU)
    assert [int(each["twice"]) for each in made] == [10, 12, 14, 16]
