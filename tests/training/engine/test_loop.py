"""The loop on a toy stage: the real optimizer, checkpoints, averages and signals."""
from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch
from torch import nn

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e '.[training]'")

from semantic_diffusion_adapter.training.config import RunConfig  # noqa: E402
from semantic_diffusion_adapter.training.engine import Step, World, learning_rate, train  # noqa: E402


class Toy:
    """A convolution in channels-last memory and a normalised linear layer, one weight under two names; `at` maps a step
    to what happens in it."""

    name = "toy"

    def __init__(self, init: int = 0, at: dict | None = None):
        torch.manual_seed(init)
        self.at, self.seen, self.exported, self.identity = at or {}, [], None, {"base": "abc"}
        self.trainables = nn.ModuleDict({
            "conv": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
            "head": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)),
        })
        last = self.trainables["head"][1]
        last.register_parameter("alias", last.weight)  # tied weights, as T5's word table

    def loss(self, step: Step):
        if step.number in self.at:
            self.at[step.number]()
        x = step.randn(3, 6, 6)
        self.seen.append((step.number, float(x.sum())))
        out = self.trainables["head"](self.trainables["conv"](x).mean((2, 3)))
        loss = (out.float() - x.mean((2, 3))[:, :2]).square().mean()
        return loss, {"error": loss}

    def scales(self, step):
        return {"conv": 0.5}

    def validate(self):
        return {"weight": float(self.trainables["head"][1].weight.sum())}

    def export(self, step):
        self.exported = {k: v.clone() for k, v in self.trainables.state_dict().items()}


@dataclass(frozen=True)
class Config:
    run: RunConfig


def settings(out, **fields) -> RunConfig:
    return RunConfig(**{"out": out, "max_steps": 6, "batch": 2, "warmup": 2, "save_every": 3, "validate_every": 100,
                        "log_every": 1, "device": "cpu", **fields})


def go(stage: Toy, run: RunConfig) -> Toy:
    train(stage, Config(run), World.start("cpu"))
    return stage


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def straight(tmp_path) -> Toy:
    """A run of six steps in one go."""
    return go(Toy(), settings(tmp_path / "straight"))


def stop_at(step: int, number: int = signal.SIGTERM) -> dict:
    return {step: lambda: os.kill(os.getpid(), number)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_same_bit_for_bit(tmp_path, straight, number):
    run = settings(tmp_path / "cut", save_every=100)
    handler = signal.getsignal(number)
    first = go(Toy(at=stop_at(1, number)), run)
    assert signal.getsignal(number) == handler
    assert [step for step, _ in first.seen] == [0, 1] and first.exported is None
    assert [p.name for p in (run.out / "checkpoints").iterdir()] == ["step_00000002"]
    second = go(Toy(init=9), run)
    assert first.seen + second.seen == straight.seen
    assert same(second.trainables.state_dict(), straight.trainables.state_dict())
    assert same(second.exported, straight.exported)


def test_a_crash_goes_on_from_the_last_checkpoint(tmp_path, straight):
    def crash():
        raise KeyboardInterrupt

    run = settings(tmp_path / "crash")
    with pytest.raises(KeyboardInterrupt):
        go(Toy(at={4: crash}), run)
    # What a run that is killed while writing leaves behind must not be taken for a checkpoint.
    checkpoints = run.out / "checkpoints"
    for name in (".writing_00000005", "step_00000005"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "trainables.safetensors").write_bytes(b"half")
    second = go(Toy(init=9), run)
    assert second.seen == straight.seen[3:]
    assert same(second.exported, straight.exported)


def test_a_finished_run_only_exports_again(tmp_path, straight):
    again = go(Toy(init=9), settings(tmp_path / "straight"))
    assert again.seen == [] and same(again.exported, straight.exported)


def test_a_plateau_can_be_extended(tmp_path):
    run = settings(tmp_path / "longer", decay=0.5)
    go(Toy(), run)
    assert [step for step, _ in go(Toy(), settings(tmp_path / "longer", decay=0.5, max_steps=9)).seen] == [6, 7, 8]


def test_export_and_validation_see_the_averaged_weights(straight):
    live = straight.trainables.state_dict()  # the engine leaves the averaged weights in place after the export
    assert same(live, straight.exported)


def test_a_run_folder_belongs_to_one_stage(tmp_path, straight):
    other = Toy()
    other.name = "other"
    with pytest.raises(ValueError, match="holds a run of 'toy', not of 'other'"):
        go(other, settings(tmp_path / "straight"))
    with pytest.raises(ValueError, match="already holds checkpoints"):
        go(Toy(), settings(tmp_path / "straight", resume="never"))


def test_a_gradient_that_is_not_finite_ends_the_run_with_good_weights(tmp_path):
    stage = Toy()
    stage.at[4] = lambda: stage.trainables["head"][1].bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 4"):
        go(stage, settings(tmp_path / "nan"))
    assert go(Toy(), settings(tmp_path / "nan")).seen[0][0] == 3


def test_metrics_are_written_per_step(tmp_path, straight):
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert lines[1].keys() >= {"samples", "loss", "error", "lr/conv", "lr/head", "gradient_norm", "samples_per_second", "memory_gib"}
    assert lines[3]["lr/conv"] == lines[3]["lr/head"] / 2 > 0 and lines[3]["samples"] == 6
    assert "validation/weight" in lines[0] and "validation/weight" in lines[-1]
    assert list((tmp_path / "straight").glob("events.out.tfevents.*"))


def test_the_learning_rate_warms_up_stays_and_falls_to_zero(tmp_path):
    run = settings(tmp_path, max_steps=100, warmup=10, decay=0.2, lr=1.0)
    rates = [learning_rate(run, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9:80] == pytest.approx([1.0] * 71)
    assert rates[90] == pytest.approx(0.5) and rates[100] == 0 and rates[99] > 0
