"""The learning-rate schedule."""

from __future__ import annotations

import pytest

from ramctl.config import OptimizerSection
from ramctl.engine.trainer import learning_rate


def test_constant_by_default() -> None:
    assert [learning_rate(OptimizerSection(lr=3e-4), step) for step in (0, 7, 500)] == [3e-4] * 3


def test_warm_up_is_linear_and_reaches_the_rate() -> None:
    optimizer = OptimizerSection(lr=1e-3, warmup_steps=4)
    assert [learning_rate(optimizer, step) for step in range(5)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


def test_it_halves_in_its_half_life() -> None:
    optimizer = OptimizerSection(lr=1e-3, lr_half_life=40.0)
    assert [learning_rate(optimizer, step) for step in (0, 40, 80)] == pytest.approx([1e-3, 5e-4, 2.5e-4])
