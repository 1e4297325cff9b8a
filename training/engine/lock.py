"""One run at a time in a run folder: two that write the same checkpoints would lose both."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .world import World


@contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """Hold a run folder for the processes of one run. The system lets go of it whatever way the first process ends.

    Raises ValueError in every process where another run holds it.
    """
    lock, problem = FileLock(folder / "run.lock"), None
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            problem = f"Another run is writing to {folder}; wait for its end, stop it, or give another --run.out."
        except NotImplementedError:  # some clusters mount their disks without locks
            print(f"{folder} lies on a disk without locks: take care that no second run writes there.", flush=True)
    problem = world.said_by_main(problem)
    if problem:
        raise ValueError(problem)
    try:
        yield
    finally:
        lock.release()
