"""What is trained, and the step that it is given.

All random numbers of a step are a pure function of (seed, stage, step, position in the global batch). So neither the
number of processes, nor the size of a micro-batch, nor a resume changes a single draw.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn


def _hash(*parts) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def seeded(seed: int, stage: str, step: int, device: torch.device) -> torch.Generator:
    """A random stream of one step, the same for every process and on every resume."""
    return torch.Generator(device).manual_seed(_hash(seed, stage, step) >> 1)


@dataclass(frozen=True)
class Step:
    """One micro-batch of one optimizer step."""

    number: int
    """The optimizer step, from 0."""
    total: int
    """Steps over which the phases of the run are planned. A run that was extended goes beyond them."""
    seed: int
    stage: str
    device: torch.device
    positions: range
    """Positions of this micro-batch's samples in the global batch."""
    batch: int
    """Samples of the global batch."""

    @property
    def progress(self) -> float:
        """Share of the planned steps before this one: in [0, 1), and more in a run that was extended."""
        return self.number / self.total

    def shared(self) -> torch.Generator:
        """The CPU stream for choices of the whole step (a preset, a bucket). It is equal in every process and
        micro-batch, as long as each draws the same things from it."""
        return self._shared

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers [len(positions), *shape], float32 on the device. Row i continues the stream of
        positions[i]."""
        return self._draw(lambda stream: stream.standard_normal(shape, np.float32), shape)

    def rand(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), [len(positions), *shape], float32 on the device; the same rule as randn."""
        return self._draw(lambda stream: stream.random(shape, np.float32), shape)

    def _draw(self, draw, shape: tuple[int, ...]) -> Tensor:
        rows = np.empty((len(self.positions), *shape), np.float32)
        for row, stream in enumerate(self._streams):
            rows[row] = draw(stream)
        return torch.from_numpy(rows).to(self.device)

    @cached_property
    def _shared(self) -> torch.Generator:
        return seeded(self.seed, self.stage, self.number, torch.device("cpu"))

    @cached_property
    def _streams(self) -> list[np.random.Generator]:
        # Philox is counter-based: its key (seed and stage, step) and the position as its highest word never overlap.
        key = np.array([_hash(self.seed, self.stage), self.number], np.uint64)
        return [np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, position], np.uint64)))
                for position in self.positions]


class Stage(Protocol):
    """What is trained. `trainables` holds every parameter that may learn; frozen parts live outside it.

    A stage may also have: `pictures()` -> {name: uint8 array [H, W, 3]} for validation/ and TensorBoard;
    `describe(step)` -> names of the micro-batch's samples; `effort(number)` -> the relative cost of a step (the square
    of its resolution), for the time that is left; `report()` -> str, printed before the first step; `frozen` -> {name:
    module} for --dry-run; `whole_batch` = True where the loss compares the samples of a batch with one another, so that
    the batch can be neither split nor shared.
    """

    name: str
    trainables: nn.Module
    identity: dict
    """What a resumed run must agree on (hashes of base, data plan, ...). Differences are shown key by key."""

    def loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the samples of the micro-batch, and its parts for the log. All randomness comes from the
        step."""

    def scales(self, step: int) -> dict[str, float]:
        """Learning rates of children of the trainables as shares of the run's. Children that are not named take 1. At 0
        a child is frozen and costs no gradient until a later step changes it."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out data. Every process calls it, with the averaged weights in place."""

    def export(self, step: int) -> None:
        """Write the file that the nodes load. One process calls it, with the averaged weights in place."""
