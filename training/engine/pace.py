"""The time that the rest of a run takes: steps of any resolution, validations and saves, estimated from those that were
timed."""
from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

SAMPLED = 256  # at most this many of the coming steps are asked for their effort


class Pace:
    """Times of a run with `max_steps`. effort(number) is the relative cost of step `number`, which counts from 0.

    Validations and saves count only after the first of them was timed.
    """

    def __init__(self, max_steps: int, validate_every: int, save_every: int,
                 effort: Callable[[int], float] = lambda number: 1.0):
        self.max_steps, self.every, self.effort = max_steps, {"validation": validate_every, "save": save_every}, effort
        self.rates: deque[float] = deque(maxlen=64)  # seconds of the latest steps, each for a unit of effort
        self.seconds = {"validation": 0.0, "save": 0.0}

    def step(self, number: int, seconds: float) -> None:
        self.rates.append(seconds / self.effort(number))

    def other(self, what: str, seconds: float) -> None:
        """what: "validation" or "save"; how long the latest one took."""
        self.seconds[what] = seconds

    def usual(self, number: int) -> float:
        """Seconds of a step: the median, because a step that compiles takes long."""
        return statistics.median(self.rates) * self.effort(number)

    def left(self, done: int) -> float:
        """Seconds from the end of step `done` (counted from 1) to the end of the run."""
        count = self.max_steps - done
        asked = range(done, self.max_steps, max(1, -(-count // SAMPLED)))
        mean = sum(map(self.effort, asked)) / max(1, len(asked))
        return statistics.median(self.rates) * mean * count + sum(
            self.seconds[what] * self.coming(done, every) for what, every in self.every.items())

    def coming(self, done: int, every: int) -> int:
        """How many times an event still comes that happens every `every` steps and at the end."""
        return (self.max_steps - 1) // every - (done - 1) // every + 1 if done < self.max_steps else 0
