"""What a step needs from the CPU, made by other processes while the GPU computes the steps before it."""
from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .stage import Step

CPU = torch.device("cpu")
MOST = 14  # processes


@dataclass(frozen=True)
class _Steps(Dataset):
    prepare: Callable[[Step], dict[str, Tensor]]
    like: Step

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.prepare(replace(self.like, number=number))


@dataclass(frozen=True)
class _Calls(Dataset):
    work: Callable[[int], dict[str, Tensor]]
    items: Sequence[int]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self.work(self.items[place])


def processes(device: torch.device) -> int:
    """How many processes beside this one prepare batches for the device."""
    return min(MOST, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0


def in_order(work: Callable[[int], dict[str, Tensor]], items: Sequence[int], device: torch.device
             ) -> Iterator[dict[str, Tensor]]:
    """work(item) of each of the items, in their order; ahead of time where the device is a GPU."""
    return iter(DataLoader(_Calls(work, items), batch_size=None, num_workers=processes(device)))


class Ahead:
    """prepare(step) of one step after the other, with its tensors on the step's device.

    prepare: a function of a step on the CPU, picklable where processes are not forked. On a CPU it is called as each step
    comes: there the other processes would take the cores from the training.
    """

    def __init__(self, prepare: Callable[[Step], dict[str, Tensor]], device: torch.device):
        self.prepare = prepare
        self.processes = processes(device)
        self.loaders: dict[range, tuple[int, Iterator]] = {}  # of every micro-batch, with the step that comes next

    def __call__(self, step: Step) -> dict[str, Tensor]:
        own = replace(step, device=CPU)
        if not self.processes or len(step.positions) == 1:
            return {name: value.to(step.device) for name, value in self.prepare(own).items()}
        expected, loader = self.loaders.get(step.positions, (None, None))
        if expected != step.number:
            loader = iter(DataLoader(_Steps(self.prepare, own), batch_size=None, sampler=itertools.count(step.number),
                                     num_workers=self.processes, prefetch_factor=4, pin_memory=True))
        made = next(loader)
        self.loaders[step.positions] = (step.number + 1, loader)
        return {name: value.to(step.device, non_blocking=True) for name, value in made.items()}
