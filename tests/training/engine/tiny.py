"""Not a test: a stage of a few milliseconds a step, and a program that trains it, for torchrun.

usage: tiny.py OUT
"""
from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  (what an optimizer imports, and the run folder: here, so that forked processes have it)
import torch.utils.tensorboard  # noqa: F401
from semantic_diffusion_adapter.training.config import RunConfig
from semantic_diffusion_adapter.training.engine import World, train
from torch import nn

WIDTH = 512


@dataclass(frozen=True)
class Config:
    run: RunConfig


class Tiny:
    """A wide linear layer, so that a checkpoint takes as long as a few steps, and one that learns from step 10."""

    name = "tiny"

    def __init__(self, seconds: float = 0.0, at: dict | None = None):
        torch.manual_seed(0)
        self.seconds, self.at, self.identity = seconds, at or {}, {"base": "abc"}
        self.trainables = nn.ModuleDict({"wide": nn.Linear(WIDTH, WIDTH), "late": nn.Linear(WIDTH, 4)})

    def loss(self, step):
        time.sleep(self.seconds)
        x = step.randn(WIDTH)
        out = self.trainables["late"](self.trainables["wide"](x).tanh())
        loss = (out - x[:, :4]).square().mean()
        for (number, position), event in self.at.items():
            if number == step.number and position in step.positions:  # in one process of two
                loss = loss * event()
        return loss, {"size": out.square().mean()}

    def scales(self, step):
        return {"late": 0.5 if step >= 10 else 0.0}

    def validate(self):
        return {"weight": float(self.trainables["wide"].weight.double().sum())}

    def export(self, step):
        pass


def settings(out: Path, **fields) -> Config:
    return Config(RunConfig(**{"out": out, "max_steps": 80, "batch": 4, "micro": 2, "warmup": 5, "device": "cpu", "precision": "fp32",
                               "save_every": 3, "validate_every": 21, "log_every": 1000, **fields}))


def main(config: Config, seconds: float = 0.0, at: dict | None = None) -> bool:
    torch.set_num_threads(1)
    world = World.start("cpu")
    ended = train(Tiny(seconds, at), config, world)
    world.leave()
    return ended


if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / f"pid.{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
    sys.exit(0 if main(settings(out), 0.02) else 130)
