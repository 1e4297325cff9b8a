"""Trainings that are killed at any moment and go on: the same curve to the last digit, on one process and across a change."""
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e '.[training]'")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")

from semantic_diffusion_adapter.training.engine.sealed import damage  # noqa: E402
from semantic_diffusion_adapter.training.engine.world import unsure_restarts  # noqa: E402

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
    assert [line["step"] for line in straight if "validation/weight" in line] == [0, 21, 42, 63, 80]
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


def test_torchrun_restarts_what_is_killed_again_and_again(killed, tmp_path):
    """A process killed while it writes; SIGTERM to torchrun; then one of two killed between checkpoints. Each life costs its
    imports, so the many random moments are those of the forked stories above."""
    chance, written = random.Random(0), tmp_path / "checkpoints"
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def begin(size: int) -> tuple[subprocess.Popen, list[Path]]:
        own = [tmp_path / f"pid.{rank}" for rank in range(size)]
        for pid in own:
            pid.unlink(missing_ok=True)
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}",
                                 "--max-restarts=2", str(HERE / "tiny.py"), str(tmp_path)], env=settings), own

    for size in (1, 2):
        process, pids = begin(size)
        until(lambda: all(pid.exists() and pid.read_text() for pid in pids), process)  # noqa: B023  (asked at once)
        at = newest(tmp_path)
        until(lambda: newest(tmp_path) > at or size == 1 and any(written.glob(".writing_*")), process)  # noqa: B023
        time.sleep(chance.random() * 0.03)
        os.kill(int(chance.choice(pids).read_text()), signal.SIGKILL)
        if size == 1:
            at = newest(tmp_path)
            until(lambda: newest(tmp_path) > at, process)  # noqa: B023
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            stopped = newest(tmp_path)
            assert stopped < 80 and curve(tmp_path)[-1]["step"] == stopped, "the step in work was ended, written down and saved"
    assert process.wait(120) == 0
    assert curve(tmp_path) == curve(killed / "straight")


def test_restarts_that_share_a_store_are_known(monkeypatch):
    for shared, restarts, unsure in (("True", "3", True), ("True", "0", False), ("False", "3", False)):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        assert unsure_restarts() == unsure
