"""A started process ends with the one that started it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from semantic_diffusion_adapter.runner.server import Server

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
STARTER = """
import sys, time
from pathlib import Path
from semantic_diffusion_adapter.runner.server import Server
print(Server([sys.executable, "-c", "import time; time.sleep(600)"], Path(sys.argv[1]), 1).process.pid, flush=True)
time.sleep(600)
"""


def gone(pid: int, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_starter_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid = int(starter.stdout.readline())
    assert psutil.pid_exists(pid)
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert gone(pid)


def test_stopping_ends_both(tmp_path: Path) -> None:
    server = Server(SLEEPER, tmp_path, 1)
    assert server.process.poll() is None and server.watch.poll() is None
    server.stop()
    assert server.process.poll() is not None and server.watch.poll() == 0
