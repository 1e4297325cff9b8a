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


def _processes(wanted: int, device: torch.device) -> int:
    """On a CPU none: they would take the cores from the training."""
    return min(wanted, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0


def in_order(work: Callable[[int], dict[str, Tensor]], items: Sequence[int], device: torch.device
             ) -> Iterator[dict[str, Tensor]]:
    """work(item) of each of the items, in their order; ahead of time where the device is a GPU."""
    return iter(DataLoader(_Calls(work, items), batch_size=None, num_workers=_processes(MOST, device)))


class Ahead:
    """prepare(step) of one step after the other, with its tensors on the step's device.

    prepare: a function of a step on the CPU, picklable where processes are not forked. `workers` processes call it for a
    GPU. Where a CPU trains it is called as each step comes.
    """

    def __init__(self, prepare: Callable[[Step], dict[str, Tensor]], device: torch.device, workers: int):
        self.prepare, self.processes = prepare, _processes(workers, device)
        self.loaders: dict[range, tuple[int, Iterator]] = {}  # of every micro-batch, with the step that comes next

    def __call__(self, step: Step) -> dict[str, Tensor]:
        own = replace(step, device=CPU)
        if not self.processes or len(step.positions) == 1:
            return {name: value.to(step.device) for name, value in self.prepare(own).items()}
        expected, loader = self.loaders.get(step.positions, (None, None))
        if expected != step.number:
            loader = iter(DataLoader(_Steps(self.prepare, own), batch_size=None, sampler=itertools.count(step.number),
                                     num_workers=self.processes, prefetch_factor=4, pin_memory=torch.cuda.is_available()))
        made = next(loader)
        self.loaders[step.positions] = (step.number + 1, loader)
        return {name: value.to(step.device, non_blocking=True) for name, value in made.items()}
