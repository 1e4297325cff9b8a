"""One run at a time in a run folder: two that write the same checkpoints would lose both."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .world import World


def check_folder(folder: Path) -> None:
    """Refuse a path that cannot be a run folder, before anything is loaded. ValueError."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; give a folder with --out.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"nobody may write to {there} here; give another folder with --out.")


@contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """Hold a run folder for the processes of one run. The system releases it however the first process ends.

    Raises ValueError in every process where another run holds it.
    """
    lock, problem = FileLock(folder / "run.lock"), None
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            problem = f"Another run is writing to {folder}; wait for its end, stop it, or give another --out."
        except NotImplementedError:  # some clusters mount their disks without support for locks
            print(f"{folder} lies on a disk without locks: take care that no second run writes there.", flush=True)
    problem = world.broadcast(problem)
    if problem:
        raise ValueError(problem)
    try:
        yield
    finally:
        lock.release()
