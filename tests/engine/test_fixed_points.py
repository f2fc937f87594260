"""The fixed points of the RAM target in closed form and by quadrature, in one dimension and float64.

Every right-hand side is computed by the engine's own functions and averaged over an exact posterior; the literals are
independent closed forms or were computed once by another implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ramctl.engine.objective import draw_bridge, path_cost, path_cost_correction, ram_target
from ramctl.engine.path import CosinePath, GaussianPath, LinearPath, Prediction, VarianceExplodingPath

PATHS = [LinearPath(), CosinePath(), VarianceExplodingPath(3.0)]
paths = pytest.mark.parametrize("path", PATHS, ids=["linear", "cosine", "exploding"])

# W(κ)/κ, RAM's endpoint variance, and 1/(1 + κ), the exact one, for reward −κx²/2 on N(0, 1).
QUADRATIC = [
    (0.1, 0.912765, 0.909091),
    (0.5, 0.703467, 0.666667),
    (1.0, 0.567143, 0.5),
    (2.0, 0.426303, 0.333333),
    (5.0, 0.265345, 0.166667),
]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quadratic(kappa: float) -> Callable[[Tensor], Tensor]:
    return lambda x: -kappa / 2 * x**2


def legendre(low: float, high: float, count: int) -> list[tuple[float, float]]:
    nodes, weights = np.polynomial.legendre.leggauss(count)
    half = (high - low) / 2
    return [(low + half * (node + 1), half * weight) for node, weight in zip(nodes, weights, strict=True)]


def ram_side(
    law: Any, x: Tensor, t: float, tilt: float = 1.0, *, scale: float = 1.0, v: Tensor | None = None
) -> Tensor:
    """E[v_ref + scale·r(X_0)(Y − v) | X_t = x] over the law tilted that far, [M]; v is canonical unless given."""
    posterior = law.given(x, t, tilt)
    v_ref, v = law.velocity(x, t, 0.0), law.velocity(x, t, tilt) if v is None else v
    columns = posterior.y.T  # items first: one row per posterior point, one column per x
    targets = [
        ram_target(
            v_ref=v_ref[i].expand(len(columns), 1),
            v_old=v[i].expand(len(columns), 1),
            y=columns[:, i, None],
            scaled_advantage=scale * law.reward(posterior.x0[i]),
        )[:, 0]
        for i in range(len(x))
    ]
    mean: Tensor = posterior.mean(torch.stack(targets))
    return mean


def correction_side(law: Any, x: float, t: float, nodes: int = 16) -> float:
    """−∫_0^t E[φ_s(X_s)(Y^(s) − v_t) | X_t = x] ds at the optimum, X_s drawn from the backward kernel p_{s|t}."""
    at, v_t = f64(x), law.velocity(f64(x), t, 1.0)
    total = 0.0
    for s, width in legendre(0.0, t, nodes):
        alpha, beta = law.path.transition(f64(s), f64(t))
        epsilon = torch.linspace(-9, 9, 257, dtype=torch.float64)
        x_s = (at - beta * epsilon) / alpha
        weight = torch.softmax(-0.5 * epsilon**2 + law.log_marginal(x_s, s, 1.0), 0)
        cost = path_cost(
            v=law.velocity(x_s, s, 1.0)[:, None], v_ref=law.velocity(x_s, s)[:, None], path=law.path, t=f64(s)
        )
        y_s = law.path.bridge_velocity(x_s, epsilon, f64(s), f64(t))
        term = path_cost_correction(
            cost_s=cost,
            cost_t=torch.zeros_like(cost),
            span=torch.full_like(cost, width),
            y_s=y_s[:, None],
            v_t=v_t.expand(len(cost), 1),
        )
        total += float(weight @ term[:, 0])
    return total


# --- the optimal shift and the covariance along the tilt (Lemma 4.2) ------------------------------


def covariance(law: Any, x: float, t: float, tilt: float) -> float:
    """E_λ[r(Y − v^λ) | X_t = x] by the engine's target."""
    at = f64(x)
    return float(ram_side(law, at, t, tilt) - law.velocity(at, t))


