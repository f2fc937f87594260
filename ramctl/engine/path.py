"""Gaussian probability paths: noising, regression targets, bridge velocities, time densities, time grids.

Pure functions of tensors. Time t = 0 is data, t = 1 is noise; sampling runs from 1 to 0. A path is
``x_t = a(t) x_0 + b(t) ε`` with ε ~ N(0, I). References are to arXiv 2605.10759 (equation numbers) and its general-path
form: the velocity target is Y = ȧ x_0 + ḃ ε, the forward SDE behind the path has drift f = (ȧ/a) x and squared
diffusion g² = 2 b² (ḃ/b − ȧ/a). Times broadcast: a tensor ``t`` of shape [N] meets data of shape [N, …].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["velocity", "epsilon", "sample", "vp_velocity"]


def broadcast_times(t: Tensor, like: Tensor) -> Tensor:
    """``t`` [N] with trailing dimensions of size one, so that it multiplies ``like`` [N, …]; scalars pass."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


class GaussianPath(ABC):
    """``x_t = a(t) x_0 + b(t) ε``; subclasses give a, b and their time derivatives."""

    @abstractmethod
    def a(self, t: Tensor) -> Tensor:
        """Coefficient of the data."""

    @abstractmethod
    def b(self, t: Tensor) -> Tensor:
        """Coefficient of the noise."""

    @abstractmethod
    def a_dot(self, t: Tensor) -> Tensor:
        """da/dt."""

    @abstractmethod
    def b_dot(self, t: Tensor) -> Tensor:
        """db/dt."""

    def noising(self, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """x_t = a x_0 + b ε (Eq. 1). Shapes: x0, epsilon [N, …]; t [N] or scalar."""
        t = broadcast_times(t, x0)
        return self.a(t) * x0 + self.b(t) * epsilon

    def velocity_target(self, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
        """Y = ȧ x_0 + ḃ ε (Eq. 4; ε − x_0 on the linear path), the flow-matching regression target."""
        t = broadcast_times(t, x0)
        return self.a_dot(t) * x0 + self.b_dot(t) * epsilon

    def noise_of(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """ε = (x_t − a x_0) / b, the noise that carries x_0 to x_t."""
        t = broadcast_times(t, x0)
        return (x_t - self.a(t) * x0) / self.b(t)

    def drift_rate(self, t: Tensor) -> Tensor:
        """ȧ/a, the forward SDE's drift divided by x."""
        return self.a_dot(t) / self.a(t)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g² = 2 b² (ḃ/b − ȧ/a) = 2 b (ḃ a − ȧ b)/a; 2t/(1−t) on the linear path."""
        return 2 * self.b(t) * (self.b_dot(t) * self.a(t) - self.a_dot(t) * self.b(t)) / self.a(t)

    def score(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x_t) = (2/g²)(f(x_t) − v); on the linear path −(x + (1−t) v)/t."""
        t = broadcast_times(t, x_t)
        # With a multiplied through: g² and f are both infinite where a = 0, their quotient is not.
        a, b, a_dot = self.a(t), self.b(t), self.a_dot(t)
        return (a_dot * x_t - a * velocity) / (b * (a * self.b_dot(t) - a_dot * b))

    def bridge_score(self, velocity: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """∇_{x_t} log p_{0|t}(x_0 | x_t) = (2/g²)(v − Y) (Prop. 4.1, Eq. 15), exact for the canonical velocity v."""
        return 2 / self.diffusion_squared(broadcast_times(t, target)) * (velocity - target)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(α, β) of X_t | X_s ~ N(α X_s, β² I) for s < t: α = a_t/a_s, β² = b_t² − α² b_s²."""
        alpha = self.a(t) / self.a(s)
        # Clamped because rounding can make the difference of squares negative when s meets t.
        beta = (self.b(t) ** 2 - alpha**2 * self.b(s) ** 2).clamp_min(1e-12).sqrt()
        return alpha, beta

    def bridge_velocity(self, x_s: Tensor, epsilon: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Y^(s) = f_t(X_t) + ½ g_t² ε'/β, the velocity target at X_t = α X_s + β ε' seen from X_s.

        At s = 0 this is the ordinary target Y. Written as (ȧ_t/a_s) X_s + (b_t ḃ_t − ȧ_t a_t b_s²/a_s²) ε'/β, which is
        the same number without the cancelling infinities of f_t and g_t² as t → 1.
        """
        s, t = broadcast_times(s, x_s), broadcast_times(t, x_s)
        _, beta = self.transition(s, t)
        noise_rate = self.b(t) * self.b_dot(t) - self.a_dot(t) * self.a(t) * (self.b(s) / self.a(s)) ** 2
        return self.a_dot(t) / self.a(s) * x_s + noise_rate * epsilon / beta

    def prediction_coefficients(self, prediction: Prediction, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c, d) such that a network of that type predicts F = c v + d x_t.

        ``epsilon``: the noise; ``sample``: x_0; ``vp_velocity``: a ε − b x_0 (v-prediction on a VP path).
        """
        a, b, a_dot, b_dot = self.a(t), self.b(t), self.a_dot(t), self.b_dot(t)
        delta = a * b_dot - a_dot * b
        match prediction:
            case "velocity":
                return torch.ones_like(a), torch.zeros_like(a)
            case "epsilon":
                return a / delta, -a_dot / delta
            case "sample":
                return -b / delta, b_dot / delta
            case "vp_velocity":
                return (a**2 + b**2) / delta, -(a_dot * a + b_dot * b) / delta

    def to_velocity(self, output: Tensor, prediction: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity v = (F − d x_t)/c that a network output F of another prediction type stands for."""
        c, d = self.prediction_coefficients(prediction, broadcast_times(t, x_t))
        return (output - d * x_t) / c


@dataclass(frozen=True)
class LinearPath(GaussianPath):
    """a = 1 − t, b = t: rectified flow, Stable Diffusion 3 (Eq. 1)."""

    def a(self, t: Tensor) -> Tensor:
        """1 − t."""
        return 1 - t

    def b(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def a_dot(self, t: Tensor) -> Tensor:
        """−1."""
        return -torch.ones_like(t)

    def b_dot(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class CosinePath(GaussianPath):
    """a = cos(πt/2), b = sin(πt/2): variance preserving."""

    def a(self, t: Tensor) -> Tensor:
        """cos(πt/2)."""
        return torch.cos(math.pi / 2 * t)

    def b(self, t: Tensor) -> Tensor:
        """sin(πt/2)."""
        return torch.sin(math.pi / 2 * t)

    def a_dot(self, t: Tensor) -> Tensor:
        """−(π/2) sin(πt/2)."""
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def b_dot(self, t: Tensor) -> Tensor:
        """(π/2) cos(πt/2)."""
        return math.pi / 2 * torch.cos(math.pi / 2 * t)


@dataclass(frozen=True)
class VarianceExplodingPath(GaussianPath):
    """a = 1, b = scale · t. Not memoryless: X_1 keeps some of X_0, so the start law is biased unless scale is large."""

    scale: float = 3.0

    def a(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def b(self, t: Tensor) -> Tensor:
        """scale · t."""
        return self.scale * t

    def a_dot(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def b_dot(self, t: Tensor) -> Tensor:
        """The scale."""
        return torch.full_like(t, self.scale)


def power_law_times(uniform: Tensor, power: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Times with density ∝ t^power on [low, high], by inversion of ``uniform`` in [0, 1).

    power = 1 is the paper's p(t) = 2t (t = √u): E[t] = 2/3, E[t²] = 1/2. power = 0 is uniform.
    """
    exponent = power + 1
    span = high**exponent - low**exponent
    times: Tensor = (low**exponent + uniform * span) ** (1 / exponent)
    return times


def grid_times(uniform: Tensor, grid: Tensor, power: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Times drawn from ``grid`` with probabilities ∝ t^power, by inversion of ``uniform`` in [0, 1).

    Args:
        uniform: float64 [N].
        grid: the possible times, float [T] in any order.
        power: as in :func:`power_law_times`.
        low, high: times outside are left out.

    Returns:
        float64 [N]. With power 1 their mean is 0.790 on the 20 steps of the Euler sampler at shift 3, 0.781 on 1,000
        training times shifted by 3, where the continuous density has 0.667.

    Raises:
        ValueError: no time of the grid lies within the bounds.
    """
    times = torch.sort(grid.double()).values
    times = times[(times >= low) & (times <= high)]
    if not len(times):
        raise ValueError(f"no time of the grid lies between {low} and {high}")
    weights = times**power
    cumulative = weights.cumsum(0) / weights.sum()
    chosen: Tensor = times[torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(times) - 1)]
    return chosen


def shifted_sigmas(steps: int, shift: float, train_timesteps: int = 1000) -> Tensor:
    """The flow-matching Euler grid, float64 [steps + 1], from 1 down to exactly 0.

    ``steps`` times evenly spaced between the largest and the smallest training time, both already shifted, then shifted
    again by σ → shift·σ/(1 + (shift − 1)·σ); this double shift is diffusers' FlowMatchEulerDiscreteScheduler
    (its 20-step grid at shift 3 starts 1, .9819, .9624 and ends .1498, .0089, 0).
    """

    def shifted(sigma: Tensor) -> Tensor:
        return shift * sigma / (1 + (shift - 1) * sigma)

    smallest = shifted(torch.tensor(1.0 / train_timesteps, dtype=torch.float64))
    grid = torch.linspace(1.0, float(smallest), steps, dtype=torch.float64)
    return torch.cat([shifted(grid), torch.zeros(1, dtype=torch.float64)])


def evenly_shifted_sigmas(steps: int, shift: float) -> Tensor:
    """Times evenly spaced from 1 to 0, then shifted; float64 [steps + 1].

    The grid for second-order solvers: that of :func:`shifted_sigmas` ends with a last tiny time (.0089), a leap in
    log(signal/noise) over which they would extrapolate.
    """
    even = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)
