"""Decoding ahead of the step that needs it."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """fn(start), fn(start + 1), ... in order, each computed by a thread before it is asked for.

    fn       a function of the step alone; an exception of step s is raised where step s is asked for
    ahead    steps that are under way or waiting at any time, each by one thread
    """

    def __init__(self, fn: Callable[[int], T], start: int = 0, ahead: int = 4):
        self.fn, self.following = fn, start
        self.pool = ThreadPoolExecutor(ahead, thread_name_prefix="prefetch")
        self.waiting: deque[Future[T]] = deque()
        for _ in range(ahead):
            self._order()

    def _order(self) -> None:
        self.waiting.append(self.pool.submit(self.fn, self.following))
        self.following += 1

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self.waiting:
            raise StopIteration
        first = self.waiting.popleft()
        self._order()
        return first.result()

    def close(self) -> None:
        """Wait for the steps in work and drop them."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.waiting.clear()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
