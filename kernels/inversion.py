"""Editing by inversion: from a picture's latent up to its noise under the source's conditioning, and down again.

A flow: x_s = (1 - s) x_0 + s n, the model's velocity v = dx/ds, times s in 0..1. A walk follows falling or rising times;
`after` is the step's own length, the next time minus this one.

rf_solver    midpoint steps (Wang et al., arXiv 2411.04746; their second order Taylor step, with the derivative taken over
             half a step, is the midpoint step): v at the step's middle, which is reached by v at its beginning
fireflow     the same, where the middle is reached by the last step's v (Deng et al., arXiv 2412.07517): one evaluation a
             step, and one more to begin with
uniedit      up: x + after * v_last is where v is evaluated, at the next time; down: two velocities, joined by how far they
             are apart at each place (Jiao et al., arXiv 2504.13109)
rf_inversion up: towards a noise y_1 by the part gamma; down: towards the source by the part eta (Rout et al., arXiv
             2410.10792)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (x, time) -> dx/ds, like x


def midpoint(x: Tensor, times: Sequence[float], velocity: Velocity) -> Iterator[Tensor]:
    """x after each step of RF-Solver: two evaluations a step, of the second order."""
    for now, later in _steps(times):
        half = (later - now) / 2
        x = x + (later - now) * velocity(x + half * velocity(x, now), now + half)
        yield x


def reused(x: Tensor, times: Sequence[float], velocity: Velocity) -> Iterator[Tensor]:
    """x after each step of FireFlow: one evaluation a step and one to begin with, of the second order."""
    last = None
    for now, later in _steps(times):
        half = (later - now) / 2
        last = velocity(x + half * (velocity(x, now) if last is None else last), now + half)
        x = x + (later - now) * last
        yield x


def corrected(x: Tensor, times: Sequence[float], velocity: Velocity) -> Iterator[Tensor]:
    """x after each step of UniEdit-Flow's inversion, which plain steps down undo: one evaluation a step and one to begin
    with."""
    last = None
    for now, later in _steps(times):
        last = velocity(x + (later - now) * (velocity(x, now) if last is None else last), later)
        x = x + (later - now) * last
        yield x


def pulled(x: Tensor, times: Sequence[float], velocity: Velocity, noise: Tensor, gamma: float) -> Iterator[Tensor]:
    """x after each step of RF-Inversion's way up: by (1 - gamma) v + gamma (noise - x) / (1 - s). At gamma 1 it ends, at
    time 1, in the noise."""
    for now, later in _steps(times):
        v = velocity(x, now) if gamma != 1 else torch.zeros_like(x)
        x = x + (later - now) * ((1 - gamma) * v + gamma * (noise - x) / (1 - now))
        yield x


def held(x: Tensor, times: Sequence[float], velocity: Velocity, source: Tensor, eta: float, stop: float) -> Iterator[Tensor]:
    """x after each step of RF-Inversion's way down: by (1 - eta) v + eta (x - source) / s in the first `stop` (0..1) of
    the steps, by v in the others. At eta 1 and stop 1 it ends, at time 0, in the source."""
    steps = _steps(times)
    for number, (now, later) in enumerate(steps):
        part = eta if number < round(stop * len(steps)) else 0.0
        v = velocity(x, now) if part != 1 else torch.zeros_like(x)
        x = x + (later - now) * ((1 - part) * v + part * (x - source) / now)
        yield x


def joined(edited: Tensor, source: Tensor, omega: float) -> Tensor:
    """UniEdit-Flow's velocity of two, [B, C, H, W]: m edited + (1 - m) source + omega (1 + m) (edited - source).

    m [B, 1, H, W] is their distance at each place, a mean over channels, from 0 at each picture's least to 1 at its
    greatest; all 0 where the two are the same everywhere.
    """
    apart = edited - source
    m = apart.abs().mean(1, keepdim=True)
    low, high = m.amin((2, 3), keepdim=True), m.amax((2, 3), keepdim=True)
    m = (m - low) / (high - low).clamp_min(torch.finfo(m.dtype).tiny)
    return source + (m + omega * (1 + m)) * apart


def plain(x: Tensor, times: Sequence[float], velocity: Velocity) -> Iterator[Tensor]:
    """x after each step of Euler's rule."""
    for now, later in _steps(times):
        x = x + (later - now) * velocity(x, now)
        yield x


def _steps(times: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip(times[:-1], times[1:]))
