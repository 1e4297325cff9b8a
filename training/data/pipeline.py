"""The one pipeline of all data commands: tasks through Ray Data, on this machine with nothing to start or on a cluster.

Tasks and results are small records; pictures, shards and features go from the workers to the files themselves. A worker
that dies is replaced and its task repeated, which its writes allow: they are whole or not there.
"""
from __future__ import annotations

import functools
import logging
import os
import posixpath
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import fsspec
from tqdm import tqdm

STORE = 128 * 2 ** 20
"""Bytes of Ray's object store on this machine; only records pass through it."""

BLOCKS = 10_000
"""Most tasks of Ray's own; each of them does several of ours where there are more."""

DEATHS = 3
"""Of workers over the same task before the run gives up."""


@contextmanager
def cluster(address: str = "", workers: int = 0) -> Iterator[None]:
    """Ray, started here on `workers` cores (0: all), the running cluster at `address`, or the one to which this
    process is already connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = dict(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    if address:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as error:
            raise ValueError(f"No Ray cluster answers at {address} ({error}); start it with `ray start --head`, or leave "
                             f"--ray-address out to run on this machine alone.") from None
    else:
        ray.init(address="local", num_cpus=workers or None, include_dashboard=False, object_store_memory=STORE, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def stream(work: Callable, tasks: list[dict], title: str, total: int, notes: str, gpus: float = 0,
           setup: dict | None = None) -> int:
    """Run every task; the number of samples done. Call it inside of `cluster`.

    work    a function, decorated with `told`, from a task to {"samples": how many it did}, or a class of such functions that
            every worker makes once, with the keyword arguments `setup`
    tasks   each with "about", its name in an error
    total   samples for the progress bar, 0 where they are not known
    notes   URL of a folder for notes on tasks that are under way
    gpus    of each worker
    Raises ValueError with what the first task that failed had to say.
    """
    if not tasks:
        return 0
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    for name in ("ray.data", "ray.data._internal.execution"):
        logging.getLogger(name).setLevel(logging.ERROR)
    fs, path = fsspec.url_to_fs(notes)
    if fs.exists(path):
        fs.rm(path, recursive=True)
    options = {"num_gpus": gpus} if gpus else {"num_cpus": 1}
    if setup is not None:
        most = ray.cluster_resources().get("GPU", 0) / gpus if gpus else ray.cluster_resources()["CPU"]
        size = max(1, min(int(most), len(tasks)))
        options |= {"compute": ray.data.ActorPoolStrategy(size=size), "fn_constructor_kwargs": setup}
    noted = [task | {"note": f"{notes}/{number}"} for number, task in enumerate(tasks)]
    done = 0
    with tqdm(total=total or None, desc=title, unit=" samples") as bar:
        for record in ray.data.from_items(noted, override_num_blocks=min(len(tasks), BLOCKS)).map(work, **options).iter_rows():
            if record["error"]:
                raise ValueError(record["error"])
            done += record["samples"]
            bar.update(record["samples"])
    return done


def told(work: Callable) -> Callable:
    """A task whose mistakes of the user's travel as a sentence, where Ray's own way gives pages of traceback without it, and
    that gives up after some deaths of its worker, where Ray Data tries for ever."""
    @functools.wraps(work)
    def done(*arguments: object) -> dict:
        task = arguments[-1]
        fs, path = fsspec.url_to_fs(task["note"])
        deaths = int(fs.cat_file(path)) if fs.exists(path) else 0
        if deaths == DEATHS:
            return {"samples": 0, "error": f"{deaths} workers died over {task['about']}; mostly the memory is short: take fewer "
                                           f"--workers. The same line goes on from here."}
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.pipe_file(path, str(deaths + 1).encode())
        try:
            return work(*arguments) | {"error": ""}
        except (ValueError, OSError) as error:
            return {"samples": 0, "error": str(error)}
        finally:
            fs.rm(path)
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
