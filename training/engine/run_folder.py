"""The run folder: the resolved configuration, a line of figures for every step, TensorBoard, pictures, and the console line."""
from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..config import write_toml

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, GiB: the GPU's allocations, or the process's resident set on a CPU (0 where it is not told)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30 if resource else 0.0


def cut_after(path: Path, step: int) -> int:
    """Cut metrics.jsonl after its last line of a step up to `step`, so that a resumed run neither repeats nor contradicts
    itself; a line torn by a kill goes too. Returns the step of the newest validation that is left, -1 if there is none."""
    if not path.exists():
        return -1
    validated, end = -1, 0
    with open(path, "rb+") as file:
        for line in file:
            try:
                values = json.loads(line)
            except ValueError:
                break
            if values["step"] > step or not line.endswith(b"\n"):
                break
            end += len(line)
            if any(key.startswith("validation/") for key in values):
                validated = values["step"]
        file.truncate(end)
    return validated


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d}"


class RunFolder:
    """What a run writes beside its checkpoints; nothing at all in every process but the first."""

    def __init__(self, config: Any, name: str, start: int, main: bool, device: torch.device):
        self.run, self.name, self.main, self.device = config.run, name, main, device
        self.seconds: deque[float] = deque(maxlen=64)  # of the latest steps
        self.clock = time.perf_counter()
        self.validated = -1
        if not main:
            return
        from torch.utils.tensorboard import SummaryWriter  # half a second that the other processes need not spend

        out = config.run.out
        out.mkdir(parents=True, exist_ok=True)
        write_toml(config, out / "config.toml")
        self.validated = cut_after(out / "metrics.jsonl", start)
        self.lines = open(out / "metrics.jsonl", "a", encoding="utf-8")
        self.board = SummaryWriter(str(out), purge_step=start + 1 if start else None)

    def restart_clock(self) -> None:
        """Leave what happened since the last step (a save, a validation) out of the speed."""
        self.clock = time.perf_counter()

    def step(self, done: int, parts: Mapping[str, float], norm: float, rates: Mapping[str, float], skipped: int) -> None:
        """A line about the step that ended: metrics.jsonl always, the console and TensorBoard at every `log_every`-th."""
        now = time.perf_counter()
        took, self.clock = now - self.clock, now
        self.seconds.append(took)
        if not self.main:
            return
        run = self.run
        values = {**parts, **{f"lr/{name}": rate for name, rate in rates.items()}, "gradient_norm": norm,
                  "samples_per_second": run.batch / took, "memory_gib": round(peak_memory(self.device), 3)}
        if skipped:
            values["skipped"] = skipped
        self.write(done, values)
        if done % run.log_every and done != run.max_steps:
            return
        for key, value in values.items():
            self.board.add_scalar(key, value, done)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in parts.items())
        usual = statistics.median(self.seconds)  # the first one compiles
        left = duration((run.max_steps - done) * usual)
        print(f"{self.name} {done}/{run.max_steps} {100 * done // run.max_steps}%  {shown}  "
              f"{run.batch / usual:.1f} samples/s  {values['memory_gib']:.1f} GiB  {left} left", flush=True)

    def validation(self, step: int, figures: Mapping[str, float], pictures: Mapping[str, np.ndarray], seconds: float) -> None:
        """Figures and pictures [H, W, 3] uint8 of a validation; once for each step."""
        if not self.main or self.validated == step:
            return
        self.validated = step
        values = {f"validation/{k}": v for k, v in figures.items()}
        self.write(step, values)
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        for name, picture in pictures.items():
            folder = self.run.out / "validation"
            folder.mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / f"{step:08d}_{name}.png")
            self.board.add_image(f"validation/{name}", picture, step, dataformats="HWC")
        shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
        print(f"{self.name} {step} validation  {shown}  ({duration(seconds)})", flush=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON knows no NaN
        self.lines.write(json.dumps({"step": step, "samples": step * self.run.batch, **numbers}) + "\n")
        self.lines.flush()

    def secure(self) -> None:
        """Have the disk hold the lines so far: a checkpoint must not be newer than them."""
        if self.main:
            os.fsync(self.lines.fileno())

    def close(self) -> None:
        if self.main:
            self.board.close()
            self.lines.close()
