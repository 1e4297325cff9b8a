"""Samples for the steps: this process's share of each global batch, decoded ahead by threads."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from ..engine import Step
from .batches import Plan
from .decode import CorruptSample, decode
from .files import locate
from .index import Index, buckets
from .prefetch import Prefetch
from .read_cache import Cache, Part


def split(index: Index, held_out: int, resolution: int) -> tuple[Index, Index]:
    """(for training, held out). The held-out pictures are those with the smallest hashes among the pictures that fill
    the resolution, with every edit of each."""
    fitting = np.flatnonzero(index.buckets(resolution)[:, 0])
    if len(fitting) <= held_out:
        raise ValueError(f"{index.url} has {len(fitting)} pictures of at least {resolution} px, so none is left beside "
                         f"{held_out} held out; add pictures, or lower --data.held-out or --validation.resolution.")
    keys = [hashlib.sha256(key).digest() for key in index.table.column("sha256").to_pylist()]
    chosen = {keys[row] for row in sorted(fitting.tolist(), key=lambda row: keys[row])[:held_out]}
    mask = np.array([key in chosen for key in keys])
    return Index(index.url, index.table.filter(pa.array(~mask))), Index(index.url, index.table.filter(pa.array(mask)))


class Reader:
    """Samples of a set as {"image": [3, H, W] uint8}, and their cached outputs: "mean" and "std" of the latents, and
    for a tower "<id>/features" or "<id>/hidden". The picture itself is read only where some encoder still needs it.

    parts: every encoder of the training as the cache names it, the VAE first. `caches` has those that were found.
    fitted: (index, row) -> what is added as "fitted", if anything.
    """

    def __init__(self, index: Index, parts: Sequence[Part], cache: str, resolutions: tuple[int, ...],
                 fitted: Callable[[Index, int], Tensor] | None = None):
        self.caches: dict[str, Cache] = {}
        self.fitted = fitted
        self.resolution = {bucket: r for r in resolutions for bucket in buckets(r)}
        if cache:
            fs, root = locate(cache.rstrip("/"))
            there = [part for part in parts if fs.exists(f"{root}/{part.folder}")]
            # Where no cache is found, the error of the first encoder says what to do.
            self.caches = {part.name: Cache(cache, index, part, resolutions) for part in there or parts[:1]}
        self.whole = len(self.caches) == len(parts)

    def __call__(self, index: Index, row: int, bucket: tuple[int, int]) -> dict[str, Tensor]:
        found = {} if self.whole else {"image": decode(index, row, bucket)}
        if self.fitted:
            found["fitted"] = self.fitted(index, row)
        for name, cache in self.caches.items():
            read = cache.read(row, self.resolution[bucket])
            found |= read if name == "vae" else {f"{name}/{kind}": value for kind, value in read.items()}
        return found


class Feed:
    """samples(step) -> a list of the results of `read`, one for each of the step's positions, on the CPU.

    phase: step number -> name of the plan's stage. own: the positions of the global batch that this process takes;
    others are decoded on demand. on_corrupt: "skip" replaces an unreadable picture by another one of the bucket.
    read: (index, row, bucket) -> a sample; by default a picture.
    """

    def __init__(self, plan: Plan, phase, own: Sequence[int], on_corrupt: str = "stop", ahead: int = 4,
                 read: Callable[[Index, int, tuple[int, int]], Any] = decode):
        self.plan, self.index, self.phase, self.own = plan, plan.index, phase, list(own)
        self.on_corrupt, self.ahead, self.read = on_corrupt, ahead, read
        self.queue: Prefetch[dict[int, Any]] | None = None
        self.following, self.now, self.held = -1, -1, {}

    def samples(self, step: Step) -> list:
        if step.number != self.now:
            if step.number != self.following:
                self.close()
                self.queue = Prefetch(self._batch, step.number, self.ahead)
            self.held, self.now, self.following = next(self.queue), step.number, step.number + 1
        missing = [p for p in step.positions if p not in self.held]
        self.held.update(self._read(step.number, missing))
        return [self.held[p] for p in step.positions]

    def describe(self, step: Step) -> list[str]:
        _, _, rows = self.plan.at(self.phase(step.number), step.number)
        return [f"row {rows[p]} ('{self.index[rows[p]]['key']}', from {self.index[rows[p]]['origin']})"
                for p in step.positions]

    def _batch(self, number: int) -> dict[int, Any]:
        return self._read(number, self.own)

    def _read(self, number: int, positions: Sequence[int]) -> dict[int, Any]:
        if not positions:
            return {}
        stage = self.phase(number)
        _, bucket, rows = self.plan.at(stage, number)
        return {p: self._sample(stage, number, p, rows[p], bucket) for p in positions}

    def _sample(self, stage: str, number: int, position: int, row: int, bucket: tuple[int, int]) -> Any:
        for attempt in range(8):
            try:
                return self.read(self.index, row, bucket)
            except CorruptSample as error:
                if self.on_corrupt == "stop" or attempt == 7:
                    raise
                print(f"step {number}: {error} Another picture takes its place.", flush=True)
                row = self.plan.spare(stage, number, position, attempt)

    def close(self) -> None:
        if self.queue is not None:
            self.queue.close()
            self.queue, self.following, self.now = None, -1, -1
