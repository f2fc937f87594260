"""Random draws keyed by what they are for, never by rank or call order.

Each draw's seed is a hash of (run seed, purpose, step, global index), so one process and four, a run and its resumed
twin, draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Purpose = Literal["prompts", "endpoint", "noising", "noising_between", "time", "time_between", "evaluation", "sample"]


def keyed_seed(run_seed: int, purpose: Purpose, step: int, index: int = 0) -> int:
    """A 63-bit seed for one draw."""
    key = f"{run_seed}/{purpose}/{step}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def keyed_normal(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal float32 [len(seeds), *shape]; row i depends on ``seeds[i]`` only.

    Drawn on the device (CPU and GPU give different numbers for the same seed).
    """
    out = torch.empty(len(seeds), *shape, device=device)
    generator = torch.Generator(device)
    for row, seed in zip(out, seeds, strict=True):
        generator.manual_seed(seed)
        row.normal_(generator=generator)
    return out


def keyed_uniform(seeds: Sequence[int]) -> Tensor:
    """Uniform float64 [len(seeds)] in [0, 1), on the CPU: the seeds' own bits, which the hash made uniform."""
    return torch.tensor([(seed % (1 << 53)) / (1 << 53) for seed in seeds], dtype=torch.float64)


def permutation(length: int, run_seed: int, epoch: int) -> list[int]:
    """The order in which ``length`` prompts are visited in their ``epoch``-th pass."""
    generator = torch.Generator().manual_seed(keyed_seed(run_seed, "prompts", epoch))
    return [int(i) for i in torch.randperm(length, generator=generator)]


def prompts_of_step(step: int, per_step: int, total: int, run_seed: int) -> list[int]:
    """Indices of the ``per_step`` prompts of a step (0-based): the file shuffled anew in each pass, taken in order.

    A prompt can occur twice in a step only where one pass ends and the next begins.
    """
    start = step * per_step
    chosen: list[int] = []
    order: list[int] = []
    epoch = -1
    for position in range(start, start + per_step):
        if position // total != epoch:
            epoch = position // total
            order = permutation(total, run_seed, epoch)
        chosen.append(order[position % total])
    return chosen
