"""Worker processes of this machine. They are spawned, not forked, so that they inherit no thread or lock."""
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait

from .tasks import DEATHS, Made, attempt, cores, given_up

CONTEXT = multiprocessing.get_context("spawn")


class Pool:
    """At most `size` processes. Each is started for the first task that finds no other one free, and stays for the next
    `run`.

    Python's own executor stops all workers when one dies. Here that one is replaced, and its task is known.
    """

    def __init__(self, size: int):
        self.size = size
        self.free: list[Worker] = []
        self.busy: dict[Connection, Worker] = {}

    def run(self, work: Callable, tasks: list[dict], setup: dict | None = None) -> Iterator[dict]:
        waiting, deaths = deque(range(len(tasks))), Counter()
        while waiting or self.busy:
            while waiting and len(self.busy) < self.size:
                worker = self.free.pop() if self.free else self._another()
                worker.give(waiting.popleft(), work, tasks, setup)
                self.busy[worker.pipe] = worker
            for pipe in wait(list(self.busy)):
                worker = self.busy.pop(pipe)
                try:
                    record = pipe.recv()
                except (EOFError, OSError):
                    ended = worker.end(patience=1.0)
                    deaths[worker.task] += 1
                    if deaths[worker.task] == DEATHS:
                        yield given_up(tasks[worker.task], f"exit code {ended}")
                    else:
                        waiting.appendleft(worker.task)
                    continue
                self.free.append(worker)
                if isinstance(record, str):
                    raise RuntimeError(f"A worker failed over {tasks[worker.task]['about']}:\n{record}")
                yield record

    def _another(self) -> Worker:
        taken = {worker.slot for worker in self.busy.values()}
        return Worker(next(slot for slot in range(self.size) if slot not in taken), max(1, cores() // self.size))

    def close(self) -> None:
        """Stop at once. Tasks in work are thrown away and may be repeated."""
        everyone = [*self.free, *self.busy.values()]
        for worker in everyone:
            worker.process.kill()
        for worker in everyone:
            worker.end()
        self.free, self.busy = [], {}


class Worker:
    def __init__(self, slot: int, threads: int):
        self.slot, self.task = slot, -1
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs, slot, threads), daemon=True)
        with interrupts_held():
            self.process.start()
        theirs.close()  # the death of the worker then closes the pipe

    def give(self, number: int, work: Callable, tasks: list[dict], setup: dict | None) -> None:
        self.task = number
        try:
            self.pipe.send((work, setup, tasks[number]))
        except OSError:
            pass  # It died while it was free; the wait for it will report that.

    def end(self, patience: float = 0.0) -> int | None:
        """Its exit code; below zero, the signal that killed it. patience: seconds to wait for it to end by itself."""
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl+C back, which goes to every process of a terminal. Processes started meanwhile never see it; this
    process does afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start unblocks SIGINT, so it comes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(pipe: Connection, slot: int, threads: int) -> None:
    """The loop of a worker: tasks from the pipe until it closes or the parent dies. slot: its number, which chooses a
    GPU."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # this must come before the work imports its libraries
    made: Made | None = None
    while True:
        try:
            work, setup, task = pipe.recv()
            if setup is not None:
                setup = setup | {"slot": slot}
                if made is None or (made.work, made.setup) != (work, setup):
                    made = Made(work, setup)
            record: dict | str = attempt(work if setup is None else made, task)
        except EOFError:
            return
        except Exception:
            record = traceback.format_exc()
        pipe.send(record)


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
