"""Not a test: a toy stage, and how to train it."""
from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from semantic_diffusion_adapter.training.config import RunConfig
from semantic_diffusion_adapter.training.engine import Step, World, train
from torch import nn


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
    stage.out = run.out
    train(stage, Config(run), World.start("cpu"))
    return stage


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def read(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
