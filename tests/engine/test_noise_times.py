"""Which noise times the items of a step get."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from ramctl.engine import trainer as module
from ramctl.engine.trainer import Trainer
from ramctl.errors import ConfigError
from tests.engine.steps import Build, Call, build_fixture, pristine_fixture, spy_fixture  # noqa: F401


def test_stratified_times_lie_one_in_each_quantile(build: Build, spy: Callable[[Trainer], list[Call]]) -> None:
    trainer = build(("noisings_per_image", "4"), ("stratify_times", "true"), ("min_time", "0"))
    calls = spy(trainer)
    trainer.step()
    (sweep, *_) = calls
    times = np.array(sweep.t).reshape(-1, 4) ** 2  # p(t) ∝ t: t² is uniform
    assert (np.floor(times * 4) == [0, 1, 2, 3]).all()
    assert len(np.unique(times * 4 % 1)) == times.size


def test_times_come_from_the_grid_asked_for(build: Build, spy: Callable[[Trainer], list[Call]]) -> None:
    drawn = {}
    for name in ("continuous", "shifted", "sampler"):
        trainer = build(("time_grid", name), ("noisings_per_image", "8"))
        calls = spy(trainer)
        trainer.step()
        drawn[name] = np.array(calls[0].t)
    u = drawn["continuous"] ** 2
    steps = trainer.config.rollout.sampling_steps
    allowed = trainer.backbone.sigmas(steps).numpy()[:-1]
    assert set(drawn["sampler"].tolist()) <= set(allowed.tolist())
    even, shift = np.arange(1, 1001) / 1000, trainer.backbone._shift
    fine = shift * even / (1 + (shift - 1) * even)
    assert np.abs(drawn["shifted"][:, None] - fine).min(axis=1).max() < 1e-6
    # The same uniform numbers in the same order, through other distributions.
    for name in ("shifted", "sampler"):
        assert (np.diff(drawn[name][np.argsort(u)]) >= 0).all()
        assert not np.array_equal(drawn[name], drawn["continuous"])


def test_a_grid_without_a_time_between_the_bounds_is_refused_at_once(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"time_grid = sampler.*min_time \(0\.2\).*max_time \(0\.21\)"):
        build(("time_grid", "sampler"), ("min_time", "0.2"), ("max_time", "0.21"))


def test_intermediate_points_stay_short_of_pure_noise(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the sampler's grid many times are exactly 1, and an intermediate time rounds to 1 now and then."""
    trainer = build(("time_grid", "sampler"), ("path_cost", "true"), ("time_power", "9"))
    monkeypatch.setattr(
        module, "keyed_uniform", lambda seeds: torch.full((len(seeds),), 1 - 1e-12, dtype=torch.float64)
    )
    items = trainer._noise(torch.randn(2, *trainer.backbone.latent_shape), [0, 1], [0, 0])
    assert items.s is not None and items.y_s is not None
    assert (items.t == 1).all()
    assert (items.s < 1).all()
    assert torch.isfinite(items.x_t).all() and torch.isfinite(items.y_s).all()


def test_each_update_sees_all_strata_of_the_times(build: Build, spy: Callable[[Trainer], list[Call]]) -> None:
    trainer = build(
        ("noisings_per_image", "8"), ("updates_per_step", "2"), ("stratify_times", "true"), ("time_power", "0")
    )
    calls = spy(trainer)
    trainer.step()
    trained = [call for call in calls if call.with_gradient]
    half = len(trained) // 2
    for update in (trained[:half], trained[half:]):
        times = np.array([t for call in update for t in call.t])
        assert times.min() < 0.25 and times.max() > 0.75
