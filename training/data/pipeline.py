"""The pipeline of all data commands: tasks over worker processes, of this machine or of a Ray cluster.

Tasks and results are small records. Pictures, shards and features go from the workers to the files themselves. A worker
that dies is replaced and its task repeated. That is safe, because its files are whole or absent.
"""
from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

from .on_ray import Cluster
from .pool import Pool
from .tasks import cores


class Workers(Protocol):
    def run(self, work: Callable, tasks: list[dict], setup: dict | None = None) -> Iterator[dict]:
        """The results of `attempt` for every task, in the order in which the tasks end.

        work    a function of a module, from a task to {"samples": how many it did}, or a class of such functions that
                every worker makes once, of the keyword arguments `setup`
        tasks   each with "about", its name in an error, and "size", its share of the work
        """


@contextmanager
def workers(count: int = 0, ray: bool = False, address: str = "", gpus: int = 0) -> Iterator[Workers]:
    """`count` processes (0: one for each core) of this machine, or of Ray where `ray` says so. gpus: of this machine;
    where there are any, each has one process."""
    made = Cluster(address, count) if ray or address else Pool(gpus or count or cores())
    try:
        yield made
    finally:
        made.close()


def stream(made: Workers, work: Callable, tasks: list[dict], title: str, unit: str = " samples",
           setup: dict | None = None) -> int:
    """Run every task under a progress bar. Returns the number of samples done. unit: of the tasks' "size". Raises
    ValueError with the message of the first task that failed."""
    done = 0
    total = sum(task["size"] for task in tasks)
    with tqdm(total=total, desc=title, unit=unit, unit_scale=unit == "B", disable=not tasks) as bar:
        for record in made.run(work, tasks, setup):
            if record["error"]:
                raise ValueError(record["error"])
            done += record["samples"]
            bar.set_postfix_str("" if unit == " samples" else f"{done} samples", refresh=False)
            bar.update(record["size"])
    return done


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
