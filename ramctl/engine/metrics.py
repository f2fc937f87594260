"""Numbers per step and per evaluation: rewards by prompt kind, failures, means of the scorers' details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ramctl.prompts import Prompt

Column = NDArray[np.float32]


class ScoredPictures(Protocol):
    """N scored pictures with their prompts."""

    @property
    def value(self) -> Column:
        """float32 [N], NaN where failed."""
        ...

    @property
    def strict(self) -> Column | None:
        """float32 [N] or None."""
        ...

    @property
    def details(self) -> Mapping[str, Column]:
        """Further float32 [N] columns."""
        ...

    @property
    def failed(self) -> NDArray[np.bool_]:
        """bool [N]."""
        ...

    @property
    def prompts(self) -> Sequence[Prompt]:
        """N prompts."""
        ...


def _mean(values: Column) -> float:
    """Mean of the finite entries, NaN when there is none."""
    good = values[np.isfinite(values)]
    return float(good.mean(dtype=np.float64)) if len(good) else float("nan")


def _std(values: Column) -> float:
    """Standard deviation of the finite entries, exactly 0 where all are equal; NaN when there is none."""
    good = values[np.isfinite(values)]
    if not len(good):
        return float("nan")
    return float(good.std(dtype=np.float64)) if np.ptp(good) else 0.0


def mean_by_tag(values: Column, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Mean of the finite values per prompt kind, in order of first appearance."""
    tags = np.array([prompt.tag for prompt in prompts])
    return {str(tag): _mean(values[tags == tag]) for tag in dict.fromkeys(tags)}


def reward_metrics(scores: ScoredPictures, prefix: str = "reward") -> dict[str, float]:
    """``<prefix>/mean|std|strict|failed``, ``score/<detail>`` and ``<prefix>_by_tag/<tag>``.

    Of several scorers each one's own value, the detail ``<scorer>/value``, also has its ``score/<scorer>/std``.
    """
    good = scores.value[~scores.failed]
    metrics = {
        f"{prefix}/mean": _mean(scores.value),
        f"{prefix}/std": _std(good),
        f"{prefix}/failed": float(scores.failed.mean()) if len(scores.failed) else 0.0,
    }
    if scores.strict is not None:
        metrics[f"{prefix}/strict"] = _mean(scores.strict)
    score = "score" if prefix == "reward" else prefix
    metrics.update({f"{score}/{name}": _mean(column) for name, column in scores.details.items()})
    own = {name: column for name, column in scores.details.items() if name.endswith("/value")}
    metrics.update({f"{score}/{name.removesuffix('value')}std": _std(column) for name, column in own.items()})
    metrics.update({f"{prefix}_by_tag/{tag}": mean for tag, mean in mean_by_tag(scores.value, scores.prompts).items()})
    if scores.strict is not None:
        by_tag = mean_by_tag(scores.strict, scores.prompts)
        metrics.update({f"{prefix}_strict_by_tag/{tag}": mean for tag, mean in by_tag.items()})
    return metrics


def paired_interval(
    before: Column, after: Column, *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """(mean difference, low, high): after − before with a bootstrap interval over pairs.

    Args:
        before, after: [N], one value per prompt (or picture), in the same order; pairs with a NaN are left out.

    Raises:
        ValueError: the lengths differ or no pair is complete.
    """
    if before.shape != after.shape:
        raise ValueError(f"paired values differ in length: {len(before)} and {len(after)}")
    difference = (after - before).astype(np.float64)
    difference = difference[np.isfinite(difference)]
    if not len(difference):
        raise ValueError("no complete pair")
    rng = np.random.default_rng(seed)
    index = rng.integers(len(difference), size=(resamples, len(difference)))
    low, high = np.quantile(difference[index].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(difference.mean()), float(low), float(high)


def interval(
    values: Column, *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """(mean, low, high) of the finite values with a bootstrap interval."""
    return paired_interval(np.zeros_like(values), values, resamples=resamples, seed=seed, level=level)
