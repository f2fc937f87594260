"""Shares cover everything once; the collective operations of two real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ramctl.engine.distributed import World, connect
from ramctl.errors import ConfigError

_PROGRAM = """
import sys, torch
from ramctl.engine.distributed import connect
world, device = connect("cpu")
rank = world.rank
assert (world.size, device.type, world.is_main) == (2, "cpu", rank == 0)
assert world.gather({"rank": rank, "rows": list(world.share(9))}) == [
    {"rank": 0, "rows": [0, 1, 2, 3]}, {"rank": 1, "rows": [4, 5, 6, 7, 8]}]
assert world.broadcast("first" if rank == 0 else "second") == "first"
mixed = [torch.full((2, 3), 1.0 + rank), torch.tensor([10 + rank]), torch.full((1,), 0.1 + rank, dtype=torch.float64),
         torch.arange(4.0)[::2]]
world.sum_(mixed)
assert mixed[0].eq(3.0).all() and mixed[0].shape == (2, 3)
assert mixed[1].tolist() == [21] and mixed[1].dtype == torch.int64
assert mixed[2].tolist() == [0.1 + 1.1]
assert mixed[3].tolist() == [0.0, 4.0]
world.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(("total", "size"), [(9, 2), (4, 3), (16, 4), (2, 5), (0, 2)])
def test_shares_are_contiguous_even_and_complete(total: int, size: int) -> None:
    shares = [World(rank, size).share(total) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_communication() -> None:
    world = World()
    assert world.is_main
    assert list(world.share(3)) == [0, 1, 2]
    assert world.gather("row") == ["row"]
    assert world.broadcast("value") == "value"
    tensor = torch.ones(2)
    world.sum_([tensor])
    world.barrier()
    assert tensor.tolist() == [1, 1]


def test_a_missing_gpu_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r'runtime\.device is "cuda".*--device cpu'):
        connect("cuda")


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    world, device = connect("auto")
    assert (world.rank, world.size, device) == (0, 1, torch.device("cpu"))


@pytest.mark.slow
def test_two_real_processes_gather_broadcast_and_sum(tmp_path: Path) -> None:
    from ramctl.launch import _free_port

    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
