"""Macro averages, the mean of the prompt kinds' means, with bootstrap intervals: GenEval's own way to sum up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ramctl.scorers.base import Floats

_Columns = NDArray[np.float64]


def macro_interval(
    values: Floats, tags: Sequence[str], *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """(macro average, low, high): each kind's mean over its pictures, then the mean of these.

    The bootstrap draws prompts anew within their kind, as each kind's size is fixed by the benchmark; the pictures of a
    prompt stay together.

    Args:
        values: [prompts, images_per_prompt], NaN for a picture that failed; a kind with no other is left out.
        tags: the kind of each prompt.

    Raises:
        ValueError: no finite value at all.
    """
    middle, drawn = _resampled(values, tags, resamples, seed)
    return _summed_up(middle, drawn, level)


def paired_macro_interval(
    before: Floats, after: Floats, tags: Sequence[str], *, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """(after − before, low, high) of the macro averages over the same drawn prompts.

    Args:
        before, after: [prompts, images_per_prompt], in the same order; where a picture of either failed, its partner is
            left out.

    Raises:
        ValueError: shapes that differ, or no complete pair.
    """
    if before.shape != after.shape:
        raise ValueError(f"paired values differ in shape: {before.shape} and {after.shape}")
    complete = np.isfinite(before) & np.isfinite(after)
    first, second = (
        _resampled(np.where(complete, part, np.nan).astype(np.float32), tags, resamples, seed)
        for part in (before, after)
    )
    return _summed_up(second[0] - first[0], second[1] - first[1], level)


def _resampled(values: Floats, tags: Sequence[str], resamples: int, seed: int) -> tuple[float, _Columns]:
    """The macro average of the values, and of ``resamples`` draws of prompts; the same draws for the same tags."""
    rng = np.random.default_rng(seed)
    labels = np.array(tags)
    finite = np.isfinite(values)
    sums, counts = np.where(finite, values, 0).astype(np.float64).sum(1), finite.sum(1)
    middles: list[float] = []
    draws: list[_Columns] = []
    for tag in dict.fromkeys(tags):
        rows = np.flatnonzero(labels == tag)
        index = rows[rng.integers(len(rows), size=(resamples, len(rows)))]
        if not counts[rows].sum():
            continue
        middles.append(float(sums[rows].sum() / counts[rows].sum()))
        drawn = counts[index].sum(1)
        # A draw of none but failed prompts has no mean; the kind's own stands in.
        draws.append(np.where(drawn > 0, sums[index].sum(1) / np.maximum(drawn, 1), middles[-1]))
    if not middles:
        raise ValueError("no finite value")
    return float(np.mean(middles)), np.mean(draws, axis=0)


def _summed_up(middle: float, drawn: _Columns, level: float) -> tuple[float, float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return middle, float(low), float(high)
