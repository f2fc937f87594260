"""One-dimensional end laws whose posteriors given X_t are known by quadrature, for checks against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ramctl.engine.path import GaussianPath, LinearPath

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Posterior:
    """Points x_0 with the weights of p(x_0 | X_t = x), and the noise and velocity target of each: all [M, Z]."""

    x0: Tensor
    epsilon: Tensor
    y: Tensor
    weight: Tensor

    def mean(self, values: Tensor) -> Tensor:
        return (self.weight * values).sum(1)


@dataclass(frozen=True)
class TiltedLaw:
    """The end law ∝ p_ref(x_0) exp(tilt · r(x_0)), noised along a path.

    Given X_t = x the integral runs over an even grid of x_0: nine noise widths around x/a where the kernel is
    narrow, [−14, 14] where it is wider than the laws used here. The integrand is smooth and decays as a Gaussian,
    so the trapezoid rule is exact to rounding at every t in (0, 1).
    """

    path: GaussianPath
    log_density: Function
    reward: Function
    nodes: int = 257

    def given(self, x: Tensor, t: float | Tensor, tilt: float = 0.0) -> Posterior:
        """Posterior at the points x [M], all at time t or each at its own t [M]."""
        t = torch.as_tensor(t, dtype=torch.float64)
        t = t[:, None] if t.ndim else t
        a, b = self.path.a(t), self.path.b(t)
        grid = torch.linspace(-1, 1, self.nodes, dtype=torch.float64)
        x0 = torch.where(b < a, x[:, None] / a + 9 * b / a * grid, 14 * grid)
        epsilon = (x[:, None] - a * x0) / b
        log_weight = -0.5 * epsilon**2 + self.log_density(x0) + tilt * self.reward(x0)
        y = self.path.a_dot(t) * x0 + self.path.b_dot(t) * epsilon
        return Posterior(x0, epsilon, y, torch.softmax(log_weight, 1))

    def velocity(self, x: Tensor, t: float | Tensor, tilt: float = 0.0) -> Tensor:
        """The canonical velocity E[Y | X_t = x] of the tilted law, [M]."""
        posterior = self.given(x, t, tilt)
        return posterior.mean(posterior.y)

    def log_marginal(self, x: Tensor, t: float | Tensor, tilt: float = 0.0) -> Tensor:
        """log p_t(x) of the tilted law up to a constant that depends on t and tilt only, [M]."""
        posterior = self.given(x, t)
        log_joint = -0.5 * posterior.epsilon**2 + self.log_density(posterior.x0)
        return torch.logsumexp(log_joint + tilt * self.reward(posterior.x0), 1)


def _mixture_log_density(x: Tensor) -> Tensor:
    """0.4 N(−1.2, 0.5²) + 0.6 N(0.8, 0.7²), normalised."""
    left = math.log(0.4 / 0.5) - 0.5 * ((x + 1.2) / 0.5) ** 2
    right = math.log(0.6 / 0.7) - 0.5 * ((x - 0.8) / 0.7) ** 2
    return torch.logaddexp(left, right) - 0.5 * math.log(2 * math.pi)


def _mixture_reward(x: Tensor) -> Tensor:
    return torch.sin(1.5 * x) + 0.3 * x


@pytest.fixture
def mixture() -> Callable[..., TiltedLaw]:
    """The two-mode reference with reward sin(1.5 x) + 0.3 x, on a path (the linear one unless told)."""

    def build(path: GaussianPath | None = None) -> TiltedLaw:
        return TiltedLaw(path or LinearPath(), _mixture_log_density, _mixture_reward)

    return build


@pytest.fixture
def gaussian() -> Callable[..., TiltedLaw]:
    """A Gaussian reference N(mean, std²) with any reward."""

    def build(
        reward: Function = torch.zeros_like,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        path: GaussianPath | None = None,
    ) -> TiltedLaw:
        return TiltedLaw(path or LinearPath(), lambda x: -0.5 * ((x - mean) / std) ** 2, reward)

    return build
