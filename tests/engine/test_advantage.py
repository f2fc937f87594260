"""Group-centred, pooled-std advantages."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ramctl.engine.advantage import group_advantages


def rewards_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def groups_of(count: int, size: int) -> Tensor:
    return torch.arange(count).repeat_interleave(size)


def random_rewards(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_reference_vector() -> None:
    got = group_advantages(rewards_of(1, 3, 4, 4), groups_of(2, 2), epsilon=0.0)
    assert got.reward_std == pytest.approx(1.2247449, abs=5e-8)
    torch.testing.assert_close(got.value, rewards_of(-0.8164966, 0.8164966, 0, 0), atol=5e-8, rtol=0)
    assert got.flat_groups == 0.5


def test_epsilon_is_added_to_the_std() -> None:
    got = group_advantages(rewards_of(1, 3, 4, 4), groups_of(2, 2))
    expected = 1 / (math.sqrt(1.5) + 1e-4)
    torch.testing.assert_close(got.value, rewards_of(-expected, expected, 0, 0), rtol=1e-14, atol=0)


def test_the_std_is_pooled_and_so_carries_the_spread_between_prompts() -> None:
    # The same within-group spread is worth less when the prompts' levels differ; E[A²] = within/pooled
    # variance.
    rewards = random_rewards(6, 24)
    groups = groups_of(6, 24)
    levels = torch.arange(6, dtype=torch.float64)[groups] * 2
    near = group_advantages(rewards, groups, epsilon=0.0).value
    far = group_advantages(rewards + levels, groups, epsilon=0.0).value
    within = group_advantages(rewards, groups, scale="none").value.square().mean()
    pooled = (rewards + levels).var(correction=0)
    assert far.square().mean().item() == pytest.approx((within / pooled).item(), rel=1e-12)
    assert far.square().mean() < near.square().mean() <= 1


def test_a_nearly_equal_group_is_not_blown_up() -> None:
    got = group_advantages(rewards_of(0, 1, 0.5, 0.500001), groups_of(2, 2)).value
    assert got[:2].abs().min() > 1
    assert got[2:].abs().max() < 1e-5


@pytest.mark.parametrize("shift", [0.0, 3.5, -1e3])
def test_a_constant_added_to_every_reward_changes_nothing(shift: float) -> None:
    rewards, groups = random_rewards(3, 8), groups_of(3, 8)
    expected = group_advantages(rewards, groups).value
    torch.testing.assert_close(group_advantages(rewards + shift, groups).value, expected, rtol=1e-10, atol=1e-11)


def test_a_constant_per_prompt_drops_out_of_the_centring() -> None:
    rewards, groups = random_rewards(3, 8), groups_of(3, 8)
    shifted = rewards + rewards_of(5, -2, 40)[groups]
    torch.testing.assert_close(
        group_advantages(shifted, groups, scale="none").value,
        group_advantages(rewards, groups, scale="none").value,
    )


def test_scaling_the_rewards_leaves_the_advantages() -> None:
    rewards, groups = random_rewards(3, 8), groups_of(3, 8)
    torch.testing.assert_close(
        group_advantages(1e3 * rewards, groups, epsilon=0.0).value,
        group_advantages(rewards, groups, epsilon=0.0).value,
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e9 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_or_constant_rewards_give_exactly_zero(value: float, dtype: torch.dtype) -> None:
    got = group_advantages(torch.full((48,), value, dtype=dtype), groups_of(2, 24), epsilon=0.0)
    assert torch.equal(got.value, torch.zeros(48, dtype=torch.float64))
    assert got.flat_groups == 1.0


def test_group_order_and_labels_do_not_matter() -> None:
    rewards, groups = random_rewards(4, 6), groups_of(4, 6)
    expected = group_advantages(rewards, groups).value
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    relabelled = torch.tensor([9, 2, 30, 5])[groups]  # gaps in the labels are no groups
    got = group_advantages(rewards[order], relabelled[order])
    torch.testing.assert_close(got.value, expected[order], rtol=1e-12, atol=1e-12)
    assert got.flat_groups == 0.0


def test_failed_rewards_leave_both_statistics() -> None:
    rewards = rewards_of(1, math.nan, 3, 4, math.inf, 4)
    failed = torch.tensor([False, True, False, False, True, False])
    got = group_advantages(rewards, groups_of(2, 3), failed=failed, epsilon=0.0)
    torch.testing.assert_close(got.value, rewards_of(-0.8164966, 0, 0.8164966, 0, 0, 0), atol=5e-8, rtol=0)
    assert got.reward_std == pytest.approx(1.2247449, abs=5e-8)
    assert got.flat_groups == 0.5


def test_a_group_that_failed_entirely_does_not_count_as_flat() -> None:
    rewards = rewards_of(math.nan, math.nan, 1, 3)
    got = group_advantages(rewards, groups_of(2, 2), failed=torch.tensor([True, True, False, False]), epsilon=0.0)
    torch.testing.assert_close(got.value, rewards_of(0, 0, -1, 1))
    assert got.flat_groups == 0.0


def test_everything_failed() -> None:
    got = group_advantages(torch.full((4,), math.nan), groups_of(2, 2), failed=torch.ones(4, dtype=torch.bool))
    assert torch.equal(got.value, torch.zeros(4, dtype=torch.float64))
    assert (got.flat_groups, got.reward_std) == (0.0, 0.0)


def test_clip_bounds_both_sides() -> None:
    rewards = rewards_of(*[0.0] * 30, 9.0, -9.0)
    groups = groups_of(1, 32)
    free, clipped = group_advantages(rewards, groups).value, group_advantages(rewards, groups, clip=2.0).value
    assert (free.max() > 3) and (free.min() < -3)
    torch.testing.assert_close(clipped, free.clamp(-2, 2))
    assert (clipped.max().item(), clipped.min().item()) == (2.0, -2.0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="must both be"):
        group_advantages(torch.zeros(4), groups_of(1, 3))
    with pytest.raises(ValueError, match="must both be"):
        group_advantages(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(rewards_of(1, math.nan), groups_of(1, 2))


# --- finite groups --------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "share"), [(24, 0.958333), (4, 0.75), (2, 0.5)])
def test_a_picture_moves_its_own_advantage_by_one_minus_one_over_the_group_size(size: int, share: float) -> None:
    rewards = random_rewards(2, size)
    bumped = rewards.clone()
    bumped[0] += 0.25
    groups = groups_of(2, size)
    moved = group_advantages(bumped, groups, scale="none").value - group_advantages(rewards, groups, scale="none").value
    assert moved[0].item() / 0.25 == pytest.approx(share, abs=5e-7)
    assert moved[1].item() / 0.25 == pytest.approx(-1 / size, abs=1e-12)
    assert moved[size:].abs().max().item() == 0


def test_the_expected_reward_term_shrinks_by_one_minus_one_over_the_group_size() -> None:
    # All 2⁴ groups of four fair coins: E[A R] = (1 − 1/4) Var R = 3/16, exactly; leaving oneself out gives
    # Var R = 1/4.
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    rewards, groups = outcomes.flatten(), groups_of(16, 4)
    centred = group_advantages(rewards, groups, scale="none").value
    assert (centred * rewards).mean().item() == pytest.approx(3 / 16, abs=1e-15)
    others = (outcomes.sum(1, keepdim=True) - outcomes) / 3
    left_out = (outcomes - others).flatten()
    assert (left_out * rewards).mean().item() == pytest.approx(1 / 4, abs=1e-15)
    torch.testing.assert_close(left_out, centred * 4 / 3)
