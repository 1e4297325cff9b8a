"""Reading the samples of the next step while this one computes."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """fn(step, position) of a micro-batch's positions; those of the next step are begun meanwhile, each by one thread.

    A process asks for the same positions in every step, so what is read ahead is what it will ask for.
    """

    def __init__(self, fn: Callable[[int, int], T], threads: int):
        self.fn, self.pool = fn, ThreadPoolExecutor(threads, thread_name_prefix="ahead")
        self.waiting: dict[tuple[int, int], Future[T]] = {}

    def __call__(self, step: int, positions: Sequence[int]) -> list[T]:
        """What fn raised for one of them is raised here."""
        for number in (step, step + 1):
            for position in positions:
                if (number, position) not in self.waiting:
                    self.waiting[number, position] = self.pool.submit(self.fn, number, position)
        return [self.waiting.pop((step, position)).result() for position in positions]
