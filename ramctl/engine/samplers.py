"""Solvers of the probability-flow ODE dx/dσ = v(x, σ) on the linear path x_σ = (1 − σ) x_0 + σ ε, from noise to data.

Pure: a solver sees a velocity function, the noise and a grid, and knows no network and no device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

Sampler = Literal["euler", "dpm2m"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

#: v(x [N, …], σ as a 0-dimensional tensor) → [N, …].
Velocity = Callable[[Tensor, Tensor], Tensor]


def integrate(velocity: Velocity, x1: Tensor, sigmas: Tensor, sampler: Sampler) -> Tensor:
    """Endpoints x_0 from noise.

    Args:
        velocity: the velocity field.
        x1: float32 [N, …].
        sigmas: [steps + 1] on x1's device, falling from at most 1 to exactly 0; one velocity is evaluated per step.
        sampler: ``euler`` (first order; the paper's) or ``dpm2m`` (second order).
    """
    return _SOLVERS[sampler](velocity, x1, sigmas)


def _euler(velocity: Velocity, x1: Tensor, sigmas: Tensor) -> Tensor:
    x = x1
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * velocity(x, sigma)
    return x


def _dpm2m(velocity: Velocity, x1: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, Algorithm 2, on the linear path.

    With λ = log((1 − σ)/σ) and the data prediction D = x − σ v, a step is
    x' = (σ'/σ) x + (α' − α σ'/σ) (D + (h/2h₋)(D − D₋)), where h and h₋ are this and the previous step in λ. The first
    step has no D₋, and at the last one h is infinite: both are of first order, as in diffusers' scheduler.
    """
    x, before, step_before = x1, None, math.inf
    grid = [float(sigma) for sigma in sigmas]
    for index, (sigma, following) in enumerate(itertools.pairwise(grid)):
        data = x - sigma * velocity(x, sigmas[index])
        step = _log_snr(following) - _log_snr(sigma)
        guess = data
        if before is not None and math.isfinite(step) and math.isfinite(step_before):
            guess = data + step / (2 * step_before) * (data - before)
        ratio = following / sigma
        x = ratio * x + ((1 - following) - (1 - sigma) * ratio) * guess
        before, step_before = data, step
    return x


def _log_snr(sigma: float) -> float:
    """log((1 − σ)/σ): −∞ at pure noise, +∞ at data."""
    if sigma <= 0:
        return math.inf
    return -math.inf if sigma >= 1 else math.log((1 - sigma) / sigma)


_SOLVERS: dict[Sampler, Callable[[Velocity, Tensor, Tensor], Tensor]] = {"euler": _euler, "dpm2m": _dpm2m}
