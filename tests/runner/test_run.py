"""`run.py` as a shell starts it: what a signal to it does to the program that it passes a command on to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "run.py"
SLEEPER = """
import time
from pathlib import Path

def test_that_takes_its_time():
    here = Path(__file__).parent
    try:
        (here / "begun").touch()
        time.sleep(60)
    finally:
        (here / "ended").touch()
"""


def ignore_ctrl_c() -> None:
    """As a shell does for what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] if os.name != "nt" else [])
def test_a_signal_in_the_background_ends_the_tests_in_their_own_way(tmp_path: Path, number: signal.Signals) -> None:
    """Only run.py gets it; pytest takes its leave all the same, alone as well as with its two workers."""
    (tmp_path / "main.py").touch()  # enough of a ComfyUI to be run in
    (tmp_path / "test_sleeper.py").write_text(SLEEPER)
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path), "COMFYUI_PYTHON": sys.executable}
    workers = [] if number == signal.SIGINT else ["-n", "0"]
    command = [sys.executable, str(RUN), "test", "-q", "-p", "no:cacheprovider", *workers, str(tmp_path / "test_sleeper.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(command, env=environment, preexec_fn=ignore_ctrl_c, **pipes)
    while not (tmp_path / "begun").exists():
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    run.send_signal(number)
    told, _ = run.communicate(timeout=30)
    assert (tmp_path / "ended").exists() and "KeyboardInterrupt" in told, told
    assert run.returncode == 2, "pytest's own code for a run that was interrupted"
