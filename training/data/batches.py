"""The plan: which samples make the batch of a step, as a pure function of (seed, stage, step)."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .index import Index

PERIOD = 100


@dataclass(frozen=True)
class Epoch:
    """One pass over a resolution. `order` [batches, 2] has the bucket of each batch and its place among that bucket's
    batches. `rows` has the permuted rows of each bucket."""

    order: np.ndarray
    rows: tuple[np.ndarray, ...]


class Plan:
    """Batches of one bucket each. An epoch of a resolution is an exact permutation of the samples that fill it, bucket
    by bucket. The remainder of a bucket (less than a batch) is left out until the next epoch, whose remainder differs.

    index         the prepared set
    batch         size of the global batch, of all ranks together
    resolutions   in pixels; of each stage alike, or {stage: {resolution: weight}} with a share of the steps for each
                  ("" stands for the stages that are not named)
    Raises ValueError where a resolution has no bucket that fills a batch.
    """

    def __init__(self, index: Index, batch: int, seed: int,
                 resolutions: Sequence[int] | Mapping[str, Mapping[int, float]]):
        if batch < 1:
            raise ValueError(f"A batch of {batch} samples is none; choose at least 1.")
        if not isinstance(resolutions, Mapping):
            resolutions = {"": dict.fromkeys(resolutions, 1.0)}
        self.index, self.batch, self.seed = index, batch, seed
        self.weights = {stage: {int(r): float(w) for r, w in sorted(shares.items()) if w > 0}
                        for stage, shares in resolutions.items()}
        for stage, shares in self.weights.items():
            if not shares:
                raise ValueError(f"Stage '{stage}' is given no resolution; name at least one with a weight above 0.")
        self.groups = {r: _groups(index, r) for r in sorted({r for shares in self.weights.values() for r in shares})}
        for resolution, groups in self.groups.items():
            if not any(len(rows) >= batch for rows in groups.values()):
                most = max(map(len, groups.values()), default=0)
                raise ValueError(
                    f"No bucket at {resolution} px fills a batch of {batch}: the fullest has {most} samples; "
                    + (f"choose a batch of at most {most}, or add pictures." if most else
                       f"leave {resolution} out, or add pictures whose shorter side has {resolution} px."))
        self._epoch = lru_cache(maxsize=2 * len(self.groups))(self._draw_epoch)
        self._turns = lru_cache(maxsize=4)(self._draw_turns)

    @property
    def hash(self) -> str:
        """Hash of everything that decides the batches."""
        record = [1, self.index.hash, self.batch, self.seed, sorted(self.weights.items())]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def at(self, stage: str, step: int) -> tuple[int, tuple[int, int], list[int]]:
        """(resolution, bucket (height, width) in pixels, rows of the global batch) of a step, counted from 0. A rank
        takes the rows of its positions in the batch."""
        resolution, bucket, place, epoch = self._place(stage, step)
        rows = epoch.rows[bucket][place * self.batch:(place + 1) * self.batch]
        return resolution, tuple(self.groups[resolution])[bucket], rows.tolist()

    def resolution(self, stage: str, step: int) -> int:
        """Resolution of a step in pixels. The cost does not grow with the step."""
        cycle, turn = divmod(step, PERIOD)
        return int(self._turns(stage, cycle)[turn])

    def spare(self, stage: str, step: int, position: int, attempt: int = 0) -> int:
        """A row of the same bucket that replaces an unreadable one at this position of the batch. Each attempt gives
        another one. It is no row of the batch itself where the bucket has others."""
        resolution, bucket, place, epoch = self._place(stage, step)
        rows = epoch.rows[bucket]
        others = np.delete(rows, np.s_[place * self.batch:(place + 1) * self.batch])
        others = others if len(others) else rows
        return int(others[(_stream(self.seed, stage, "spare", step, position).random_raw() + attempt) % len(others)])

    def _place(self, stage: str, step: int) -> tuple[int, int, int, Epoch]:
        shares = self.weights.get(stage, self.weights.get(""))
        if shares is None:
            raise ValueError(f"The plan has no stage '{stage}', only {', '.join(self.weights)}; give its resolutions.")
        if step < 0:
            raise ValueError(f"There is no step {step}; steps count from 0.")
        cycle, turn = divmod(step, PERIOD)
        turns = self._turns(stage, cycle)
        resolution = int(turns[turn])
        # Every cycle gives a resolution the same number of turns, so its earlier turns need no count from step 0.
        number = cycle * int((turns == resolution).sum()) + int((turns[:turn] == resolution).sum())
        epoch, at = divmod(number, self.batches(resolution))
        drawn = self._epoch(stage, resolution, epoch)
        return resolution, *map(int, drawn.order[at]), drawn

    def batches(self, resolution: int) -> int:
        """Number of full batches of one epoch."""
        return sum(len(rows) // self.batch for rows in self.groups[resolution].values())

    def _draw_turns(self, stage: str, cycle: int) -> np.ndarray:
        """[PERIOD] resolution of each step of a cycle. Shares are rounded to whole turns by largest remainder, at least
        one."""
        shares = self.weights.get(stage, self.weights.get(""))
        names, weights = np.array(list(shares)), np.array(list(shares.values()))
        exact = weights / weights.sum() * PERIOD
        count = np.maximum(1, np.floor(exact).astype(int))
        while (missing := PERIOD - count.sum()):
            count[np.argmax((exact - count) * np.sign(missing))] += np.sign(missing)
        turns = np.repeat(names, count)
        return turns[_permutation(PERIOD, self.seed, stage, "turns", cycle)]

    def _draw_epoch(self, stage: str, resolution: int, epoch: int) -> Epoch:
        rows, order = [], []
        for number, (bucket, members) in enumerate(self.groups[resolution].items()):
            rows.append(members[_permutation(len(members), self.seed, stage, resolution, epoch, *bucket)])
            full = len(members) // self.batch
            order.append(np.stack([np.full(full, number), np.arange(full)], 1))
        order = np.concatenate(order)
        return Epoch(order[_permutation(len(order), self.seed, stage, resolution, epoch, "order")], tuple(rows))

    def report(self) -> str:
        """How full the buckets are, with a note for those that waste samples."""
        lines = [f"{len(self.index)} samples, batches of {self.batch}"]
        for resolution, groups in self.groups.items():
            fitting = sum(map(len, groups.values()))
            lines.append(f"{resolution} px: {fitting} samples fill it, {len(self.index) - fitting} are smaller, "
                         f"{self.batches(resolution)} batches an epoch")
            for (h, w), rows in groups.items():
                full, rest = divmod(len(rows), self.batch)
                lines.append(f"  {h:>5} x {w:<5} {len(rows):>9} samples {full:>8} batches {rest:>6} left over"
                             + ("   UNDER-FILLED" if not full else ""))
            lost = {b: len(rows) for b, rows in groups.items() if len(rows) < self.batch}
            if lost:
                named = ", ".join(f"{h} x {w} ({n})" for (h, w), n in lost.items())
                lines.append(f"  never used: {sum(lost.values())} samples of the under-filled {named}; "
                             f"a batch of {min(lost.values())} would use them all, or add pictures of these shapes")
        return "\n".join(lines)


def _groups(index: Index, resolution: int) -> dict[tuple[int, int], np.ndarray]:
    """{bucket: its rows, ascending}."""
    sizes = index.buckets(resolution).astype(np.int64)
    code = sizes[:, 0] * 2 ** 16 + sizes[:, 1]
    order = np.argsort(code, kind="stable")
    values, starts = np.unique(code[order], return_index=True)
    return {(int(v) >> 16, int(v) & 0xFFFF): rows for v, rows in zip(values, np.split(order, starts[1:])) if v}


def _stream(*names: object) -> np.random.Philox:
    key = hashlib.sha256(json.dumps(names).encode()).digest()[:16]
    return np.random.Philox(key=np.frombuffer(key, "<u8"))


def _permutation(count: int, *names: object) -> np.ndarray:
    # The draws use the raw stream, which numpy keeps stable. The draws of its Generator may change with a release.
    return np.argsort(_stream(*names).random_raw(count), kind="stable")
