"""Gaussian paths against finite differences, closed forms and the public scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ramctl.engine.path import (
    CosinePath,
    GaussianPath,
    LinearPath,
    Prediction,
    VarianceExplodingPath,
    broadcast_times,
    evenly_shifted_sigmas,
    grid_times,
    power_law_times,
    shifted_sigmas,
)

PATHS = [LinearPath(), CosinePath(), VarianceExplodingPath(3.0)]
paths = pytest.mark.parametrize("path", PATHS, ids=["linear", "cosine", "exploding"])

# SD3's shift-3 Euler grids as the public scheduler formula gives them, to the four digits printed there.
GRID_20 = (
    "1 .9819 .9624 .9414 .9187 .8940 .8672 .8379 .8057 .7702 .7310 .6872 .6382 .5829 .5201 .4479 .3644 .2663 "
    ".1498 .0089 0"
)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def derivative(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    return (function(at + step) - function(at - step)) / (2 * step)


# --- coefficients ---------------------------------------------------------------------------------


@paths
def test_time_derivatives_are_those_of_the_coefficients(path: GaussianPath) -> None:
    t = f64(0.05, 0.3, 0.62, 0.97)
    torch.testing.assert_close(path.a_dot(t), derivative(path.a, t), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(path.b_dot(t), derivative(path.b, t), rtol=1e-8, atol=1e-9)


@paths
def test_paths_start_at_the_data(path: GaussianPath) -> None:
    assert path.a(f64(0.0)).item() == 1
    assert path.b(f64(0.0)).item() == 0


def test_memoryless_paths_end_at_pure_noise() -> None:
    for path in (LinearPath(), CosinePath()):
        assert path.a(f64(1.0)).item() == pytest.approx(0, abs=1e-15)
        assert path.b(f64(1.0)).item() == 1
    assert VarianceExplodingPath().a(f64(1.0)).item() == 1  # the documented exception


def test_linear_path_by_hand() -> None:
    path, t = LinearPath(), f64(0.25)
    x0, epsilon = f64(2.0), f64(-4.0)
    assert path.noising(x0, epsilon, t).item() == 0.5
    assert path.velocity_target(x0, epsilon, t).item() == -6.0
    assert path.diffusion_squared(t).item() == pytest.approx(2 / 3, rel=1e-15)
    assert path.drift_rate(t).item() == pytest.approx(-4 / 3, rel=1e-15)


def test_diffusion_of_each_path_in_closed_form() -> None:
    t = f64(0.1, 0.5, 0.9)
    torch.testing.assert_close(LinearPath().diffusion_squared(t), 2 * t / (1 - t))
    torch.testing.assert_close(CosinePath().diffusion_squared(t), math.pi * torch.tan(math.pi / 2 * t))
    torch.testing.assert_close(VarianceExplodingPath(3.0).diffusion_squared(t), 18 * t)  # d(b²)/dt where a = 1


@paths
def test_forward_diffusion_has_the_noising_law(path: GaussianPath) -> None:
    # The moments of dX = f dt + g dW started at x_0 obey m' = (ȧ/a) m and V' = 2(ȧ/a) V + g²; they must be
    # a x_0 and b².
    t = f64(0.2, 0.55, 0.8)
    variance_rate = 2 * path.drift_rate(t) * path.b(t) ** 2 + path.diffusion_squared(t)
    torch.testing.assert_close(variance_rate, derivative(lambda u: path.b(u) ** 2, t), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(path.drift_rate(t) * path.a(t), path.a_dot(t))


@paths
def test_one_time_per_item_broadcasts_over_latents(path: GaussianPath) -> None:
    x0, epsilon, t = normal(3, 2, 4, 5), normal(3, 2, 4, 5, seed=1), f64(0.2, 0.5, 0.8)
    x_t, y = path.noising(x0, epsilon, t), path.velocity_target(x0, epsilon, t)
    assert x_t.shape == y.shape == x0.shape
    for i in range(3):
        torch.testing.assert_close(x_t[i], path.noising(x0[i], epsilon[i], t[i]))
        torch.testing.assert_close(y[i], path.velocity_target(x0[i], epsilon[i], t[i]))
    torch.testing.assert_close(path.noise_of(x0, x_t, t), epsilon, rtol=1e-12, atol=1e-12)


def test_scalar_times_pass_through() -> None:
    t = torch.tensor(0.3)
    assert broadcast_times(t, torch.zeros(4, 2)) is t
    assert broadcast_times(torch.zeros(4), torch.zeros(4, 2, 3)).shape == (4, 1, 1)


# --- scores ---------------------------------------------------------------------------------------


@paths
@pytest.mark.parametrize(("t", "x"), [(0.3, 0.4), (0.6, -0.5), (0.85, 1.3)])
def test_score_is_the_gradient_of_the_log_marginal(mixture: Any, path: GaussianPath, t: float, x: float) -> None:
    law, at = mixture(path), f64(x)
    expected = derivative(lambda z: law.log_marginal(z, t), at)
    got = path.score(law.velocity(at, t), at, f64(t))
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_linear_score_in_closed_form_up_to_pure_noise() -> None:
    x, v, t = f64(0.7, 0.7), f64(-0.4, -0.4), f64(0.3, 1.0)
    torch.testing.assert_close(LinearPath().score(v, x, t), -(x + (1 - t) * v) / t)


@paths
@pytest.mark.parametrize("x0", [-1.1, 0.2, 1.7])
def test_bridge_score_matches_finite_differences(mixture: Any, path: GaussianPath, x0: float) -> None:
    # log p(x_0 | x_t) = log N(x_t; a x_0, b²) − log p_t(x_t) + terms without x_t.
    law, t, at = mixture(path), 0.35, f64(0.4)
    a, b = path.a(f64(t)), path.b(f64(t))
    expected = derivative(lambda z: -0.5 * ((z - a * x0) / b) ** 2 - law.log_marginal(z, t), at)
    target = path.velocity_target(f64(x0), path.noise_of(f64(x0), at, f64(t)), f64(t))
    got = path.bridge_score(law.velocity(at, t), target, f64(t))
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_linear_bridge_score_by_hand() -> None:
    # ((1 − t)/t)(v − Y) at t = 1/4.
    assert LinearPath().bridge_score(f64(2.0), f64(0.5), f64(0.25)).item() == pytest.approx(4.5, rel=1e-14)


def test_bridge_score_error_of_a_wrong_velocity() -> None:
    # A velocity v that is not the canonical m costs exactly ((1 − t)/t)(v − m), whatever the endpoint.
    t, canonical, wrong = f64(0.2), f64(0.3), f64(0.8)
    for endpoint_target in (f64(-2.0), f64(1.0)):
        error = LinearPath().bridge_score(wrong, endpoint_target, t) - LinearPath().bridge_score(
            canonical, endpoint_target, t
        )
        assert error.item() == pytest.approx(4 * 0.5, rel=1e-13)


# --- transitions and bridge velocities ------------------------------------------------------------


@paths
def test_transitions_compose_to_the_noising(path: GaussianPath) -> None:
    s, t = f64(0.2, 0.5, 0.7), f64(0.4, 0.9, 0.71)
    alpha, beta = path.transition(s, t)
    torch.testing.assert_close(alpha * path.a(s), path.a(t))
    torch.testing.assert_close(alpha**2 * path.b(s) ** 2 + beta**2, path.b(t) ** 2)


@paths
def test_transition_from_the_data_is_the_noising(path: GaussianPath) -> None:
    t = f64(0.1, 0.6)
    alpha, beta = path.transition(torch.zeros_like(t), t)
    torch.testing.assert_close(alpha, path.a(t))
    torch.testing.assert_close(beta, path.b(t))


@paths
def test_bridge_velocity_from_the_data_is_the_ordinary_target(path: GaussianPath) -> None:
    x0, epsilon, t = normal(4, 3), normal(4, 3, seed=1), f64(0.1, 0.4, 0.7, 0.95)
    got = path.bridge_velocity(x0, epsilon, torch.zeros_like(t), t)
    torch.testing.assert_close(got, path.velocity_target(x0, epsilon, t), rtol=1e-12, atol=1e-12)


def test_linear_bridge_velocity_in_its_textbook_form() -> None:
    path, s, t, x_s, epsilon = LinearPath(), f64(0.2), f64(0.6), f64(1.5), f64(-0.7)
    alpha, beta = path.transition(s, t)
    assert alpha.item() == pytest.approx(0.5, rel=1e-15)
    assert beta.item() == pytest.approx(math.sqrt(0.36 - 0.25 * 0.04), rel=1e-15)
    x_t = alpha * x_s + beta * epsilon
    expected = -x_t / (1 - t) + t / (1 - t) * epsilon / beta
    assert path.bridge_velocity(x_s, epsilon, s, t).item() == pytest.approx(expected.item(), rel=1e-13)


@paths
@pytest.mark.parametrize("x_s", [-0.8, 0.5, 1.9])
def test_bridge_velocity_is_the_score_of_the_backward_kernel(mixture: Any, path: GaussianPath, x_s: float) -> None:
    # ½ g_t² ∇_{x_t} log p_{s|t}(x_s | x_t) = v_t − Y^(s), with p_{s|t} ∝ p_{t|s}(x_t | x_s)/p_t(x_t).
    law, s, t, at = mixture(path), f64(0.25), 0.6, f64(0.4)
    alpha, beta = path.transition(s, f64(t))
    gradient = derivative(lambda z: -0.5 * ((z - alpha * x_s) / beta) ** 2 - law.log_marginal(z, t), at)
    y_s = path.bridge_velocity(f64(x_s), (at - alpha * x_s) / beta, s, f64(t))
    expected = path.diffusion_squared(f64(t)) / 2 * gradient
    assert (law.velocity(at, t) - y_s).item() == pytest.approx(expected.item(), rel=1e-6)


def test_bridge_velocity_is_finite_at_pure_noise_and_where_the_times_meet() -> None:
    for path in (LinearPath(), CosinePath()):
        at_noise = path.bridge_velocity(f64(0.3), f64(1.2), f64(0.5), f64(1.0))
        before = path.bridge_velocity(f64(0.3), f64(1.2), f64(0.5), f64(1 - 1e-9))
        assert at_noise.item() == pytest.approx(before.item(), rel=1e-6)
    single = torch.tensor([0.3])  # float32, where the two squares cancel
    assert torch.isfinite(LinearPath().bridge_velocity(single, torch.ones(1), single, single)).all()


# --- prediction types -----------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_each_prediction_type_is_the_named_quantity(path: GaussianPath, prediction: Prediction) -> None:
    x0, epsilon, t = normal(5, seed=2), normal(5, seed=3), f64(0.07, 0.3, 0.5, 0.8, 0.93)
    x_t, y = path.noising(x0, epsilon, t), path.velocity_target(x0, epsilon, t)
    named = {
        "velocity": y,
        "epsilon": epsilon,
        "sample": x0,
        "vp_velocity": path.a(t) * epsilon - path.b(t) * x0,
    }[prediction]
    c, d = path.prediction_coefficients(prediction, t)
    torch.testing.assert_close(c * y + d * x_t, named, rtol=1e-12, atol=1e-12)


@paths
@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_conversion_there_and_back(path: GaussianPath, prediction: Prediction) -> None:
    velocity, x_t, t = (
        normal(6, 2, 3),
        normal(6, 2, 3, seed=1),
        torch.linspace(0.05, 0.95, 6, dtype=torch.float64),
    )
    c, d = (broadcast_times(k, x_t) for k in path.prediction_coefficients(prediction, t))
    back = path.to_velocity(c * velocity + d * x_t, prediction, x_t, t)
    torch.testing.assert_close(back, velocity, rtol=1e-12, atol=1e-11)


def test_vp_coefficients_in_closed_form() -> None:
    # On the cosine path Δ = a ḃ − ȧ b = π/2, and v-prediction is v/Δ without an x_t term.
    path, t = CosinePath(), f64(0.1, 0.5, 0.9)
    c, d = path.prediction_coefficients("vp_velocity", t)
    torch.testing.assert_close(c, torch.full_like(t, 2 / math.pi))
    torch.testing.assert_close(d, torch.zeros_like(t), atol=1e-15, rtol=0)
    torch.testing.assert_close(path.prediction_coefficients("epsilon", t)[0], 2 / math.pi * path.a(t))


# --- time density and grids -----------------------------------------------------------------------


def stratified(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_paper_density_has_its_moments() -> None:
    t = power_law_times(stratified(100_000), 1.0)
    assert t.mean().item() == pytest.approx(2 / 3, abs=1e-8)
    assert t.square().mean().item() == pytest.approx(1 / 2, abs=1e-8)
    torch.testing.assert_close(t, stratified(100_000).sqrt())


def test_power_zero_is_uniform() -> None:
    u = stratified(101)
    assert torch.equal(power_law_times(u, 0.0), u)


def test_truncated_density_keeps_its_range_and_shape() -> None:
    t = power_law_times(torch.cat([f64(0.0), stratified(100_000)]), 1.0, low=0.2, high=0.9)
    assert t.min().item() == pytest.approx(0.2, abs=1e-15)
    assert 0.899 < t.max().item() < 0.9
    # ∫ t·t dt / ∫ t dt on [.2, .9]
    assert t[1:].mean().item() == pytest.approx((0.9**3 - 0.2**3) / 3 / ((0.9**2 - 0.2**2) / 2), abs=1e-8)


def test_twenty_step_grid() -> None:
    expected = f64(*(float(v) for v in GRID_20.split()))
    grid = shifted_sigmas(20, 3.0)
    assert grid.dtype == torch.float64
    torch.testing.assert_close(grid, expected, atol=5.1e-5, rtol=0)
    assert (grid[0].item(), grid[-1].item()) == (1.0, 0.0)


def test_forty_step_grid() -> None:
    grid = shifted_sigmas(40, 3.0)
    assert grid.shape == (41,)
    torch.testing.assert_close(grid[:3], f64(1, 0.9913, 0.9824), atol=5.1e-5, rtol=0)
    torch.testing.assert_close(grid[-5:], f64(0.2062, 0.1465, 0.0810, 0.0089, 0), atol=5.1e-5, rtol=0)
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (10, 1.0), (20, 3.0), (40, 3.0), (28, 6.5)])
def test_grid_equals_the_public_scheduler(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(shifted_sigmas(steps, shift), scheduler.sigmas.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_grid_times_have_the_weights_asked_for(power: float) -> None:
    grid = torch.tensor([1.0, 0.25, 0.5])
    drawn = grid_times(stratified(90_000), grid, power)
    weights = torch.sort(grid).values.double() ** power
    shares = torch.stack([(drawn == value).double().mean() for value in (0.25, 0.5, 1.0)])
    torch.testing.assert_close(shares, weights / weights.sum(), atol=2e-5, rtol=0)


def test_grid_times_keep_their_bounds_and_meet_the_ends() -> None:
    grid = shifted_sigmas(20, 3.0)
    drawn = grid_times(torch.tensor([0.0, 0.5, 1 - 1e-15], dtype=torch.float64), grid, 1.0, low=0.1, high=0.99)
    assert drawn.tolist()[0] == pytest.approx(0.1498, abs=1e-4)
    assert drawn.tolist()[2] == pytest.approx(0.9819, abs=1e-4)
    assert grid_times(torch.zeros(1, dtype=torch.float64), grid, 1.0).item() > 0  # weight 0 at time 0: never drawn
    with pytest.raises(ValueError, match=r"between 0\.001 and 0\.005"):
        grid_times(stratified(1), grid, 1.0, low=0.001, high=0.005)


def test_mean_time_depends_on_which_grid_carries_the_weight() -> None:
    # Continuous 2t gives 2/3 (above); weights ∝ σ on the sampler's 20 steps .790; on a fine shifted grid
    # .781.
    coarse, fine = shifted_sigmas(20, 3.0), shifted_sigmas(20_000, 3.0, train_timesteps=10**9)
    assert (coarse.square().sum() / coarse.sum()).item() == pytest.approx(0.790, abs=5e-4)
    assert (fine.square().sum() / fine.sum()).item() == pytest.approx(0.781, abs=5e-4)
    u = stratified(100_000)
    assert grid_times(u, coarse, 1.0).mean().item() == pytest.approx(0.790, abs=5e-4)
    assert grid_times(u, evenly_shifted_sigmas(1000, 3.0), 1.0).mean().item() == pytest.approx(0.781, abs=5e-4)
