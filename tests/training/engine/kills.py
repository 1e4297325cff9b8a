"""Not a test: kills a training again and again, at random moments and while it writes checkpoints.

usage: kills.py FOLDER. Leaves the run folders and a report for test_kills.py.
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import tiny
from processes import run, start, wait
from semantic_diffusion_adapter.training.engine.checkpoints import damage

KILLS = 20


def quiet(config) -> bool:
    sys.stdout = open(os.devnull, "w")
    return tiny.main(config)


def newest(out: Path) -> int:
    return max((int(p.name[5:]) for p in (out / "checkpoints").glob("step_*")), default=0)


def halves(out: Path) -> set[tuple]:
    """The folders that are being written, or were when their process was killed."""
    found = set()
    for path in (out / "checkpoints").glob(".writing_*"):
        with contextlib.suppress(FileNotFoundError):  # complete in the meantime
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def kill(children: list[int], out: Path, chance: random.Random) -> tuple[bool, bool]:
    """Kill all processes of a world: some steps after the last checkpoint, or while the next one is being written.
    Returns (whether they were still running, whether a checkpoint was left half written)."""
    before, lines, end = halves(out), out / "metrics.jsonl", time.monotonic() + 10
    half = chance.random() < 0.5
    step = newest(out) + (3 * chance.randrange(1, 4) if half else chance.randrange(1, 8))

    def reached() -> bool:
        if half:
            return any(name == f".writing_{step:08d}" for name, _ in halves(out) - before)
        return lines.exists() and f'{{"step": {step},' in lines.read_text()

    while not reached() and time.monotonic() < end:
        time.sleep(0.0005)
    time.sleep(chance.random() * 0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)  # one that has ended waits for its parent, so its number is still its own
    return all(code == -signal.SIGKILL for code in wait(children)), not halves(out) <= before


def story(root: Path, name: str, sizes: list[int]) -> dict:
    """A run that is killed once in each world of `sizes`, then left to end in a world of the last size."""
    out, chance = root / name, random.Random(name)
    config = tiny.settings(out)
    report: dict = {"killed": 0, "while_writing": 0, "steps": [], "torn": []}
    for size in sizes:
        killed, half = kill(start(size, lambda: quiet(config)), out, chance)
        report["killed"] += killed
        report["while_writing"] += half
        report["torn"] += [str(p) for p in (out / "checkpoints").glob("step_*") if damage(p)]
        report["steps"].append(newest(out))
    run(sizes[-1], lambda: quiet(config))
    return report


if __name__ == "__main__":
    tiny.torch.set_num_threads(1)
    root = Path(sys.argv[1])
    run(1, lambda: quiet(tiny.settings(root / "straight")))
    reports = {"alone": story(root, "alone", [1] * KILLS), "moved": story(root, "moved", [1] * 5 + [2] * 5)}
    (root / "report.json").write_text(json.dumps(reports))
