"""Not a test: kills a training again and again, at random moments and while it writes checkpoints; and lets one process of
two meet a loss that is not finite, a full disk, a signal.

usage: kills.py FOLDER. Leaves the run folders and a report for test_kills.py.
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import tiny
from processes import run, start, wait
from semantic_diffusion_adapter.training.engine.sealed import damage

KILLS = 20


def quiet(config, at: dict | None = None) -> bool:
    sys.stdout = open(os.devnull, "w")
    return tiny.main(config, at=at)


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
    step = newest(out) + (3 if half else chance.randrange(1, 8))

    def reached() -> bool:
        if half:  # on a busy machine the moment may pass unseen
            return bool(halves(out) - before) or newest(out) >= step
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


def one_of_two(root: Path, name: str, position: int, event) -> list[list]:
    """How both processes end where something happens in step 7 to the one that has a sample: [what was raised or returned, its
    words]."""
    def life() -> None:
        try:
            ended = [str(quiet(tiny.settings(root / name), {(7, position): event})), ""]
        except Exception as error:
            ended = [type(error).__name__, str(error)]
        (root / f"{name}.{os.environ['RANK']}").write_text(json.dumps(ended))

    run(2, life)
    return [json.loads((root / f"{name}.{rank}").read_text()) for rank in (0, 1)]


def full_disk() -> float:
    """No file of this process may grow beyond a few bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
    return 1.0


def terminated() -> float:
    os.kill(os.getpid(), signal.SIGTERM)
    return 1.0


if __name__ == "__main__":
    tiny.torch.set_num_threads(1)
    root = Path(sys.argv[1])
    run(1, lambda: quiet(tiny.settings(root / "straight")))
    reports = {"alone": story(root, "alone", [1] * KILLS), "moved": story(root, "moved", [1] * 5 + [2] * 5)}
    reports["nan"] = one_of_two(root, "nan", 3, lambda: float("nan"))
    reports["signal"] = one_of_two(root, "signal", 3, terminated)
    reports["disk"] = one_of_two(root, "disk", 0, full_disk)
    (root / "report.json").write_text(json.dumps(reports))
