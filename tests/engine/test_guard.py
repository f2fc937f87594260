"""The guard stops collapses and leaves noisy, flat and learning runs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from ramctl.engine.guard import Guard


def run(guard: Guard, rewards: Iterable[float], drifts: Iterable[float]) -> tuple[int, str] | None:
    """(step, reason) of the first stop, counted from 1."""
    for step, (reward, drift) in enumerate(zip(rewards, drifts, strict=True), start=1):
        reason = guard.update(reward, drift)
        if reason is not None:
            return step, reason
    return None


def noisy(reward: Callable[[int], float], steps: int, seed: int, sigma: float = 0.04) -> list[float]:
    noise = np.random.default_rng(seed).normal(0, sigma, steps)
    return [reward(k) + float(n) for k, n in enumerate(noise)]


def rise_then_fall(k: int) -> float:
    """The held-out score of a run with m = 100: .27 rose to .41 at step 40, then fell to .12."""
    return 0.27 + 0.14 * k / 40 if k < 40 else max(0.12, 0.41 - 0.02 * (k - 40))


def drift_of_a_collapse(k: int) -> float:
    return 0.002 * (k + 1) * math.exp(max(0, k - 40) / 5)


@pytest.mark.parametrize("seed", range(8))
def test_a_rise_and_collapse_is_stopped_with_the_reason(seed: int) -> None:
    rewards = noisy(rise_then_fall, 120, seed)
    stop = run(Guard(), rewards, [drift_of_a_collapse(k) for k in range(120)])
    assert stop is not None
    step, reason = stop
    assert 44 <= step <= 56  # before the reward is back at its start
    assert reason.startswith("the reward fell from 0.3") or reason.startswith("the reward fell from 0.4")
    assert reason.endswith("-fold")


#: Rewards and drifts of a run whose policy collapsed after step 55 (64-pixel model, m = 10, no clipping).
RECORDED = [
    *[(0.74, 0.022), (0.78, 0.021), (0.8, 0.026), (0.69, 0.023), (0.79, 0.028), (0.84, 0.028), (0.73, 0.038)],
    *[(0.88, 0.041), (0.85, 0.054), (0.83, 0.038), (0.82, 0.036), (0.85, 0.05), (0.8, 0.036), (0.9, 0.034)],
    *[(0.79, 0.031), (0.85, 0.043), (0.77, 0.094), (0.73, 0.225), (0.84, 0.544), (0.83, 0.22), (0.74, 0.379)],
    *[(0.67, 0.98), (0.66, 1.455), (0.61, 2.62), (0.58, 2.241), (0.52, 3.117), (0.53, 6.055), (0.42, 6.57)],
]


def test_a_recorded_collapse_is_stopped_before_the_gain_is_lost() -> None:
    rewards, drifts = zip(*RECORDED, strict=True)
    stop = run(Guard(), rewards, drifts)
    assert stop is not None
    assert 20 < stop[0] <= 25


def test_a_policy_ruined_in_its_first_update_is_stopped() -> None:
    """Recorded with an absurd rate: the window never saw a good step, only the first step's reward is the base's."""
    rewards = [-1.34, -3.48, -3.53, -3.53, -3.56, -3.48, -3.31, -3.46, -3.52, -3.4, -3.38, -3.46, -3.43, -3.45, -3.41]
    drifts = [0.0, 1.5e9, 8.8e8, *[1e9] * 12]
    stop = run(Guard(), [*rewards, -3.59], [*drifts, 1e9])
    assert stop is not None
    assert stop[0] == 16  # as soon as there are two windows
    assert "below the reference's -1.340" in stop[1]
    healthy = run(Guard(), [*rewards, -3.59], [0.0, *[0.05] * 15])
    assert healthy is None


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("reward", "drift"),
    [
        (lambda k: 0.3 + 0.3 * k / 300, lambda k: 0.01 * (k + 1)),  # learns, drifts steadily
        (lambda k: 0.3 + 0.3 * (1 - math.exp(-k / 30)), lambda k: 0.02 * k),  # learns, then stays
        (lambda k: 0.3, lambda k: 0.01 * k),  # nothing learned yet, the drift grows
        (lambda k: 0.3, lambda k: 0.05),  # noise about a constant, settled drift
        (lambda k: 0.5 - 0.1 * k / 300, lambda k: 0.01),  # worsens without leaving the reference
    ],
    ids=["rising", "saturating", "not-yet", "flat", "worse-without-drift"],
)
def test_healthy_curves_are_left_alone(
    reward: Callable[[int], float], drift: Callable[[int], float], seed: int
) -> None:
    assert run(Guard(), noisy(reward, 200, seed), [drift(k) for k in range(200)]) is None


def test_a_rare_reward_is_no_collapse() -> None:
    rewards = [1.0 if k in (2, 5, 30) else 0.0 for k in range(100)]
    assert run(Guard(), rewards, [0.02 * k for k in range(100)]) is None


def test_neither_sign_alone_is_enough() -> None:
    steps = range(60)
    falling = [0.5 - 0.01 * k for k in steps]
    assert run(Guard(), falling, [0.01] * 60) is None
    exploding = [1e-3 * math.exp(k / 6) for k in steps]
    assert run(Guard(), [0.5 + 0.001 * k for k in steps], exploding) is None
    assert run(Guard(), falling, exploding) is not None


def test_a_restored_guard_stops_at_the_same_step() -> None:
    rewards, drifts = noisy(rise_then_fall, 120, 0), [drift_of_a_collapse(k) for k in range(120)]
    whole = run(Guard(), rewards, drifts)
    first = Guard()
    assert run(first, rewards[:30], drifts[:30]) is None
    second = Guard()
    second.restore(first.state())
    rest = run(second, rewards[30:], drifts[30:])
    assert whole is not None
    assert rest is not None
    assert (rest[0] + 30, rest[1]) == whole


def test_the_state_is_a_copy() -> None:
    guard = Guard()
    guard.update(0.5, 0.1)
    state = guard.state()
    guard.update(0.6, 0.2)
    assert state == {"rewards": [0.5], "drifts": [0.1]}
