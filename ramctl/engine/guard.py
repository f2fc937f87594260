"""Tells when a run has diverged: the reward is below where it began while the policy drifts away from the reference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class Guard:
    """Watches the training reward and the drift, both smoothed over ``window`` steps.

    It speaks when the smoothed reward has fallen below its start by more than ``certainty`` standard errors *and* the
    drift is more than ``explosion`` times what it was when the reward was best. Either alone is no divergence: rewards
    are noisy, and a policy that learns must drift. Five standard errors, because the question is asked at every step:
    with two, a seventh of the runs that learn slowly would be stopped.
    """

    window: int = 8
    explosion: float = 3.0
    certainty: float = 5.0
    rewards: list[float] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)

    def update(self, reward: float, drift: float) -> str | None:
        """Take one step's figures; the reason to stop, or None.

        Args:
            reward: mean training reward of the step.
            drift: mean squared distance of the policy's velocity from the reference's.
        """
        self.rewards.append(reward)
        self.drifts.append(drift)
        if len(self.rewards) < 2 * self.window:
            return None
        start = self.rewards[: self.window]
        now = statistics.fmean(self.rewards[-self.window :])
        margin = self.certainty * self._noise() * (2 / self.window) ** 0.5
        drift_now = statistics.fmean(self.drifts[-self.window :])
        best, drift_then = self._best()
        if now < statistics.fmean(start) - margin and drift_now > self.explosion * max(drift_then, 1e-12):
            return (
                f"the reward fell to {now:.3f}, below its start {statistics.fmean(start):.3f} (best {best:.3f}), while "
                f"the drift from the reference grew {drift_now / max(drift_then, 1e-12):.1f}-fold since its best"
            )
        return None

    def _noise(self) -> float:
        """Standard deviation of one step's reward about its trend, from successive differences."""
        squares = [(b - a) ** 2 for a, b in pairwise(self.rewards)]
        return math.sqrt(statistics.fmean(squares) / 2)

    def _best(self) -> tuple[float, float]:
        """The best smoothed reward so far and the drift smoothed over the same steps."""
        means = [
            (
                statistics.fmean(self.rewards[i : i + self.window]),
                statistics.fmean(self.drifts[i : i + self.window]),
            )
            for i in range(len(self.rewards) - self.window + 1)
        ]
        return max(means)

    def state(self) -> dict[str, Sequence[float]]:
        """What a checkpoint keeps."""
        return {"rewards": list(self.rewards), "drifts": list(self.drifts)}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take back :meth:`state`."""
        self.rewards, self.drifts = list(state["rewards"]), list(state["drifts"])