def optimal_shift(law: Any, x: float, t: float) -> float:
    return float(law.velocity(f64(x), t, 1.0) - law.velocity(f64(x), t))


@pytest.mark.parametrize(
    ("path", "t", "x", "expected"),
    [
        (LinearPath(), 0.3, 0.4, -0.4303893),
        (CosinePath(), 0.3, 0.4, -0.6710869),
        (VarianceExplodingPath(3.0), 0.6, -0.5, -1.3851140),
    ],
    ids=["linear", "cosine", "exploding"],
)
def test_three_forms_of_the_optimal_shift_agree(
    mixture: Any, path: GaussianPath, t: float, x: float, expected: float
) -> None:
    law = mixture(path)
    assert optimal_shift(law, x, t) == pytest.approx(expected, abs=5.1e-8)
    # −½ g² ∇ log E_ref[e^r | x_t]
    step, at = 1e-4, f64(x)

    def log_h(z: Tensor) -> Tensor:
        value: Tensor = law.log_marginal(z, t, 1.0) - law.log_marginal(z, t)
        return value

    slope = (log_h(at + step) - log_h(at - step)) / (2 * step)
    by_value = -0.5 * path.diffusion_squared(f64(t)) * slope
    assert by_value.item() == pytest.approx(expected, abs=1e-7)
    # ∫_0^1 Cov_λ(r, Y | x_t) dλ
    integral = sum(width * covariance(law, x, t, tilt) for tilt, width in legendre(0, 1, 8))
    assert integral == pytest.approx(expected, abs=1e-7)


@paths
def test_the_target_differentiates_the_velocity_along_the_tilt(mixture: Any, path: GaussianPath) -> None:
    law, x, t, tilt, step = mixture(path), f64(-0.7), 0.45, 0.6, 1e-4
    slope = (law.velocity(x, t, tilt + step) - law.velocity(x, t, tilt - step)) / (2 * step)
    assert covariance(law, -0.7, t, tilt) == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize(("scale", "expected"), [(0.4, 0.477), (0.2, 0.526), (0.1, 0.544), (0.05, 0.551)])
def test_the_bias_is_second_order_in_the_reward(mixture: Any, scale: float, expected: float) -> None:
    # Shift asked for by RAM at the true optimum of reward η r, less the optimal shift, over η².
    law, x, t = mixture(), f64(0.4), 0.5
    optimum = law.velocity(x, t, scale)
    residual = ram_side(law, x, t, scale, scale=scale) - optimum
    assert residual.item() / scale**2 == pytest.approx(expected, abs=5.1e-4)


def test_quadrature_rules_for_the_tilt(mixture: Any) -> None:
    # RAM is the right-end rule; averaging it with the reference's own covariance leaves a third-order
    # error.
    law, x, t, scale = mixture(), f64(0.4), 0.5, 0.4
    exact = law.velocity(x, t, scale) - law.velocity(x, t)

    def rule(at: float) -> float:
        return float(ram_side(law, x, t, at * scale, scale=scale) - law.velocity(x, t) - exact)

    assert rule(1.0) == pytest.approx(0.0764, abs=5.1e-5)
    assert rule(0.0) == pytest.approx(-0.0837, abs=5.1e-5)
    assert (rule(0.0) + rule(1.0)) / 2 == pytest.approx(-0.00365, abs=5.1e-6)
    assert rule(0.5) == pytest.approx(0.00187, abs=5.1e-6)


