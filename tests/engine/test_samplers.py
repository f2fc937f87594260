"""Solvers against a case with a closed form, against each other's order, and against diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ramctl.engine.path import evenly_shifted_sigmas, shifted_sigmas
from ramctl.engine.samplers import SAMPLERS, Sampler, integrate

SPREAD = 0.5


def gaussian_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[ε − x_0 | x_σ = x] for data N(1, SPREAD²)."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    data = 1 + (1 - sigma) * SPREAD**2 / variance * (x - (1 - sigma))
    noise = sigma / variance * (x - (1 - sigma))
    return noise - data


def error(sampler: Sampler, steps: int) -> float:
    """Largest distance from the exact flow x_0 = 1 + SPREAD x_1, on the sampler's own grid."""
    x1 = torch.linspace(-2, 2, 9, dtype=torch.float64)
    grid = shifted_sigmas if sampler == "euler" else evenly_shifted_sigmas
    return float((integrate(gaussian_velocity, x1, grid(steps, 3.0), sampler) - (1 + SPREAD * x1)).abs().max())


def test_euler_is_of_first_order_and_dpm2m_of_second() -> None:
    euler = error("euler", 20) / error("euler", 40)
    second = error("dpm2m", 20) / error("dpm2m", 40)
    assert 1.7 < euler < 2.4
    assert second > 3.0


def test_fourteen_second_order_steps_beat_twenty_of_euler() -> None:
    assert error("dpm2m", 14) < error("euler", 20)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_velocity_per_step_and_a_straight_flow_is_exact(sampler: Sampler) -> None:
    calls = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma))
        return torch.full_like(x, 3.0)  # ε − x_0 = 3 everywhere: x_0 = x_1 − 3

    x1 = torch.randn(4, generator=torch.Generator().manual_seed(0))
    sigmas = shifted_sigmas(7, 3.0).float()
    assert torch.allclose(integrate(velocity, x1, sigmas, sampler), x1 - 3, atol=1e-5)
    assert calls == [float(s) for s in sigmas[:-1]]


def test_dpm2m_is_the_scheduler_of_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        flow_shift=3.0,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(12)
    x1 = torch.randn(6, generator=torch.Generator().manual_seed(1))
    x = x1
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        x = scheduler.step(gaussian_velocity(x, sigma), t, x, return_dict=False)[0]
    ours = integrate(gaussian_velocity, x1, scheduler.sigmas, "dpm2m")
    assert torch.allclose(ours, x, atol=1e-5)


def test_euler_is_the_scheduler_of_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    x1 = torch.randn(6, generator=torch.Generator().manual_seed(1))
    x = x1
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        x = scheduler.step(gaussian_velocity(x, sigma), t, x, return_dict=False)[0]
    ours = integrate(gaussian_velocity, x1, shifted_sigmas(12, 3.0).float(), "euler")
    assert torch.allclose(ours, x, atol=1e-6)
