"""Workers of a Ray cluster, for the work of several machines."""
from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator

from .tasks import DEATHS, Made, attempt, given_up

STORE = 128 * 2 ** 20
"""Bytes of Ray's object store where it is started here. Only records pass through it."""
AHEAD = 2
"""Tasks per core that are handed out: one in work, and the next."""


class Cluster:
    """The running cluster at `address`, or Ray started here on `count` cores (0: all). A cluster to which this process
    is already connected is used and left running. Raises ValueError where Ray is not installed or does not start."""

    def __init__(self, address: str, count: int):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise ValueError("Ray is not installed: pip install ray; or leave --ray and --ray-address out, for this "
                             "machine alone needs none.") from None
        self.ray, self.ours = ray, not ray.is_initialized()
        quiet = dict(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
        here = dict(address="local", num_cpus=count or None, include_dashboard=False, object_store_memory=STORE)
        try:
            if self.ours and address not in ("", "auto"):  # Ray itself would wait for minutes here.
                host, _, port = address.removeprefix("ray://").rpartition(":")
                if not port.isdigit():
                    raise ValueError("an address is `auto`, host:port or ray://host:port")
                socket.create_connection((host, int(port)), timeout=10).close()
            if self.ours:
                ray.init(**(dict(address=address) if address else here), **quiet)
        except Exception as error:  # Ray raises errors of many kinds: of connections, files, processes.
            what = f"No Ray cluster answers at {address}" if address else "Ray did not start"
            said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ValueError(f"{what} ({said}); start one with `ray start --head`, or leave --ray and "
                             f"--ray-address out to run on this machine alone.") from None
        found = ray.cluster_resources()
        self.gpus = int(found.get("GPU", 0))
        self.cores = max(1, int(found.get("CPU", 1)))

    def run(self, work: Callable, tasks: list[dict], setup: dict | None = None) -> Iterator[dict]:
        ray = self.ray
        needs = {"num_gpus": 1} if setup is not None and self.gpus else {"num_cpus": 1}
        if setup is None:
            submit = ray.remote(**needs, max_retries=DEATHS - 1)(attempt).remote
            free = [lambda task: submit(work, task)] * (AHEAD * self.cores)
        else:
            kind = ray.remote(**needs, max_restarts=-1, max_task_retries=DEATHS - 1)(Actor)
            free = [kind.remote(work, setup).attempt.remote for _ in range(min(self.gpus or self.cores, len(tasks)))]
        waiting, under_way = deque(tasks), {}
        while waiting or under_way:
            while waiting and free:
                task, give = waiting.popleft(), free.pop()
                under_way[give(task)] = task, give
            for done in ray.wait(list(under_way))[0]:
                task, give = under_way.pop(done)
                free.append(give)
                try:
                    yield ray.get(done)
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.RayActorError, ray.exceptions.NodeDiedError,
                        ray.exceptions.OutOfMemoryError) as error:
                    yield given_up(task, type(error).__name__)

    def close(self) -> None:
        if self.ours:
            self.ray.shutdown()


class Actor:
    """A worker that keeps the object it made."""

    def __init__(self, work: Callable, setup: dict):
        self.made = Made(work, setup)

    def attempt(self, task: dict) -> dict:
        return attempt(self.made, task)