@paths
@pytest.mark.parametrize("prediction", [p for p in get_args(Prediction) if p != "velocity"])
def test_targets_of_other_predictions_are_the_mapped_velocity_target(
    mixture: Any, path: GaussianPath, prediction: Prediction
) -> None:
    # F_ref + r(F_sample − F) needs no conversion: the same function, with the named quantity in the place
    # of Y.
    law, t, x = mixture(path), f64(0.35), f64(0.6)
    c, d = path.prediction_coefficients(prediction, t)
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)
    x_t = x.expand(9)
    epsilon = path.noise_of(x0, x_t, t.expand(9))
    named = {"epsilon": epsilon, "sample": x0, "vp_velocity": path.a(t) * epsilon - path.b(t) * x0}[prediction]
    v_ref, v = law.velocity(x_t, 0.35), law.velocity(x_t, 0.35, 1.0)
    direct = ram_target(v_ref=c * v_ref + d * x_t, v_old=c * v + d * x_t, y=named, scaled_advantage=law.reward(x0))
    y = path.velocity_target(x0, epsilon, t.expand(9))
    mapped = ram_target(v_ref=v_ref, v_old=v, y=y, scaled_advantage=law.reward(x0))
    torch.testing.assert_close(direct, c * mapped + d * x_t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.to_velocity(direct, prediction, x_t, t.expand(9)), mapped, rtol=1e-12, atol=1e-12)


# --- linear reward: the fixed point is exact ------------------------------------------------------


@pytest.mark.parametrize(("t", "x"), [(0.2, -0.5), (0.5, 1.1), (0.9, 2.3)])
def test_linear_reward_on_a_gaussian_is_solved_exactly(gaussian: Any, t: float, x: float) -> None:
    # N(.7, 1.3²), r = x/2: v* = v_ref − a s² t/((1 − t)² s² + t²), the same shift at every tilt.
    law = gaussian(lambda z: 0.5 * z, mean=0.7, std=1.3)
    variance = 1.69
    denominator = (1 - t) ** 2 * variance + t**2
    v_ref = (x - (0.7 + (1 - t) * variance * (x - (1 - t) * 0.7) / denominator)) / t
    assert law.velocity(f64(x), t).item() == pytest.approx(v_ref, abs=1e-12)
    optimum = v_ref - 0.5 * variance * t / denominator
    for tilt in (0.0, 0.5, 1.0):
        assert ram_side(law, f64(x), t, tilt).item() == pytest.approx(optimum, abs=1e-12)


def test_linear_reward_shifts_the_endpoints_and_keeps_their_spread(gaussian: Any) -> None:
    # Runge-Kutta over the engine's own right-hand side carries N(0, 1) to N(1.545, 1.3²).
    law, steps = gaussian(lambda z: 0.5 * z, mean=0.7, std=1.3), 40
    start = f64(-1.5, 0.0, 1.5)
    x, h = start, (1 - 1e-6) / steps

    def field(at: Tensor, t: float) -> Tensor:
        return ram_side(law, at, t)

    for k in range(steps):
        t = 1 - 1e-6 - k * h  # the posterior's grid needs a > 0 at the start
        k1 = field(x, t)
        k2 = field(x - h / 2 * k1, t - h / 2)
        k3 = field(x - h / 2 * k2, t - h / 2)
        k4 = field(x - h * k3, max(t - h, 1e-7))
        x = x - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    torch.testing.assert_close(x, 1.545 + 1.3 * start, rtol=0, atol=2e-4)


# --- quadratic reward: the known bias -------------------------------------------------------------


def test_quadratic_reward_by_hand(gaussian: Any) -> None:
    # κ = 1, t = ½, x = 1: v_ref = 0, the optimum 2/3, RAM asks for 4/9 there.
    law, x = gaussian(quadratic(1.0)), f64(1.0)
    assert law.velocity(x, 0.5).item() == pytest.approx(0, abs=1e-12)
    assert law.velocity(x, 0.5, 1.0).item() == pytest.approx(2 / 3, abs=1e-12)
    assert ram_side(law, x, 0.5).item() == pytest.approx(4 / 9, abs=1e-12)


