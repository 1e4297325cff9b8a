"""What both stages do with a prepared set: plan the batches, feed the steps, hold samples out."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..config import RunConfig
from ..data.batches import Plan
from ..data.feed import Feed
from ..data.index import CorruptSample, Index
from ..engine import World
from .settings import Data


def plan_of(index: Index, run: RunConfig, data: Data) -> Plan:
    """The batches of a run. Their resolutions change by phase."""
    return Plan(index, run.batch, run.seed,
                {str(i): dict.fromkeys(map(int, p[1:]), 1.0) for i, p in enumerate(data.resolutions)})


def captions_of(index: Index) -> list[str]:
    """The first captions of a set, for the statistics of the text space."""
    return [caption for caption in index.table.column("caption").slice(0, 256).to_pylist() if caption]


def feed_of(plan: Plan, run: RunConfig, data: Data, world: World, read: Callable) -> Feed:
    """This process's samples of a run, as `read` gives them."""
    own = [position for positions in world.share(run.batch, run.micro) for position in positions]
    return Feed(plan, lambda number: data.phase(number / run.planned), own, data.on_corrupt, data.ahead, read)


@dataclass(frozen=True)
class Share:
    """A batch of held-out samples that this process looks at."""

    number: int
    """Place of the batch among all of them, whatever the number of processes."""
    rows: list[int]
    samples: list[Any]
    counts: bool
    """False for a batch that only keeps the processes in step: all of them must call a sharded base equally often."""


class Held:
    """The held-out samples of a run, in batches of one bucket. One process looks at each batch. A sample that cannot be
    read stops the run, or is named once and left out from then on, as `data.on_corrupt` says. An edit of a held-out
    picture may itself be smaller than the resolution; it is left out and counted in `small`.

    read: (index, row, bucket) -> a sample.
    """

    def __init__(self, index: Index, resolution: int, on_corrupt: str, world: World,
                 read: Callable[[Index, int, tuple], Any]):
        self.index, self.on_corrupt, self.world, self.read = index, on_corrupt, world, read
        sizes = [tuple(map(int, size)) for size in index.buckets(resolution)]
        self.buckets = {row: size for row, size in enumerate(sizes) if all(size)}
        self.small = len(sizes) - len(self.buckets)
        self.lost: set[int] = set()

    def __len__(self) -> int:
        return len(self.buckets)

    def report(self, what: str) -> str:
        small = f" ({self.small} more are smaller than the validation's resolution)" if self.small else ""
        return f"{len(self)} {what} held out{small}"

    def batches(self, count: int, most: int) -> Iterator[Share]:
        """This process's batches of the first `count` held-out samples, bucket by bucket, at most `most` samples each.
        The content of a batch does not depend on the number of processes, and every process gets equally many
        batches."""
        rows = list(self.buckets)[:count]
        cut = [group[start:start + most] for bucket in sorted({self.buckets[row] for row in rows})
               for group in [[row for row in rows if self.buckets[row] == bucket]]
               for start in range(0, len(group), most)]
        for first in range(0, len(cut), self.world.size):
            number = first + self.world.rank
            found = self.readable(cut[number] if number < len(cut) else [])
            if not found and self.world.size == 1:
                continue
            if found:
                yield Share(number, list(found), list(found.values()), True)
            else:
                yield Share(number, *self.stand_in(), False)

    def stand_in(self) -> tuple[list[int], list[Any]]:
        """Some sample that can be read."""
        for row, bucket in self.buckets.items():
            with suppress(CorruptSample):
                return [row], [self.read(self.index, row, bucket)]
        raise self.none()

    def readable(self, rows: list[int]) -> dict[int, Any]:
        """The readable ones of the rows. ValueError where no held-out sample can be read any more."""
        samples, errors = {}, {}
        for row in rows:
            if row in self.lost:
                continue
            try:
                samples[row] = self.read(self.index, row, self.buckets[row])
            except CorruptSample as error:
                errors[row] = error
        lost = {row: str(error) for part in self.world.gathered(
            {row: str(error) for row, error in errors.items()}) for row, error in part.items()}
        if lost and self.on_corrupt == "stop":  # in all processes, so that none waits for one that has ended
            raise next(iter(errors.values()), None) or ValueError(next(iter(lost.values())))
        if lost and self.world.main:
            print(*(f"{words} The validation goes on without it." for words in lost.values()), sep="\n", flush=True)
        self.lost |= lost.keys()
        if len(self.lost) == len(self.buckets):
            raise self.none()
        return samples

    def none(self) -> ValueError:
        return ValueError(f"None of the {len(self)} held-out samples of {self.index.url} can be read any more; "
                          f"restore its shards or prepare the set again.")

    def gathered(self, own: dict[int, Any]) -> dict[int, Any]:
        """The results of all processes for their rows or batches, in order, in every process."""
        return dict(sorted((key, value) for part in self.world.gathered(own) for key, value in part.items()))
