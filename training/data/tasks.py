"""One task of a data command, as any worker does it. An error becomes a sentence in its record."""
from __future__ import annotations

import os
from collections.abc import Callable

DEATHS = 3
"""Deaths of workers over the same task before the run gives up."""


def attempt(work: Callable[[dict], dict], task: dict) -> dict:
    """{"samples", "size", "error": what the user can do about it, or ""} of a task."""
    try:
        return {"size": task["size"], "error": "", **work(task)}
    except (ValueError, OSError, MemoryError) as error:
        return failed(str(error) or f"{task['about']}: {type(error).__name__}")


class Made:
    """The work of a class. It is made with its settings when the first task is there, so that an error becomes the
    task's."""

    def __init__(self, work: Callable, setup: dict):
        self.work, self.setup, self.made = work, setup, None

    def __call__(self, task: dict) -> dict:
        if self.made is None:
            self.made = self.work(**self.setup)
        return self.made(task)


def failed(error: str) -> dict:
    return {"samples": 0, "size": 0, "error": error}


def given_up(task: dict, last: object) -> dict:
    """The record of a task over which DEATHS workers have died. last: how the last one died."""
    return failed(f"{DEATHS} workers died over {task['about']} ({last}); mostly the memory is short: take fewer "
                  f"--workers. The same line goes on from here.")


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
