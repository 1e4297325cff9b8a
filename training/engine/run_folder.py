"""The run folder: the resolved configuration, a line of figures per step, TensorBoard, pictures, and the console."""
from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...kernels.replace import replacing
from ..config import write_toml
from .pace import Pace

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None


def peak_memory(device: torch.device) -> float:
    """Peak memory so far, GiB: the GPU's allocations, or the process's resident set on a CPU (0 where it is
    unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30 if resource else 0.0


def cut_after(path: Path, step: int) -> int:
    """Remove the lines of steps after `step` from metrics.jsonl, so that a resumed run neither repeats nor contradicts
    itself. A line torn by a kill is removed too. A damaged line is moved to metrics.damaged.jsonl, and a message says
    so. Returns the step of the newest validation that is left, -1 if there is none."""
    if not path.exists():
        return -1
    validated, kept, damaged = -1, [], []
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        values = _values(line)
        if values is None and line.endswith(b"\n"):
            damaged.append(line)
        elif values is not None and values["step"] <= step and line.endswith(b"\n"):
            kept.append(line)
            if any(key.startswith("validation/") for key in values):
                validated = values["step"]
    if damaged:
        aside = path.with_name("metrics.damaged.jsonl")
        with open(aside, "ab") as file:
            file.writelines(damaged)
        print(f"{len(damaged)} lines of {path} cannot be read; they lie in {aside.name} now.", flush=True)
    if len(kept) < len(lines):
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))
    return validated


def _values(line: bytes) -> dict | None:
    """The values of a line of metrics.jsonl; None where it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d}"


class RunFolder:
    """What a run writes beside its checkpoints. Only the first process writes.

    `problem` holds the error of a disk that refuses, and the loop ends all processes alike. One process that raised
    alone would leave the others waiting.
    """

    def __init__(self, config: Any, name: str, start: int, main: bool, device: torch.device, pace: Pace):
        self.run, self.name, self.main, self.device, self.pace = config.run, name, main, device, pace
        self.clock = time.perf_counter()
        self.validated, self.problem = -1, ""
        if not main:
            return
        # the import takes half a second, which the other processes save
        from torch.utils.tensorboard import SummaryWriter

        out = config.run.out
        out.mkdir(parents=True, exist_ok=True)
        write_toml(config, out / "config.toml")
        self.validated = cut_after(out / "metrics.jsonl", start)
        self.lines = open(out / "metrics.jsonl", "a", encoding="utf-8")
        self.board = SummaryWriter(str(out), purge_step=start + 1 if start else None)

    @contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = self.problem or (
                f"{error.filename or self.run.out / 'metrics.jsonl'} could not be written ({error.strerror or error}); make room in "
                f"{self.run.out} and give the same command")

    def restart_clock(self) -> None:
        """Leave the time since the last step (a save, a validation) out of the speed."""
        self.clock = time.perf_counter()

    def saved(self) -> None:
        """Note that a checkpoint was written since the last step."""
        self.pace.other("save", time.perf_counter() - self.clock)
        self.restart_clock()

    def step(self, done: int, parts: Mapping[str, float], norm: float, rates: Mapping[str, float],
             skipped: int) -> None:
        """Write a line about the finished step: always to metrics.jsonl, and every `log_every` steps to the console and
        TensorBoard."""
        now = time.perf_counter()
        took, self.clock = now - self.clock, now
        if not self.main:
            return
        run = self.run
        self.pace.step(done - 1, took)
        values = {**parts, **{f"lr/{name}": rate for name, rate in rates.items()}, "gradient_norm": norm,
                  "samples_per_second": run.batch / took, "memory_gib": round(peak_memory(self.device), 3)}
        if skipped:
            values["skipped"] = skipped
        self.write(done, values)
        if done % run.log_every and done != run.max_steps:
            return
        self.draw(done, values)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in parts.items())
        print(f"{self.name} {done}/{run.max_steps} {100 * done // run.max_steps}%  {shown}  "
              f"{run.batch / self.pace.usual(done - 1):.1f} samples/s  {values['memory_gib']:.1f} GiB  "
              f"{duration(self.pace.left(done))} left", flush=True)

    def validation(self, step: int, figures: Mapping[str, float], pictures: Mapping[str, np.ndarray],
                   seconds: float) -> None:
        """Write figures and pictures [H, W, 3] uint8 of a validation; once for each step."""
        self.restart_clock()
        self.pace.other("validation", seconds)
        if not self.main or self.validated == step:
            return
        self.validated = step
        values = {f"validation/{k}": v for k, v in figures.items()}
        self.write(step, values)
        self.draw(step, values, {f"validation/{name}": picture for name, picture in pictures.items()})
        with self.writing():
            for name, picture in pictures.items():
                folder = self.run.out / "validation"
                folder.mkdir(exist_ok=True)
                Image.fromarray(picture).save(folder / f"{step:08d}_{name}.png")
        shown = "  ".join(f"{k} {v:.4f}" for k, v in figures.items())
        print(f"{self.name} {step} validation  {shown}  ({duration(seconds)})", flush=True)

    def draw(self, step: int, values: Mapping[str, float],
             pictures: Mapping[str, np.ndarray] = MappingProxyType({})) -> None:
        """Write points and pictures to TensorBoard."""
        with self.writing():
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
            for key, picture in pictures.items():
                self.board.add_image(key, picture, step, dataformats="HWC")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        with self.writing():
            self.lines.write(json.dumps({"step": step, "samples": step * self.run.batch, **numbers}) + "\n")
            self.lines.flush()

    def secure(self) -> None:
        """Flush the lines to the disk: a checkpoint must not be newer than them."""
        if self.main:
            with self.writing():
                os.fsync(self.lines.fileno())

    def close(self) -> None:
        if self.main:
            for file in (self.board, self.lines):
                with self.writing():
                    file.close()