def endpoint_variance(reference: float, kappa: float, model: float, gaussian: Any) -> float:
    """Endpoint variance of the ODE with RAM's right-hand side: data from N(0, model), base N(0, reference)."""
    law = gaussian(quadratic(kappa), std=math.sqrt(model))
    exponent = 0.0
    for t, width in legendre(0.0, 1.0, 24):
        slope_ref = (t - (1 - t) * reference) / ((1 - t) ** 2 * reference + t**2)
        # The law below is the model itself, so its velocity stands in both places; only the anchor differs.
        shift = ram_side(law, f64(0.8), t, 0.0) - law.velocity(f64(0.8), t)
        exponent += width * (slope_ref + shift.item() / 0.8)
    return math.exp(-2 * exponent)


@pytest.mark.parametrize(("kappa", "ram", "exact"), QUADRATIC)
def test_quadratic_reward_settles_at_the_lambert_variance(
    gaussian: Any, kappa: float, ram: float, exact: float
) -> None:
    assert exact == pytest.approx(1 / (1 + kappa), abs=5.1e-7)
    assert ram * math.exp(kappa * ram) == pytest.approx(1, abs=6e-6)  # w = W(κ)/κ ⇔ w = e^{−κw}
    # Starting from endpoints of variance w, the field that RAM asks for produces variance w again; from the
    # exact optimum's variance it produces more.
    assert endpoint_variance(1.0, kappa, ram, gaussian) == pytest.approx(ram, abs=2e-6)
    assert endpoint_variance(1.0, kappa, exact, gaussian) > ram > exact + 0.003


@pytest.mark.parametrize("t", [0.15, 0.5, 0.85])
def test_slope_of_the_quadratic_target_in_closed_form(gaussian: Any, t: float) -> None:
    kappa, w = 2.0, 0.426303
    law = gaussian(quadratic(kappa), std=math.sqrt(w))
    x = f64(-1.1, 0.4, 1.6)
    shift = ram_side(law, x, t, 0.0) - law.velocity(x, t)
    denominator = (1 - t) ** 2 * w + t**2
    torch.testing.assert_close(shift, kappa * (1 - t) * t * w**2 / denominator**2 * x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [(1, 0.56714), (2, 0.53765), (4, 0.52011), (8, 0.51042), (16, 0.50531), (32, 0.50268), (64, 0.50135)],
)
def test_anchoring_anew_in_stages_approaches_the_optimum(gaussian: Any, stages: int, expected: float) -> None:
    # Reward r/n per stage with the last stage as reference: w ← fixed point of w = w_last e^{−(κ/n) w}.
    kappa, w = 1.0 / stages, 1.0
    for _ in range(stages):
        last = w
        for _ in range(60):
            w = 0.5 * (w + last * math.exp(-kappa * w))
    assert w == pytest.approx(expected, abs=5.1e-6)
    assert endpoint_variance(last, kappa, w, gaussian) == pytest.approx(w, abs=1e-7)


# --- the path cost restores exactness -------------------------------------------------------------

CORRECTED = [
    ("gaussian", 0.5, 1.0, 0.666667, 0.444444, 0.222222),
    ("mixture", 0.5, 0.4, -1.036646, -0.720711, -0.315935),
    ("mixture", 0.3, -0.6, 0.509694, 0.287833, 0.221859),
    ("mixture", 0.75, 1.0, -0.011334, 0.345454, -0.356788),
]
corrected = pytest.mark.parametrize(("name", "t", "x", "optimum", "basic", "correction"), CORRECTED)


@pytest.fixture
def law(name: str, gaussian: Any, mixture: Any) -> Any:
    return gaussian(quadratic(1.0)) if name == "gaussian" else mixture()


