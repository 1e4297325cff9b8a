"""Not a test: runs functions in forked processes that torchrun's environment describes. A fork costs no imports, so one
program can start hundreds; it works as long as the parent itself has never run a backward."""
from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def start(size: int, function: Callable[[], object]) -> list[int]:
    """Fork `size` processes that run the function as the ranks of one world; returns their ids."""
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                code = 0 if function() is not False else 130
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return children


def wait(children: list[int]) -> list[int]:
    """Exit codes; minus the signal of what was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(size: int, function: Callable[[], object]) -> None:
    codes = wait(start(size, function))
    assert codes == [0] * size, f"exit codes {codes}"


def kill_after(children: list[int], seconds: float) -> list[int]:
    """SIGKILL all of them after a while, unless they end before; their exit codes."""
    end = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(children) and time.monotonic() < end:
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    for child in children:
        if child not in codes:
            os.kill(child, signal.SIGKILL)
            codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [codes[child] for child in children]
