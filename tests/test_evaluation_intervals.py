"""Macro averages: each kind weighs the same, prompts are drawn within their kind, pairs stay pairs."""

from __future__ import annotations

import numpy as np
import pytest

from ramctl.evaluation_intervals import macro_interval, paired_macro_interval

NAN = float("nan")


def column(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_each_kind_weighs_the_same_and_each_picture_within_it() -> None:
    values = column([1, 1], [1, NAN], [0, 0], [1, 0])
    middle, low, high = macro_interval(values, ["a", "a", "b", "b"])
    assert middle == pytest.approx((1 + 1 / 4) / 2)
    # Kind a is right whatever is drawn; kind b draws two of the prompts with means 0 and 1/2.
    assert (low, high) == (0.5, 0.75)


def test_a_kind_of_failures_is_left_out() -> None:
    assert macro_interval(column([1], [NAN], [NAN]), ["a", "b", "b"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="no finite value"):
        macro_interval(column([NAN]), ["a"])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    tags = ["a"] * 40 + ["b"] * 60
    chance = np.array([0.8] * 40 + [0.3] * 60)[:, None]
    held = 0
    for trial in range(200):
        values = (rng.random((100, 2)) < chance).astype(np.float32)
        _, low, high = macro_interval(values, tags, resamples=400, seed=trial)
        held += low <= 0.55 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_a_pair_is_drawn_together() -> None:
    rng = np.random.default_rng(0)
    before = rng.random((50, 2)).astype(np.float32)
    tags = ["a"] * 20 + ["b"] * 30
    middle, low, high = paired_macro_interval(before, before + np.float32(0.25), tags)
    assert (middle, low, high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)
    reverse = paired_macro_interval(before + np.float32(0.25), before, tags)
    assert reverse == pytest.approx((-0.25, -0.25, -0.25), abs=1e-6)


def test_a_picture_whose_partner_failed_is_left_out() -> None:
    middle, _, _ = paired_macro_interval(column([0], [0], [NAN]), column([1], [NAN], [5]), ["a", "a", "a"])
    assert middle == 1
    with pytest.raises(ValueError, match="differ in shape"):
        paired_macro_interval(column([0]), column([0], [1]), ["a"])
    with pytest.raises(ValueError, match="no finite value"):
        paired_macro_interval(column([NAN]), column([1]), ["a"])
