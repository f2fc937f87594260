"""Group-centred advantages with a pooled standard deviation (arXiv 2605.10759, practical algorithm)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """Advantages of one step.

    value: float64 [N]; zero where the reward failed.
    flat_groups: share of groups whose usable rewards are all equal (their pictures teach nothing).
    reward_std: population standard deviation of all usable rewards.
    """

    value: Tensor
    flat_groups: float
    reward_std: float


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    failed: Tensor | None = None,
    epsilon: float = 1e-4,
    scale: Literal["pooled_std", "none"] = "pooled_std",
    clip: float | None = None,
) -> Advantages:
    """A_i = (R_i − mean of its group) / (std of all rewards of the step + ε).

    The mean includes the picture itself; the std is pooled over all groups and divides by N, so that nearly equal
    groups are not blown up. Pictures whose reward failed are left out of both statistics and get advantage 0: their
    target is then the reference velocity.

    Args:
        rewards: [N], any float type; entries marked failed may be NaN.
        groups: int64 [N], the prompt each picture belongs to.
        failed: bool [N] or None.
        epsilon: added to the std.
        scale: ``none`` only centres (the reward's own scale is kept, for checks against closed forms).
        clip: bound on the absolute advantage.

    Raises:
        ValueError: shapes differ, or a reward that is not marked failed is not finite.
    """
    if rewards.shape != groups.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)} must both be [N]")
    usable = torch.ones_like(groups, dtype=torch.bool) if failed is None else ~failed
    values = torch.where(usable, rewards.double(), 0.0)
    if not torch.isfinite(values).all():
        raise ValueError("a reward that is not marked failed is not finite")
    count = int(groups.max()) + 1 if len(groups) else 0
    size = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, usable.double())
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, values)
    mean = total / size.clamp_min(1)
    centred = torch.where(usable, values - mean[groups], 0.0)
    # A group of equal rewards must get exactly 0; its mean can be off by rounding, and a tiny std would blow that up.
    spread = torch.zeros(count, dtype=torch.float64).scatter_reduce_(0, groups, centred.abs(), "amax")
    flat = spread <= 1e-12 * values.abs().max().clamp_min(1) if len(values) else spread == 0
    centred = torch.where(flat[groups], 0.0, centred)
    kept = values[usable]
    std = float(kept.std(correction=0)) if len(kept) else 0.0
    # `or 1.0`: with ε = 0 and all rewards equal it would be 0/0.
    advantage = centred / ((std + epsilon) or 1.0) if scale == "pooled_std" else centred
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    present = size > 0
    flat_share = float(flat[present].double().mean()) if present.any() else 0.0
    return Advantages(value=advantage, flat_groups=flat_share, reward_std=std)
