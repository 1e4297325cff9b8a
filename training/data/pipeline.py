"""The one pipeline of all data commands: tasks over worker processes, of this machine or of a Ray cluster.

Tasks and results are small records; pictures, shards and features go from the workers to the files themselves. A worker
that dies is replaced and its task repeated, which its writes allow: they are whole or not there.
"""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

DEATHS = 3
"""Of workers over the same task before the run gives up."""


class Workers(Protocol):
    def run(self, work: Callable, tasks: list[dict], setup: dict | None = None) -> Iterator[dict]:
        """What `attempt` gives for every task, in the order in which they end.

        work    a function of a module, from a task to {"samples": how many it did}, or a class of such functions that every
                worker makes once, of the keyword arguments `setup`
        tasks   each with "about", its name in an error, and "size", its share of the work
        """


@contextmanager
def workers(count: int = 0, ray: bool = False, address: str = "", gpus: int = 0) -> Iterator[Workers]:
    """`count` processes (0: one for each core) of this machine, or of Ray where it is asked for. gpus: of this machine; where
    there are any, each has one process."""
    if ray or address:
        from .on_ray import Cluster

        made = Cluster(address, count)
    else:
        from .pool import Pool

        made = Pool(gpus or count or cores())
    try:
        yield made
    finally:
        made.close()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stream(made: Workers, work: Callable, tasks: list[dict], title: str, unit: str = " samples", setup: dict | None = None) -> int:
    """Run every task under a progress bar; the number of samples done. unit: of the tasks' "size".
    Raises ValueError with what the first task that failed had to say."""
    done = 0
    with tqdm(total=sum(task["size"] for task in tasks), desc=title, unit=unit, unit_scale=unit == "B", disable=not tasks) as bar:
        for record in made.run(work, tasks, setup):
            if record["error"]:
                raise ValueError(record["error"])
            done += record["samples"]
            bar.set_postfix_str("" if unit == " samples" else f"{done} samples", refresh=False)
            bar.update(record["size"])
    return done


def attempt(work: Callable[[dict], dict], task: dict) -> dict:
    """{"samples", "size", "error": what the user can do about it, or ""} of a task."""
    try:
        return {"size": task["size"], "error": "", **work(task)}
    except (ValueError, OSError, MemoryError) as error:
        return failed(str(error) or f"{task['about']}: {type(error).__name__}")


class Made:
    """Work of a class, made with its settings when the first task is there, so that its mistakes are the task's."""

    def __init__(self, work: Callable, setup: dict):
        self.work, self.setup, self.made = work, setup, None

    def __call__(self, task: dict) -> dict:
        if self.made is None:
            self.made = self.work(**self.setup)
        return self.made(task)


def failed(error: str) -> dict:
    return {"samples": 0, "size": 0, "error": error}


def given_up(task: dict, last: object) -> dict:
    """The record of a task over which DEATHS workers have died. last: how the last one did."""
    return failed(f"{DEATHS} workers died over {task['about']} ({last}); mostly the memory is short: take fewer --workers. "
                  f"The same line goes on from here.")


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl+C does."""
    def stop(*_):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
