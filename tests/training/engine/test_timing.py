"""Times in turns: ratios to the first call, without the turn that warms up."""
from __future__ import annotations

import time

from semantic_diffusion_adapter.training.engine.timing import ratios, seconds


def test_times_are_ratios_to_the_first(monkeypatch):
    clock, calls = iter(range(10_000)), []
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))

    def slow() -> None:
        calls.append([next(clock) for _ in range(3 if calls else 50)])

    assert ratios({"a": lambda: None, "b": slow}, "cpu", 3) == {"a": 1.0, "b": 4.0} and len(calls) == 4
    assert seconds(lambda: next(clock), "cpu", 4) == 5 / 4
