"""The time that is left, against a run that is simulated second by second."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semantic_diffusion_adapter.training.engine.pace import Pace


def simulated(done: int, most: int, validate: int, save: int, effort, second: float, seconds: dict) -> float:
    """What the loop does from the end of step `done` on."""
    total = 0.0
    for number in range(done, most):
        total += seconds["save"] if number % save == 0 and number else 0.0
        total += seconds["validation"] if number % validate == 0 else 0.0
        total += second * effort(number)
    return total + (sum(seconds.values()) if done < most else 0.0)


@given(st.integers(1, 300), st.integers(1, 200), st.integers(1, 200), st.integers(1, 60), st.floats(0.01, 10))
def test_the_rest_is_what_the_loop_will_do(most, done, every, save, second):
    done = min(done, most)

    def effort(number: int) -> float:
        return 512.0 ** 2 if number < most / 2 else 1024.0 ** 2

    pace, seconds = Pace(most, every, save, effort), {"validation": 40.0, "save": 7.0}
    for number in range(done):
        pace.step(number, second * effort(number))
    for what, took in seconds.items():
        pace.other(what, took)
    whole = simulated(done, most, every, save, effort, second, seconds)
    # Of more than 256 steps some are asked for their effort, not all.
    assert pace.left(done) == pytest.approx(whole, rel=1e-6 if most - done <= 256 else 0.02)


def test_a_larger_resolution_that_is_still_to_come_takes_longer_and_the_first_step_which_compiles_counts_little():
    pace = Pace(100, 1000, 1000, lambda number: 1.0 if number < 50 else 4.0)
    pace.step(0, 600.0)
    for number in range(1, 40):
        pace.step(number, 2.0)
    assert pace.usual(40) == 2.0 and pace.usual(60) == 8.0 and pace.left(40) == pytest.approx(10 * 2 + 50 * 8)
