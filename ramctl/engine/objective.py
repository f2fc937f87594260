"""RAM's regression target and loss (arXiv 2605.10759, Eq. 17 in its practical, lagged form), with the path-cost option.

All targets are constants for the optimiser: every function here runs without gradient except :func:`regression_loss`.
The practical target uses the lagged ("old") velocity in the residual, so the regression is convex in the prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ramctl.engine.path import GaussianPath, broadcast_times


def _widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype, at least float32: bfloat16 would round a large m·A and the difference it multiplies."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


@torch.no_grad()
def ram_target(*, v_ref: Tensor, v_old: Tensor, y: Tensor, scaled_advantage: Tensor) -> Tensor:
    """v_ref + m·A·(Y − v_old): the reward-corrected velocity (Eq. 17 with the lagged velocity in the residual).

    The form is the same for any Gaussian path and any prediction type F = c v + d x_t, with F in the place of v.

    Args:
        v_ref, v_old, y: [N, …]; y is the flow-matching target (ε − x_0 on the linear path).
        scaled_advantage: [N], the reward multiplier times the advantage.

    Returns:
        float32 (or the inputs' wider type) [N, …], detached.
    """
    v_ref, v_old, y = _widened(v_ref, v_old, y)
    return v_ref + broadcast_times(scaled_advantage.to(v_ref.dtype), v_ref) * (y - v_old)


@torch.no_grad()
def path_cost(*, v: Tensor, v_ref: Tensor, path: GaussianPath, t: Tensor) -> Tensor:
    """φ_t = 2‖v − v_ref‖²/g_t² per item, [N]: the running cost ½‖u_t‖² of deviating from the reference.

    On the linear path ((1−t)/t)‖v − v_ref‖². The norm is a sum over dimensions, as in the path law's KL.
    """
    squared = (v - v_ref).double().square().flatten(1).sum(1)
    return 2 * squared / path.diffusion_squared(t.double())


@dataclass(frozen=True)
class Bridge:
    """A point X_s between an endpoint X_0 and X_t, drawn from the forward noising: s < t.

    x_s, x_t, y_s: [N, …]; y_s is the bridge velocity Y^(s) seen from X_s. y_0: [N, …], the ordinary target.
    """

    x_s: Tensor
    x_t: Tensor
    y_s: Tensor
    y_0: Tensor


@torch.no_grad()
def draw_bridge(
    *, path: GaussianPath, x0: Tensor, epsilon_s: Tensor, epsilon_t: Tensor, s: Tensor, t: Tensor
) -> Bridge:
    """X_s = a_s X_0 + b_s ε_1, X_t = α X_s + β ε_2, and the two velocity targets at X_t.

    The joint law of (X_0, X_s, X_t) is that of forward noising, which at the optimum is also the controlled process'
    (Thm 3.1).
    """
    x_s = path.noising(x0, epsilon_s, s)
    alpha, beta = path.transition(broadcast_times(s, x0), broadcast_times(t, x0))
    x_t = alpha * x_s + beta * epsilon_t
    y_0 = path.velocity_target(x0, path.noise_of(x0, x_t, t), t)
    return Bridge(x_s=x_s, x_t=x_t, y_s=path.bridge_velocity(x_s, epsilon_t, s, t), y_0=y_0)


@torch.no_grad()
def path_cost_correction(*, cost_s: Tensor, cost_t: Tensor, span: Tensor, y_s: Tensor, v_t: Tensor) -> Tensor:
    """−span·(φ_s(X_s) − φ_t(X_t))·(Y^(s) − v_t): what basic RAM drops, estimated from one intermediate time.

    The running KL cost enters as a negative reward paid at time s with its own bridge velocity. φ_t(X_t) is a baseline:
    Y^(s) − v_t has conditional mean zero at the canonical velocity, so it changes the variance only and removes the 1/β
    growth as s → t. Averaged over s uniform on an interval of length ``span`` that ends at t, this is the integral of
    the exact fixed point.

    Args:
        cost_s, cost_t, span: [N]. y_s, v_t: [N, …].
    """
    y_s, v_t = _widened(y_s, v_t)
    factor = (span * (cost_s - cost_t)).to(v_t.dtype)
    return -broadcast_times(factor, v_t) * (y_s - v_t)


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over latent dimensions of (v_θ − sg[target])², per item: [N]. No factor ½ (Eq. 17)."""
    return (prediction.float() - target.detach().float()).square().flatten(1).mean(1)
