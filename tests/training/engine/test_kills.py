"""Trainings that are killed at any moment and go on: the same curve to the last digit, on one process and across a change."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e '.[training]'")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")

from semantic_diffusion_adapter.training.engine.checkpoints import damage  # noqa: E402

HERE = Path(__file__).parent


def curve(out: Path) -> list[dict]:
    """Every line of metrics.jsonl but for what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "memory_gib")} for line in lines]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("kills")
    subprocess.run([sys.executable, str(HERE / "kills.py"), str(root)], check=True, timeout=300)
    return root


@pytest.mark.parametrize("story, kills", [("alone", 20), ("moved", 10)])
def test_a_training_killed_again_and_again_has_the_curve_of_one_that_never_was(killed, story, kills):
    """`moved` goes on with two processes after half of its kills."""
    report = json.loads((killed / "report.json").read_text())[story]
    print(report)
    assert report["killed"] == kills and report["while_writing"] >= 3
    assert report["torn"] == [], "what has a checkpoint's name is whole, at whatever moment the kill came"
    assert report["steps"] == sorted(report["steps"]), "no checkpoint is lost"
    straight = curve(killed / "straight")
    assert [line["step"] for line in straight if "loss" in line] == list(range(1, 81))
    assert [line["step"] for line in straight if "validation/weight" in line] == [0, 20, 40, 60, 80]
    assert curve(killed / story) == straight


def test_what_happens_to_one_process_ends_both(killed):
    """The second of two processes, which writes nothing, meets a loss that is not finite, or gets SIGTERM; the first one, which
    writes, a full disk."""
    report = json.loads((killed / "report.json").read_text())
    for name, words in report["nan"]:
        assert name == "FloatingPointError" and "step 7 is not finite; samples: number 3 of the batch." in words
    assert report["signal"] == [["False", ""]] * 2 and newest(killed / "signal") == 8
    for name, words in report["disk"]:
        assert name == "OSError" and words.startswith("Step 9 could not be saved") and "make room in" in words
    assert newest(killed / "disk") == 6


def newest(out: Path) -> int:
    return max((int(p.name[5:]) for p in (out / "checkpoints").glob("step_*") if not damage(p)), default=0)


def until(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, f"torchrun ended with {process.poll()}"
        time.sleep(0.01)


def test_torchrun_restarts_what_was_killed_and_a_signal_ends_it_cleanly(killed, tmp_path):
    """Two processes under torchrun: one of them killed, then SIGTERM to torchrun; one process alone goes on from there."""
    program = [str(HERE / "tiny.py"), str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=10",
                                *program], env={**os.environ, "OMP_NUM_THREADS": "1"})
    until(lambda: newest(tmp_path) >= 6, process)
    victim = int((tmp_path / "pid.1").read_text())
    os.kill(victim, signal.SIGKILL)
    at = newest(tmp_path)
    until(lambda: newest(tmp_path) > at + 6, process)
    assert int((tmp_path / "pid.1").read_text()) != victim
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    stopped = newest(tmp_path)
    assert stopped < 80 and curve(tmp_path)[-1]["step"] == stopped, "the step in work was ended, written down and saved"
    subprocess.run([sys.executable, *program], check=True, timeout=120)
    assert curve(tmp_path) == curve(killed / "straight")
