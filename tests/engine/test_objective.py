"""RAM's target and loss, the path cost, and what they have in common with neighbouring methods."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ramctl.engine.advantage import group_advantages
from ramctl.engine.objective import draw_bridge, path_cost, path_cost_correction, ram_target, regression_loss
from ramctl.engine.path import CosinePath, GaussianPath, LinearPath, VarianceExplodingPath, power_law_times

PATHS = [LinearPath(), CosinePath(), VarianceExplodingPath(3.0)]
paths = pytest.mark.parametrize("path", PATHS, ids=["linear", "cosine", "exploding"])


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Affine(torch.nn.Module):
    """A small velocity network in float64: its reference copy is what it starts from."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * normal(3, 3, seed=seed))
        self.bias = torch.nn.Parameter(0.3 * normal(3, seed=seed + 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) + self.bias


def gradient(loss: Tensor, model: torch.nn.Module, *, keep: bool = False) -> Tensor:
    slopes = torch.autograd.grad(loss, list(model.parameters()), retain_graph=keep)
    return torch.cat([slope.flatten() for slope in slopes])


# --- the target -----------------------------------------------------------------------------------


def test_target_by_hand() -> None:
    got = ram_target(
        v_ref=f64(1, 2)[:, None],
        v_old=f64(3, 5)[:, None],
        y=f64(4, -1)[:, None],
        scaled_advantage=f64(10, -0.5),
    )
    assert got.flatten().tolist() == [11.0, 5.0]


def test_one_advantage_per_item_whatever_the_latent_shape() -> None:
    v_ref, v_old, y = (normal(4, 2, 3, 3, seed=k) for k in range(3))
    advantage = f64(1.5, 0, -2, 30)
    got = ram_target(v_ref=v_ref, v_old=v_old, y=y, scaled_advantage=advantage)
    for i in range(4):
        torch.testing.assert_close(got[i], v_ref[i] + advantage[i] * (y[i] - v_old[i]))


def test_no_advantage_means_the_reference() -> None:
    v_ref, v_old, y = (normal(4, 5, seed=k) for k in range(3))
    assert torch.equal(ram_target(v_ref=v_ref, v_old=v_old, y=y, scaled_advantage=torch.zeros(4)), v_ref)


def test_half_precision_velocities_keep_a_single_precision_target() -> None:
    v_ref, v_old = (normal(64, 8, seed=k).bfloat16() for k in range(2))
    y, advantage = normal(64, 8, seed=2).float(), 100 * normal(64, seed=3)
    for data in (y, y.bfloat16()):
        got = ram_target(v_ref=v_ref, v_old=v_old, y=data, scaled_advantage=advantage)
        exact = v_ref.double() + advantage[:, None] * (data.double() - v_old.double())
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
    wide = ram_target(v_ref=v_ref, v_old=v_old, y=y.double(), scaled_advantage=advantage)
    assert wide.dtype == torch.float64


def test_no_gradient_passes_through_the_target() -> None:
    # With the trained network itself in the residual the gradient is still that of a constant target.
    model, x, y, advantage = Affine(0), normal(6, 3, seed=5), normal(6, 3, seed=6), normal(6, seed=7)
    v_ref = Affine(0)(x).detach()
    prediction = model(x)
    target = ram_target(v_ref=v_ref, v_old=prediction, y=y, scaled_advantage=advantage)
    assert not target.requires_grad
    got = gradient(regression_loss(prediction, target).sum(), model)
    expected = gradient((2 / 3 * (prediction.detach() - target) * model(x)).sum(), model)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_loss_detaches_a_target_that_carries_gradient() -> None:
    model, x = Affine(0), normal(6, 3, seed=5)
    target = 2 * model(x)
    got = gradient(regression_loss(model(x), target).sum(), model)
    expected = gradient(regression_loss(model(x), target.detach()).sum(), model)
    assert torch.equal(got, expected)


def test_loss_is_the_mean_square_per_item_without_a_half() -> None:
    prediction, target = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    got = regression_loss(prediction, target)
    assert got.shape == (2,)
    for i in range(2):
        assert got[i].item() == pytest.approx((prediction[i] - target[i]).square().mean().item(), rel=1e-6)


def test_loss_of_half_precision_is_summed_in_single() -> None:
    prediction = torch.full((1, 70_000), 1.0, dtype=torch.bfloat16)
    got = regression_loss(prediction, torch.zeros(1, 70_000, dtype=torch.bfloat16))
    assert (got.dtype, got.item()) == (torch.float32, 1.0)


# --- zero reward and initial loss -----------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.37])
def test_zero_or_constant_reward_gives_zero_loss_and_gradient_at_the_start(value: float) -> None:
    model, x0, epsilon = Affine(3), normal(24, 3), normal(24, 3, seed=1)
    t = power_law_times(torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1.0)
    groups = torch.arange(2).repeat_interleave(12)
    advantage = group_advantages(torch.full((24,), value, dtype=torch.float64), groups).value
    x_t, y = LinearPath().noising(x0, epsilon, t), LinearPath().velocity_target(x0, epsilon, t)
    v = model(x_t).detach()
    loss = regression_loss(model(x_t), ram_target(v_ref=v, v_old=v, y=y, scaled_advantage=1000 * advantage)).mean()
    assert loss.item() == 0.0
    assert gradient(loss, model).abs().max().item() == 0.0


def test_away_from_the_start_zero_reward_pulls_back_to_the_reference() -> None:
    model, x, reference = Affine(3), normal(24, 3), Affine(4)
    v_ref = reference(x).detach()
    target = ram_target(v_ref=v_ref, v_old=model(x), y=normal(24, 3, seed=2), scaled_advantage=torch.zeros(24))
    before = regression_loss(model(x), target).mean()
    step = torch.autograd.grad(before, list(model.parameters()))
    with torch.no_grad():
        for parameter, slope in zip(model.parameters(), step, strict=True):
            parameter.add_(slope, alpha=-0.1)
    assert regression_loss(model(x), target).mean() < before


def test_initial_loss_is_m_squared_times_the_weighted_flow_matching_loss() -> None:
    m = 100.0
    v_ref, y, advantage = normal(9, 2, 3), normal(9, 2, 3, seed=1), normal(9, seed=2)
    got = regression_loss(v_ref, ram_target(v_ref=v_ref, v_old=v_ref, y=y, scaled_advantage=m * advantage))
    expected = m**2 * advantage**2 * (y - v_ref).square().flatten(1).mean(1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_initial_loss_of_a_gaussian_is_thousands() -> None:
    # For N(0, 1) data the flow-matching loss at t is 1/((1−t)² + t²); under p(t) = 2t its mean is π/2. With
    # E[A²] = 1 independent of the data the loss at m = 100 is 10⁴ π/2. Bound: four standard errors.
    count = 40_000
    x0, epsilon, sign = normal(count, 1), normal(count, 1, seed=1), normal(count, seed=2).sign()
    t = power_law_times((torch.arange(count, dtype=torch.float64) + 0.5) / count, 1.0)
    x_t, y = LinearPath().noising(x0, epsilon, t), LinearPath().velocity_target(x0, epsilon, t)
    v_ref = x_t * ((2 * t - 1) / ((1 - t) ** 2 + t**2))[:, None]
    loss = regression_loss(v_ref, ram_target(v_ref=v_ref, v_old=v_ref, y=y, scaled_advantage=100 * sign))
    assert loss.mean().item() == pytest.approx(1e4 * math.pi / 2, abs=4 * loss.std().item() / count**0.5)


# --- path cost ------------------------------------------------------------------------------------


def test_linear_path_cost_by_hand_sums_over_dimensions() -> None:
    v, v_ref = torch.zeros(2, 2, 2, dtype=torch.float64), torch.ones(2, 2, 2, dtype=torch.float64)
    v_ref[1] *= 3
    got = path_cost(v=v, v_ref=v_ref, path=LinearPath(), t=f64(0.2, 0.5))
    torch.testing.assert_close(got, f64(4 * 4, 36))  # ((1 − t)/t)‖·‖²


@paths
def test_path_cost_is_half_the_squared_control(path: GaussianPath) -> None:
    # σ u = 2 (v − v_ref), so ½‖u‖² = 2‖v − v_ref‖²/g².
    v, v_ref, t = normal(5, 3), normal(5, 3, seed=1), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    control = 2 * (v - v_ref) / path.diffusion_squared(t).sqrt()[:, None]
    torch.testing.assert_close(path_cost(v=v, v_ref=v_ref, path=path, t=t), 0.5 * control.square().sum(1))


def test_path_cost_of_half_precision_velocities_is_double() -> None:
    v = torch.ones(2, 4, dtype=torch.bfloat16)
    got = path_cost(v=v, v_ref=torch.zeros_like(v), path=LinearPath(), t=torch.tensor([0.5, 1.0]))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, f64(4, 0))


@paths
def test_bridge_joins_the_endpoint_and_its_noised_point(path: GaussianPath) -> None:
    x0, epsilon_s, epsilon_t = (normal(4, 2, 3, seed=k) for k in range(3))
    s, t = f64(0.1, 0.2, 0.5, 0.7), f64(0.3, 0.9, 0.6, 0.95)
    bridge = draw_bridge(path=path, x0=x0, epsilon_s=epsilon_s, epsilon_t=epsilon_t, s=s, t=t)
    torch.testing.assert_close(bridge.x_s, path.noising(x0, epsilon_s, s))
    # The two noises together are one standard normal that carries x_0 straight to x_t.
    alpha, beta = (k[:, None, None] for k in path.transition(s, t))
    b_s, b_t = path.b(s)[:, None, None], path.b(t)[:, None, None]
    epsilon = (alpha * b_s * epsilon_s + beta * epsilon_t) / b_t
    torch.testing.assert_close((alpha * b_s / b_t) ** 2 + (beta / b_t) ** 2, torch.ones(4, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(bridge.x_t, path.noising(x0, epsilon, t))
    torch.testing.assert_close(bridge.y_0, path.velocity_target(x0, epsilon, t))
    torch.testing.assert_close(bridge.y_s, path.bridge_velocity(bridge.x_s, epsilon_t, s, t))


def test_correction_by_hand() -> None:
    got = path_cost_correction(
        cost_s=f64(5, 1), cost_t=f64(2, 3), span=f64(0.5, 0.1), y_s=f64(4, 1)[:, None], v_t=f64(1, 0)[:, None]
    )
    torch.testing.assert_close(got, f64(-4.5, 0.2)[:, None])


def test_correction_carries_no_gradient_and_keeps_single_precision() -> None:
    v_t = normal(8, 3).bfloat16().requires_grad_()
    y_s, cost_s, cost_t = (
        normal(8, 3, seed=1).bfloat16(),
        1 + normal(8, seed=2).abs(),
        normal(8, seed=3).abs(),
    )
    got = path_cost_correction(cost_s=cost_s, cost_t=cost_t, span=torch.full((8,), 0.7), y_s=y_s, v_t=v_t)
    assert (got.dtype, got.requires_grad) == (torch.float32, False)
    exact = -(0.7 * (cost_s - cost_t))[:, None] * (y_s.double() - v_t.detach().double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


# --- neighbouring methods -------------------------------------------------------------------------


def test_gradient_equals_that_of_advantage_weighted_matching() -> None:
    # With v_θ in the residual: ∇‖v − sg[v_ref + ηA(Y − v)]‖² = ∇(‖v − v_ref‖² + ηA‖v − Y‖²).
    model, x, y, advantage = Affine(0), normal(40, 3, seed=5), normal(40, 3, seed=6), 1.7 * normal(40, seed=7)
    v_ref = Affine(8)(x).detach()
    v = model(x)
    ram = 3 * regression_loss(v, ram_target(v_ref=v_ref, v_old=v, y=y, scaled_advantage=advantage)).mean()
    weighted = ((v - v_ref).square().sum(1) + advantage * (v - y).square().sum(1)).mean()
    got, expected = gradient(ram, model, keep=True), gradient(weighted, model)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.3, 0.9, 1.0])
def test_negative_aware_finetuning_has_the_same_residual(reward: float) -> None:
    # DiffusionNFT per sample: r‖v⁺ − Y‖² + (1 − r)‖v⁻ − Y‖² with v^± = (1 ∓ β) v_old ± β v; its minimiser
    # is RAM's target with v_old also in the place of the anchor and (2r − 1)/β for m·A.
    beta, v_old, y = 0.4, 0.6, 1.45
    v = torch.linspace(-6, 6, 240_001, dtype=torch.float64)
    positive, negative = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
    loss = reward * (positive - y) ** 2 + (1 - reward) * (negative - y) ** 2
    got = ram_target(
        v_ref=f64(v_old), v_old=f64(v_old), y=f64(y), scaled_advantage=torch.tensor((2 * reward - 1) / beta)
    )
    assert got.item() == pytest.approx(v[loss.argmin()].item(), abs=5e-5)


def test_fixed_point_of_one_sample_is_the_anchored_velocity_regression() -> None:
    # The minimiser of ½[r‖v − Y‖² + ‖v − v_ref‖²] goes r/(r + 1) of the way to Y and is where the target
    # returns itself.
    reward, v_ref, y = 0.6, f64(-0.4), f64(1.2)
    v = v_ref + reward / (reward + 1) * (y - v_ref)
    torch.testing.assert_close(ram_target(v_ref=v_ref, v_old=v, y=y, scaled_advantage=f64(reward)), v)


@pytest.mark.parametrize(("scaled", "contracts"), [(0.9, True), (-0.9, True), (1.1, False), (-1.1, False)])
def test_full_solves_contract_only_below_one(scaled: float, contracts: bool) -> None:
    # v_{k+1} = v_ref + m E[A Y] − m E[A] v_k: the error is multiplied by −m E[A] each time.
    v_ref, y = f64(0.2), f64(1.0)
    fixed = (v_ref + scaled * y) / (1 + scaled)
    v = v_ref.clone()
    for _ in range(200):
        v = ram_target(v_ref=v_ref, v_old=v, y=y, scaled_advantage=f64(scaled))
    error = (v - fixed).abs().item() / (v_ref - fixed).abs().item()
    assert error == pytest.approx(abs(scaled) ** 200, rel=1e-6)
    assert (error < 1) == contracts


# --- constant shift of the reward -----------------------------------------------------------------


def cubature() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_0, ε, t, weight) that integrate N(0, I_2) × N(0, I_2) × U(0, 1): exact for the quadratics below."""
    points, weights = np.polynomial.hermite_e.hermegauss(3)
    nodes, node_weights = np.polynomial.legendre.leggauss(24)
    grid = torch.tensor(list(itertools.product(points, repeat=4)), dtype=torch.float64)
    weight = torch.tensor([math.prod(w) for w in itertools.product(weights / weights.sum(), repeat=4)])
    times = torch.from_numpy((nodes + 1) / 2)
    joint = (weight.double()[:, None] * torch.from_numpy(node_weights / 2)).flatten()
    return (
        grid[:, :2].repeat_interleave(len(times), 0),
        grid[:, 2:].repeat_interleave(len(times), 0),
        times.repeat(len(grid)),
        joint,
    )


def shifted_gradient(parameter: Tensor, family: str, constant: float, omega: float) -> Tensor:
    """∂/∂parameter of the expected loss for reward 0 + constant on N(0, I_2); in two dimensions the mean is ½‖·‖²."""
    x0, epsilon, t, weight = cubature()
    x_t, y = LinearPath().noising(x0, epsilon, t), LinearPath().velocity_target(x0, epsilon, t)
    rate = ((2 * t - 1) / ((1 - t) ** 2 + t**2))[:, None]
    rotated = torch.stack([-x_t[:, 1], x_t[:, 0]], 1)
    v_ref = rate * x_t
    if family == "rotation":
        v = v_ref + parameter * rotated
    else:
        v = (rate + parameter * (parameter - 1)) * x_t + omega * parameter * rotated
    target = ram_target(v_ref=v_ref, v_old=v, y=y, scaled_advantage=torch.full_like(t, constant))
    loss = (weight * regression_loss(v, target)).sum()
    return torch.autograd.grad(loss, parameter)[0]


@pytest.mark.parametrize(("constant", "expected"), [(0, 0.533333), (1, 1.066667), (-1, 0.0), (-2, -0.533333)])
def test_constant_reward_acts_on_a_field_with_a_rotation(constant: float, expected: float) -> None:
    # v = S + ω J x leaves N(0, I) alone, yet the gradient in ω is (4/3)(1 + C) ω: why advantages are
    # centred.
    omega = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert shifted_gradient(omega, "rotation", constant, 0.0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("constant", "expected"), [(0, 0.653333), (1, 1.306667)])
def test_constant_reward_moves_a_restricted_family_off_its_optimum(constant: float, expected: float) -> None:
    # v = [b + θ(θ − 1)] x + ω θ J x is optimal at θ = 1; the gradient there is (4/3)(1 + C) ω² with ω = .7.
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    slope = shifted_gradient(theta, "restricted", constant, 0.7).item()
    assert slope == pytest.approx(expected, abs=1e-6)
    if constant == 0:
        moved = 1 - 0.1 * slope
        assert moved == pytest.approx(0.9346667, abs=1e-7)
        variance = math.exp(-2 * moved * (moved - 1))  # of the endpoints; KL(N(0, I_2) ‖ endpoints) was 0
        assert 1 / variance - 1 + math.log(variance) == pytest.approx(0.00716328, abs=1e-7)
