"""What both stages do with a prepared set: the plan of the batches, the feed of the steps, the held-out samples."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..config import RunConfig
from ..data.batches import Plan
from ..data.feed import Feed
from ..data.index import CorruptSample, Index
from ..engine import World
from .settings import DataConfig


def plan_of(index: Index, run: RunConfig, data: DataConfig) -> Plan:
    """The batches of a run, whose resolutions change by phase."""
    return Plan(index, run.batch, run.seed, {str(i): dict.fromkeys(map(int, p[1:]), 1.0) for i, p in enumerate(data.resolutions)})


def captions_of(index: Index) -> list[str]:
    """The first captions of a set, for the statistics of the text space."""
    return [caption for caption in index.table.column("caption").slice(0, 256).to_pylist() if caption]


def feed_of(plan: Plan, run: RunConfig, data: DataConfig, world: World, read: Callable) -> Feed:
    """This process's samples of a run, as `read` gives them."""
    own = [position for positions in world.share(run.batch, run.micro) for position in positions]
    return Feed(plan, lambda number: data.phase(number / run.planned), own, data.on_corrupt, data.ahead, read)


class Held:
    """The held-out samples of a run, by batches of one bucket. One that cannot be read stops the run, or is named once and left
    out from then on, as `data.on_corrupt` says. All processes leave out the same ones: a base that is cut over them has to be
    asked equally often by each.

    read: (index, row, bucket) -> a sample.
    """

    def __init__(self, index: Index, resolution: int, on_corrupt: str, world: World, read: Callable[[Index, int, tuple], Any]):
        self.index, self.resolution, self.on_corrupt, self.world, self.read = index, resolution, on_corrupt, world, read
        self.lost: set[int] = set()

    def batches(self, count: int, most: int) -> Iterator[tuple[list[int], list]]:
        """(rows, samples), at most `most` of them, of the first `count` held-out samples, bucket by bucket."""
        sizes = [tuple(map(int, size)) for size in self.index.buckets(self.resolution)[:count]]
        for bucket in sorted(set(sizes)):
            rows = [row for row, size in enumerate(sizes) if size == bucket]
            for start in range(0, len(rows), most):
                if found := self.found(rows[start:start + most], bucket):
                    yield list(found), list(found.values())

    def found(self, rows: list[int], bucket: tuple[int, int]) -> dict[int, Any]:
        """Those of the rows that can be read. ValueError where by now none of all held-out samples can."""
        samples, errors = {}, {}
        for row in rows:
            if row in self.lost:
                continue
            try:
                samples[row] = self.read(self.index, row, bucket)
            except CorruptSample as error:
                errors[row] = error
        own, told = errors, self.world.gathered({row: str(error) for row, error in errors.items()})
        errors = {row: words for part in told for row, words in part.items()}
        if errors and self.on_corrupt == "stop":  # in all processes, so that none waits for one that has ended
            raise next(iter(own.values()), None) or ValueError(next(iter(errors.values())))
        if errors and self.world.main:
            print(*(f"{words} The validation goes on without it." for words in errors.values()), sep="\n", flush=True)
        self.lost |= errors.keys()
        if len(self.lost) == len(self.index):
            raise ValueError(f"None of the {len(self.index)} held-out samples of {self.index.url} can be read any more; "
                             "restore its shards or prepare the set again.")
        return {row: sample for row, sample in samples.items() if row not in errors}