@corrected
def test_basic_target_and_path_cost_add_up_to_the_optimum(
    law: Any, t: float, x: float, optimum: float, basic: float, correction: float
) -> None:
    # 2.1e-6: the third row's literals were rounded from a coarser quadrature (its sum is printed as
    # .509692).
    assert law.velocity(f64(x), t, 1.0).item() == pytest.approx(optimum, abs=5.1e-7)
    got_basic, got_correction = ram_side(law, f64(x), t).item(), correction_side(law, x, t)
    assert got_basic == pytest.approx(basic, abs=5.1e-7)
    assert got_correction == pytest.approx(correction, abs=2.1e-6)
    assert got_basic + got_correction == pytest.approx(law.velocity(f64(x), t, 1.0).item(), abs=1e-7)


@pytest.mark.parametrize("path", PATHS[1:], ids=["cosine", "exploding"])
def test_the_corrected_fixed_point_is_exact_on_every_path(mixture: Any, path: GaussianPath) -> None:
    law, t, x = mixture(path), 0.45, 0.4
    optimum, basic = law.velocity(f64(x), t, 1.0).item(), ram_side(law, f64(x), t).item()
    assert abs(optimum - basic) > 0.1
    assert basic + correction_side(law, x, t) == pytest.approx(optimum, abs=1e-6)


def bridges_at(law: Any, x: float, t: float, count: int, seed: int) -> tuple[Any, Tensor, Tensor]:
    """(bridge, x_0, s): draws of (X_0, X_s) given X_t = x under the optimal law, s ~ U(0, t), made by draw_bridge.

    X_0 comes from the exact posterior and X_s from the Gaussian between X_0 and x; draw_bridge is then given the noises
    that lead there.
    """
    generator = torch.Generator().manual_seed(seed)
    posterior, path = law.given(f64(x), t, 1.0), law.path
    chosen = torch.multinomial(posterior.weight[0], count, replacement=True, generator=generator)
    x0 = posterior.x0[0, chosen]
    s = t * torch.rand(count, dtype=torch.float64, generator=generator)
    time = torch.full_like(s, t)
    alpha, beta = path.transition(s, time)
    precision = 1 / path.b(s) ** 2 + (alpha / beta) ** 2
    mean = (path.a(s) * x0 / path.b(s) ** 2 + alpha * x / beta**2) / precision
    x_s = mean + torch.randn(count, dtype=torch.float64, generator=generator) / precision.sqrt()
    bridge = draw_bridge(
        path=path,
        x0=x0,
        epsilon_s=(x_s - path.a(s) * x0) / path.b(s),
        epsilon_t=(x - alpha * x_s) / beta,
        s=s,
        t=time,
    )
    torch.testing.assert_close(bridge.x_t, time.new_full((count,), x), rtol=1e-9, atol=1e-9)
    return bridge, x0, s


