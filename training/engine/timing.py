"""Times of calls as ratios, measured in turns, so that other load on the machine affects all of them alike."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def seconds(call: Callable[[], object], device: str, calls: int = 1) -> float:
    """Mean seconds of `calls` calls, with the device's work done. device: "cpu" or "cuda"."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def ratios(calls: Mapping[str, Callable[[], object]], device: str, turns: int) -> dict[str, float]:
    """Median over the turns of each call's time relative to the first one's. One turn before them warms up."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, first = list(calls), next(iter(calls))
    for turn in range(turns + 1):
        taken = {name: seconds(calls[name], device) for name in order}
        order = order[1:] + order[:1]
        if turn:
            for name in calls:
                found[name].append(taken[name] / taken[first])
    return {name: statistics.median(values) for name, values in found.items()}
