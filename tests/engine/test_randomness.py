"""Keyed randomness: the same numbers whoever draws them, in whatever order."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch

from ramctl.engine.randomness import (
    Purpose,
    keyed_normal,
    keyed_seed,
    keyed_uniform,
    permutation,
    prompts_of_step,
)

CPU = torch.device("cpu")


def seeds(count: int, run_seed: int = 0, step: int = 0) -> list[int]:
    return [keyed_seed(run_seed, "noising", step, index) for index in range(count)]


def test_seeds_are_fixed_for_good() -> None:
    # A change here changes every run and breaks resuming: deliberate, or a bug.
    assert keyed_seed(0, "endpoint", 0) == 8852404138695477512
    assert keyed_seed(42, "time", 7, 1151) == 7322090796775612489


def test_every_part_of_the_key_matters() -> None:
    keys = itertools.product([0, 1, 11], get_args(Purpose), [0, 1, 11], [0, 1, 11])
    drawn = [keyed_seed(*key) for key in keys]
    assert len(set(drawn)) == len(drawn) == 27 * len(get_args(Purpose))
    assert all(0 <= seed < 1 << 63 for seed in drawn)


def test_a_row_depends_on_its_own_seed_only() -> None:
    keys = seeds(8)
    together = keyed_normal(keys, (2, 5, 3), CPU)
    assert together.shape == (8, 2, 5, 3)
    assert together.dtype == torch.float32
    assert torch.equal(keyed_normal(keys[::-1], (2, 5, 3), CPU), together.flip(0))
    halves = [keyed_normal(part, (2, 5, 3), CPU) for part in (keys[:3], keys[3:])]  # as two processes would draw
    assert torch.equal(torch.cat(halves), together)


def test_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = (keyed_normal(seeds(2), (4,), CPU), permutation(9, 3, 1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = (keyed_normal(seeds(2), (4,), CPU), permutation(9, 3, 1))
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


def test_normals_are_standard_and_rows_independent() -> None:
    # 4000 × 64 numbers: bounds are four standard errors.
    rows = keyed_normal(seeds(4000), (64,), CPU).double()
    count = rows.numel()
    assert abs(rows.mean().item()) < 4 / count**0.5
    assert abs(rows.square().mean().item() - 1) < 4 * (2 / count) ** 0.5
    assert abs(rows.pow(4).mean().item() - 3) < 4 * (96 / count) ** 0.5
    neighbours = (rows[:-1] * rows[1:]).mean().item()
    assert abs(neighbours) < 4 / (count - 64) ** 0.5


def test_uniforms_are_uniform() -> None:
    u = keyed_uniform(seeds(20_000))
    assert u.dtype == torch.float64
    assert (u.min() >= 0) and (u.max() < 1)
    # Kolmogorov-Smirnov at about 1e-3: 1.95/√N.
    ranks = (torch.arange(len(u), dtype=torch.float64) + 0.5) / len(u)
    assert (u.sort().values - ranks).abs().max().item() < 1.95 / len(u) ** 0.5
    centred = u - 0.5
    assert abs((centred[:-1] * centred[1:]).mean().item()) < 4 / 12 / len(u) ** 0.5
    assert torch.equal(keyed_uniform(seeds(20)), u[:20])


def test_purposes_are_uncorrelated_at_the_same_index() -> None:
    time, between = (
        keyed_uniform([keyed_seed(0, purpose, 3, i) for i in range(20_000)]) - 0.5
        for purpose in get_args(Purpose)
        if purpose in ("time", "time_between")
    )
    assert abs((time * between).mean().item()) < 4 / 12 / 20_000**0.5


def test_a_permutation_visits_everything_once() -> None:
    assert sorted(permutation(50, 0, 0)) == list(range(50))
    assert permutation(50, 0, 0) != permutation(50, 0, 1)
    assert permutation(50, 0, 0) != permutation(50, 1, 0)


@pytest.mark.parametrize("per_step", [3, 5, 7, 16])
def test_each_pass_over_the_prompts_takes_every_prompt_once(per_step: int) -> None:
    total, steps = 7, 21
    visited = [i for step in range(steps) for i in prompts_of_step(step, per_step, total, run_seed=4)]
    assert len(visited) == per_step * steps
    passes = [visited[start : start + total] for start in range(0, len(visited), total)]
    assert all(sorted(one) == list(range(total)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_the_order_of_prompts_does_not_depend_on_the_step_size() -> None:
    by_two = [i for step in range(15) for i in prompts_of_step(step, 2, 10, run_seed=0)]
    by_five = [i for step in range(6) for i in prompts_of_step(step, 5, 10, run_seed=0)]
    assert by_two == by_five


def test_no_prompt_twice_in_a_step_inside_one_pass() -> None:
    for step in range(4):
        chosen = prompts_of_step(step, 25, 100, run_seed=9)
        assert len(set(chosen)) == 25