def estimates(law: Any, x: float, t: float, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Per draw: the basic target, the correction with its baseline, and the correction without."""
    bridge, x0, s = bridges_at(law, x, t, count, seed)
    v_ref, v = law.velocity(f64(x), t).expand(count, 1), law.velocity(f64(x), t, 1.0).expand(count, 1)
    basic = ram_target(v_ref=v_ref, v_old=v, y=bridge.y_0[:, None], scaled_advantage=law.reward(x0))
    cost_s = path_cost(
        v=law.velocity(bridge.x_s, s, 1.0)[:, None],
        v_ref=law.velocity(bridge.x_s, s)[:, None],
        path=law.path,
        t=s,
    )
    cost_t = path_cost(v=v, v_ref=v_ref, path=law.path, t=torch.full_like(s, t))
    span = torch.full_like(s, t)

    def correction(baseline: Tensor) -> Tensor:
        return path_cost_correction(cost_s=cost_s, cost_t=baseline, span=span, y_s=bridge.y_s[:, None], v_t=v)[:, 0]

    return basic[:, 0], correction(cost_t), correction(torch.zeros_like(cost_t))


@corrected
def test_sampled_target_and_path_cost_have_the_optimum_as_their_mean(
    law: Any, t: float, x: float, optimum: float, basic: float, correction: float
) -> None:
    # Four standard errors each, of 8,000 draws.
    count = 8_000
    got_basic, got_correction, _ = estimates(law, x, t, count)
    for got, expected in (
        (got_basic, basic),
        (got_correction, correction),
        (got_basic + got_correction, optimum),
    ):
        assert got.mean().item() == pytest.approx(expected, abs=4 * got.std().item() / count**0.5)
    assert abs(got_basic.mean().item() - optimum) > 4 * got_basic.std().item() / count**0.5


class ClosedForm:
    """N(0, 1) tilted by −x²/2 to N(0, 1/2), linear path: the same interface, velocities written out (much faster)."""

    def __init__(self, law: Any) -> None:
        self.path, self.reward, self.given = law.path, law.reward, law.given

    def velocity(self, x: Tensor, t: float | Tensor, tilt: float = 0.0) -> Tensor:
        w = 1 / (1 + tilt)
        return x * (t - (1 - t) * w) / ((1 - t) ** 2 * w + t**2)


def test_the_baseline_leaves_the_mean_and_halves_the_spread(gaussian: Any) -> None:
    # κ = 1, t = ½, x = 1: std .469 with φ_t(X_t) subtracted, .971 without. Kurtosis 58 makes the first's standard error
    # .0045 here. The second's variance diverges as the logarithm of the number of draws (1/β² as s → t), so its std is
    # no constant: the median over blocks of 10,000 is about .88, over blocks of 200,000 about .97.
    law, count = gaussian(quadratic(1.0)), 150_000
    closed, x = ClosedForm(law), f64(-0.7, 1.2)
    torch.testing.assert_close(closed.velocity(x, 0.3, 1.0), law.velocity(x, 0.3, 1.0))
    _, with_baseline, without = estimates(closed, 1.0, 0.5, count)
    assert with_baseline.std().item() == pytest.approx(0.469, abs=0.018)
    assert without.reshape(15, -1).std(1).median().item() == pytest.approx(0.88, abs=0.06)
    assert without.std() > 1.9 * with_baseline.std()
    difference = with_baseline - without
    assert difference.mean().item() == pytest.approx(0, abs=4 * difference.std().item() / count**0.5)
    assert with_baseline.mean().item() == pytest.approx(2 / 9, abs=4 * 0.469 / count**0.5)


@pytest.mark.parametrize("path", PATHS[:2], ids=["linear", "cosine"])
def test_the_running_cost_integrates_to_the_divergence_of_the_end_laws(gaussian: Any, path: GaussianPath) -> None:
    # Memoryless: ∫ E[φ_t] dt at the optimum = KL(p*_0 ‖ p_ref) = ½(w − 1 − log w) with w = 1/(1 + κ).
    kappa = 1.0
    law, w = gaussian(quadratic(kappa), path=path), 0.5
    total = 0.0
    for t, width in legendre(0.0, 1.0, 32):
        variance = path.a(f64(t)) ** 2 * w + path.b(f64(t)) ** 2
        x = f64(1.0)  # both velocities are linear in x, so E[φ] is φ(1) times the variance of X_t
        v, v_ref = law.velocity(x, t, 1.0)[:, None], law.velocity(x, t)[:, None]
        total += width * (path_cost(v=v, v_ref=v_ref, path=path, t=f64(t)) * variance).item()
    assert total == pytest.approx(0.5 * (w - 1 - math.log(w)), abs=1e-7)


# --- conditioning ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "expected"), [(0.1, 0.994), (0.3, 0.919), (0.5, 0.707), (0.7, 0.394), (0.9, 0.110)])
def test_the_mean_advantage_given_a_noised_point_fades_towards_noise(gaussian: Any, t: float, expected: float) -> None:
    # Standardised linear advantage A = X_0 on N(0, 1): E[A | x_t] is linear, so its rms is its slope times
    # the std of X_t.
    law = gaussian()
    posterior = law.given(f64(1.0), t)
    rms = posterior.mean(posterior.x0).item() * math.hypot(1 - t, t)
    assert rms == pytest.approx(expected, abs=5.1e-4)
