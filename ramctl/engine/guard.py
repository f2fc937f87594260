"""Tells when a run has diverged: the reward is far below what it was while the policy runs away from the reference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class Guard:
    """Watches the training reward and the drift, both smoothed over ``window`` steps.

    It speaks when the smoothed reward has fallen below its best by more than ``certainty`` standard errors *and* the
    drift is more than ``explosion`` times what it was then. Either alone is no divergence: rewards are noisy, and a
    policy that learns must drift. Five standard errors, because the question is asked at every step.

    A learning rate that ruins the policy within the first few steps leaves no good window to compare with; but the
    first step's pictures are still the reference's. So it also speaks when the smoothed reward is below the first
    step's by as many standard errors and the drift exceeds ``far``, in units of the latents' variance (runs that
    learned had drifts of .01 to .1, runs that collapsed passed 1).
    """

    window: int = 8
    explosion: float = 3.0
    certainty: float = 5.0
    far: float = 1.0
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
        now, drift_now = statistics.fmean(self.rewards[-self.window :]), statistics.fmean(self.drifts[-self.window :])
        best, drift_then = self._best()
        certain = self.certainty * self._noise()
        growth = drift_now / max(drift_then, 1e-12)
        if now < best - certain * math.sqrt(2 / self.window) and growth > self.explosion:
            fall = f"the reward fell from {best:.3f} to {now:.3f}"
            return f"{fall}, while the drift from the reference grew {growth:.1f}-fold"
        first = self.rewards[0]
        if now < first - certain * math.sqrt(1 + 1 / self.window) and drift_now > self.far:
            return (
                f"the reward fell to {now:.3f}, below the reference's {first:.3f}, while the drift from the reference "
                f"grew to {drift_now:.3g}"
            )
        return None

    def _noise(self) -> float:
        """Standard deviation of one step's reward about its trend, from successive differences.

        The largest difference counts as the second largest: a collapse from one step to the next is no noise.
        """
        *squares, _ = sorted((b - a) ** 2 for a, b in pairwise(self.rewards))
        return math.sqrt(statistics.fmean([*squares, squares[-1]]) / 2)

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
