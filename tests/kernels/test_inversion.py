"""Walks up and down the flow of a Gaussian mixture, whose velocity is known, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from semantic_diffusion_adapter.kernels import inversion

SPREAD = 0.6
MEANS = torch.tensor([[-1.0, 0.5], [1.2, 0.3]], dtype=torch.float64)
TOP = 0.95  # from where the walks turn back


def velocity(x: torch.Tensor, time: float) -> torch.Tensor:
    """dx/ds at [B, 2] of x_s = (1 - s) x_0 + s n: the expected noise less the expected picture, over a mixture of equal
    Gaussians."""
    variance = (1 - time) ** 2 * SPREAD**2 + time**2
    apart = x[:, None] - (1 - time) * MEANS
    weight = torch.softmax(-apart.square().sum(-1) / (2 * variance), 1)[..., None]
    noise = time * apart / variance
    picture = MEANS + (1 - time) * SPREAD**2 * apart / variance
    return (weight * (noise - picture)).sum(1)


def start() -> torch.Tensor:
    return torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rising(steps: int) -> list[float]:
    return torch.linspace(0, TOP, steps + 1, dtype=torch.float64).tolist()


def last(walk) -> torch.Tensor:
    for x in walk:  # noqa: B007  (the walk is what it yields last)
        pass
    return x


PAIRS = {
    "euler": (inversion.plain, inversion.plain),
    "rf_solver": (inversion.midpoint, inversion.midpoint),
    "fireflow": (inversion.reused, inversion.reused),
    "uniedit": (inversion.corrected, inversion.plain),
}


def there_and_back(method: str, steps: int) -> float:
    """The greatest distance from the start after an inversion and a way back."""
    up, down = PAIRS[method]
    times, x = rising(steps), start()
    return float((last(down(last(up(x, times, velocity)), times[::-1], velocity)) - x).abs().max())


@pytest.mark.parametrize("method, order", [("euler", 1), ("rf_solver", 2), ("fireflow", 2), ("uniedit", 2)])
def test_there_and_back_returns_the_source_to_the_methods_order(method, order):
    one, half = there_and_back(method, 64), there_and_back(method, 128)
    assert math.log2(one / half) > order - 0.25
    assert half < there_and_back("euler", 128) or method == "euler"


@pytest.mark.parametrize(
    "walk, count", [(inversion.plain, 5), (inversion.midpoint, 10), (inversion.reused, 6), (inversion.corrected, 6)]
)
def test_a_walk_evaluates_as_often_as_it_says(walk, count):
    seen = []

    def watched(x, time):
        seen.append(time)
        return velocity(x, time)

    assert len(list(walk(start(), rising(5), watched))) == 5
    assert len(seen) == count


@pytest.mark.parametrize("walk", [inversion.plain, inversion.midpoint, inversion.reused, inversion.corrected])
def test_a_straight_path_is_walked_exactly(walk):
    slope = start().flip(0)
    found = last(walk(start(), rising(3), lambda x, time: slope))
    assert torch.allclose(found, start() + TOP * slope, rtol=0, atol=1e-14)


def test_at_gamma_0_and_eta_0_rf_inversion_is_eulers_rule():
    times, noise = rising(5), start().flip(0)
    up = last(inversion.pulled(start(), times, velocity, noise, 0.0))
    assert torch.equal(up, last(inversion.plain(start(), times, velocity)))
    for eta, stop in ((0.0, 1.0), (0.9, 0.0)):
        down = last(inversion.held(up, times[::-1], velocity, start(), eta, stop))
        assert torch.equal(down, last(inversion.plain(up, times[::-1], velocity)))


def test_at_gamma_1_it_ends_in_the_noise_and_at_eta_1_in_the_source():
    times, noise = torch.linspace(0, 1, 6, dtype=torch.float64).tolist(), start().flip(0)
    up = last(inversion.pulled(start(), times, velocity, noise, 1.0))
    assert torch.allclose(up, noise, rtol=0, atol=1e-14)
    down = last(inversion.held(up, times[::-1], velocity, start(), 1.0, 1.0))
    assert torch.allclose(down, start(), rtol=0, atol=1e-14)


def test_rf_inversions_steps_are_the_papers():
    times, noise, x = [0.0, 0.4], start().flip(0), start()
    u = velocity(x, 0.0)
    assert torch.allclose(last(inversion.pulled(x, times, velocity, noise, 0.5)), x + 0.4 * (u + 0.5 * ((noise - x) - u)))
    v = -velocity(x, 0.4)
    expected = x + 0.4 * (v + 0.9 * ((start().flip(1) - x) / 0.4 - v))
    assert torch.allclose(last(inversion.held(x, times[::-1], velocity, start().flip(1), 0.9, 1.0)), expected)


def test_the_joined_velocity():
    edited, source = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(inversion.joined(source, source, 5.0), source)
    weight = (edited - source).abs().mean(1, keepdim=True)
    for row in range(2):
        one = weight[row] - weight[row].min()
        weight[row] = one / one.max()
    expected = weight * edited + (1 - weight) * source + 2.0 * (weight + 1) * (edited - source)
    assert torch.allclose(inversion.joined(edited, source, 2.0), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(inversion.joined(edited, source, 2.0)[:1], inversion.joined(edited[:1], source[:1], 2.0))
