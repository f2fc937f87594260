"""Means per prompt kind with failures left out, and bootstrap intervals that cover."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ramctl.engine.metrics import interval, mean_by_tag, paired_interval, reward_metrics
from ramctl.prompts import Prompt

NAN = math.nan
PROMPTS = [Prompt("a", {"tag": "two"}), Prompt("b", {"tag": "one"}), Prompt("c", {"tag": "two"}), Prompt("d")]


def scores(value: list[float], strict: list[float] | None = None, **details: list[float]) -> Any:
    column = np.array(value, dtype=np.float32)
    return SimpleNamespace(
        value=column,
        strict=None if strict is None else np.array(strict, dtype=np.float32),
        details={name: np.array(row, dtype=np.float32) for name, row in details.items()},
        failed=np.isnan(column),
        prompts=PROMPTS,
    )


def test_failed_pictures_are_counted_and_left_out_of_every_mean() -> None:
    metrics = reward_metrics(scores([0.5, 1.0, NAN, 0.0], [0, 1, NAN, 0], objects=[2, 1, NAN, 3]))
    assert metrics["reward/mean"] == pytest.approx(0.5)
    assert metrics["reward/std"] == pytest.approx(np.std([0.5, 1.0, 0.0]))
    assert metrics["reward/failed"] == 0.25
    assert metrics["reward/strict"] == pytest.approx(1 / 3)
    assert metrics["score/objects"] == 2
    assert metrics["reward_by_tag/two"] == 0.5
    assert metrics["reward_by_tag/one"] == 1
    assert metrics["reward_by_tag/all"] == 0
    assert metrics["reward_strict_by_tag/two"] == 0


def test_without_strict_or_details_their_rows_are_absent() -> None:
    metrics = reward_metrics(scores([1.0, 2.0, 3.0, 4.0]))
    assert not any("strict" in name or name.startswith("score/") for name in metrics)


def test_each_scorer_of_several_has_its_own_mean_and_spread() -> None:
    details = {"ocr/value": [0.1, 0.1, NAN, 0.1], "jpeg/value": [1.0, 2.0, NAN, 3.0], "ocr/distance": [1, 2, NAN, 3]}
    metrics = reward_metrics(scores([1.0, 2.0, NAN, 3.0], **details))
    assert metrics["score/ocr/value"] == pytest.approx(0.1)
    assert metrics["score/ocr/std"] == 0  # exactly: a mean of equal numbers may be off by a rounding
    assert metrics["score/jpeg/std"] == pytest.approx(np.std([1, 2, 3]))
    assert "score/ocr/distance_std" not in metrics and "score/distance/std" not in metrics


def test_an_evaluation_has_its_own_names() -> None:
    metrics = reward_metrics(scores([1, 0, 1, 0], [1, 0, 1, 0], objects=[1, 1, 1, 1]), "eval")
    assert {name.split("/")[0] for name in metrics} == {"eval", "eval_by_tag", "eval_strict_by_tag"}
    assert metrics["eval/objects"] == 1


def test_nothing_usable_is_nan_and_not_zero() -> None:
    metrics = reward_metrics(scores([NAN] * 4, [NAN] * 4))
    assert metrics["reward/failed"] == 1
    assert all(math.isnan(metrics[name]) for name in ("reward/mean", "reward/std", "reward/strict"))


def test_tags_keep_their_order() -> None:
    assert list(mean_by_tag(np.arange(4, dtype=np.float32), PROMPTS)) == ["two", "one", "all"]


def test_a_paired_interval_is_over_differences() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 300).astype(np.float32)
    after = before + np.float32(1) + rng.normal(0, 0.5, 300).astype(np.float32)
    mean, low, high = paired_interval(before, after)
    assert mean == pytest.approx(float((after - before).mean()), rel=1e-5)
    half = 1.96 * float((after - before).std()) / math.sqrt(300)  # the normal approximation
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    assert paired_interval(before, after) == (mean, low, high)


def test_incomplete_pairs_are_left_out() -> None:
    before = np.array([0, NAN, 1, 5], dtype=np.float32)
    after = np.array([1, 9, NAN, 6], dtype=np.float32)
    assert paired_interval(before, after) == (1, 1, 1)


def test_pairs_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length: 2 and 3"):
        paired_interval(np.zeros(2, np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="no complete pair"):
        paired_interval(np.array([NAN], np.float32), np.zeros(1, np.float32))


def test_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3, 1, 400).astype(np.float32)
    mean, low, high = interval(values)
    assert mean == pytest.approx(float(values.mean()), rel=1e-6)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    narrow = interval(values, level=0.5)
    assert narrow[2] - narrow[1] < 0.5 * (high - low)
