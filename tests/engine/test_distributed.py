"""Shares cover everything once; the collective operations of two real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A machine of 16 cores and one process of several on it, not joined to anybody; what torch was told."""
    told = {"threads": 16}
    monkeypatch.setattr(torch, "get_num_threads", lambda: told["threads"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: told.update(threads=count))
    for variable in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: SimpleNamespace(process_index=1, num_processes=8))
    return told


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 16),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),  # two nodes
        ({"WORLD_SIZE": "4"}, 4),
        ({"WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "32"}, 1),
    ],
)
def test_the_processes_of_a_machine_share_its_cores_once(
    variables: dict[str, str], threads: int, several: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    for _ in range(2):
        connect("cpu")
        assert several["threads"] == threads
    assert os.environ["OMP_NUM_THREADS"] == (str(threads) if variables else "")


def test_threads_given_per_process_are_not_shared(several: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``accelerate launch`` and ``torchrun`` give them, and so may the user."""
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    connect("cpu")
    assert several["threads"] == 16
    assert os.environ["OMP_NUM_THREADS"] == "6"


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_more_processes_than_gpus_are_a_config_error(
    device: str, several: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"^4 processes .* sees 2 here\. Use --num-processes 2 or --device cpu\.$"):
        connect(device)


@pytest.mark.parametrize(("device", "local"), [("cpu", "4"), ("auto", "2"), ("auto", "")])
def test_processes_with_a_gpu_each_or_none_are_welcome(
    device: str, local: str, several: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs and eight processes; without their number on this machine, a scheduler may hide the other GPUs."""
    state = SimpleNamespace(process_index=1, num_processes=8, device=torch.device("cuda", 1))
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    world, place = connect(device)
    assert (world.rank, world.size, place.type) == (1, 8, "cpu" if device == "cpu" else "cuda")


@pytest.mark.slow
def test_two_real_processes_gather_broadcast_and_sum(tmp_path: Path) -> None:
    from ramctl.launch import _free_port

    environment = {
        **{key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"},
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
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
        assert "OMP_NUM_THREADS" not in errors  # accelerate warns where it has to count the cores itself
