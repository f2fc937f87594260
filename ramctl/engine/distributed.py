"""The processes of a run: who computes which share, and the few collective operations the engine needs.

A step's pictures are numbered globally; each process takes a contiguous share, so gathering in rank order restores the
global order whatever the number of processes. Gradients are summed once per update.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class World:
    """This process' place among all; one process when torch.distributed is not running."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """The global indices of this process' contiguous share of ``total`` (shares differ by at most one)."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def gather(self, rows: Any) -> list[Any]:
        """Every process' object, in rank order, on every process (small things only: it pickles)."""
        if self.size == 1:
            return [rows]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, rows)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """The main process' object, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over all processes, in place, in one message per dtype.

        The sum is made on this process' device, wherever the tensors lie: NCCL takes no other.
        """
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            chosen = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1).to(self.device) for t in chosen])
            dist.all_reduce(flat)
            for tensor, part in zip(chosen, torch.split(flat, [t.numel() for t in chosen]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(device_ids=[self.device.index or 0] if self.device.type == "cuda" else None)

    def leave(self) -> None:
        """Part from the others at the end of a run; nothing can be exchanged afterwards."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def connect(device: str) -> tuple[World, torch.device]:
    """Join the processes started by accelerate or torchrun (their environment variables tell), or run alone.

    Several processes on one machine share its cores: without OMP_NUM_THREADS each takes its part for torch.

    Args:
        device: "auto", "cpu" or "cuda".

    Returns:
        this process' place, and its device.

    Raises:
        ConfigError: there is no GPU, or fewer of them on this machine than processes.
    """
    from accelerate import PartialState

    from ramctl.errors import ConfigError

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('runtime.device is "cuda", but torch sees no CUDA device here. Use --device cpu or auto.')
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    # Without LOCAL_WORLD_SIZE nobody knows: a scheduler may show each process of a machine another GPU only.
    local, gpus = _count("LOCAL_WORLD_SIZE"), 0 if use_cpu else torch.cuda.device_count()
    if not use_cpu and local > gpus:
        raise ConfigError(
            f"{local} processes on this machine need a GPU each, but torch sees {gpus} here. "
            f"Use --num-processes {gpus} or --device cpu."
        )
    _share_cores(local or _count("WORLD_SIZE"))
    state = PartialState(cpu=use_cpu)
    place = torch.device("cpu") if use_cpu else state.device
    return World(state.process_index, state.num_processes, place), place


def _count(variable: str) -> int:
    return int(os.environ.get(variable) or 0)


def _share_cores(processes: int) -> None:
    """Take this process' part of the machine's cores; OMP_NUM_THREADS, which is per process, goes before.

    The variable is set as well: accelerate would otherwise count again, in its own way, and warn of it.
    """
    if processes > 1 and not os.environ.get("OMP_NUM_THREADS"):
        threads = max(1, torch.get_num_threads() // processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
