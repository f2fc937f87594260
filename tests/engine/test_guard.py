"""The guard stops collapses and leaves noisy, flat and learning runs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from ramctl.engine.guard import Guard

Curve = tuple[Callable[[int], float], Callable[[int], float]]


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
    """As seen with m = 100: .27 rises to .41 at step 40, then down to .1."""
    return 0.27 + 0.14 * k / 40 if k < 40 else max(0.1, 0.41 - 0.02 * (k - 40))


@pytest.mark.parametrize("seed", range(5))
def test_a_rise_and_collapse_is_stopped_with_the_reason(seed: int) -> None:
    drifts = [0.002 * (k + 1) * math.exp(max(0, k - 40) / 8) for k in range(120)]
    stop = run(Guard(), noisy(rise_then_fall, 120, seed), drifts)
    assert stop is not None
    step, reason = stop
    assert 48 <= step <= 70
    assert "the reward fell to 0." in reason
    assert "below its start 0.2" in reason
    assert "(best 0." in reason
    assert "-fold" in reason


def test_an_immediate_collapse_is_stopped_as_soon_as_two_windows_are_full() -> None:
    rewards = [0.4] * 8 + [0.4 - 0.05 * k for k in range(1, 9)]
    drifts = [1e-3] * 8 + [0.1 * k for k in range(1, 9)]
    stop = run(Guard(), rewards, drifts)
    assert stop is not None
    assert stop[0] == 16


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
    assert run(Guard(), noisy(reward, 300, seed), [drift(k) for k in range(300)]) is None


def test_neither_sign_alone_is_enough() -> None:
    steps = range(60)
    falling = [0.5 - 0.01 * k for k in steps]
    assert run(Guard(), falling, [0.01] * 60) is None
    exploding = [1e-3 * math.exp(k / 6) for k in steps]
    assert run(Guard(), [0.5 + 0.001 * k for k in steps], exploding) is None
    assert run(Guard(), falling, exploding) is not None


def test_a_restored_guard_stops_at_the_same_step() -> None:
    rewards = noisy(rise_then_fall, 120, 0)
    drifts = [0.002 * (k + 1) * math.exp(max(0, k - 40) / 8) for k in range(120)]
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
