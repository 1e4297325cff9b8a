"""What both stages do with a prepared set: the plan of the batches, the feed of the steps, the held-out ones by bucket."""
from __future__ import annotations

from collections.abc import Callable, Iterator

from ..config import RunConfig
from ..data.batches import Plan
from ..data.index import Index
from ..engine import World
from ..feed import Feed
from .settings import DataConfig


def plan_of(index: Index, run: RunConfig, data: DataConfig) -> Plan:
    """The batches of a run, whose resolutions change by phase."""
    return Plan(index, run.batch, run.seed, {str(i): dict.fromkeys(map(int, p[1:]), 1.0) for i, p in enumerate(data.resolutions)})


def feed_of(plan: Plan, run: RunConfig, data: DataConfig, world: World, read: Callable) -> Feed:
    """This process's samples of a run, as `read` gives them."""
    own = [position for positions in world.share(run.batch, run.micro) for position in positions]
    return Feed(plan, lambda number: data.phase(number / run.planned), own, data.on_corrupt, data.ahead, read)


def held_rows(held: Index, resolution: int, count: int, most: int) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """(bucket, at most `most` rows) of the first `count` held-out samples, bucket by bucket."""
    sizes = [tuple(map(int, size)) for size in held.buckets(resolution)[:count]]
    for bucket in sorted(set(sizes)):
        rows = [row for row, size in enumerate(sizes) if size == bucket]
        for start in range(0, len(rows), most):
            yield bucket, rows[start:start + most]
