"""Parked networks: the same numbers, and nothing left on the device afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ramctl.backbones.parking import ParkedNetwork

CPU = torch.device("cpu")


class Tied(nn.Module):
    """Two layers that share their weight, and notes where it lay during the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.seen: list[int] = []
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [t.data_ptr() for t in (self.first.weight, self.second.weight, self.scale)]
        if x.isnan().any():
            raise RuntimeError("out of memory")
        return self.scale * self.second(self.first(x))


def test_copies_work_and_the_weights_stay_where_they_are() -> None:
    network, x = Tied(), torch.randn(2, 3)
    expected = network(x)
    parked_at = network.seen
    ParkedNetwork(network, CPU)
    for _ in range(2):
        assert torch.equal(network(x), expected)
        assert not set(network.seen) & set(parked_at)
        assert network.seen[0] == network.seen[1]  # a shared weight travels once
        assert [t.data_ptr() for t in (network.first.weight, network.scale)] == [parked_at[0], parked_at[2]]


def test_they_leave_after_an_error_too() -> None:
    network = Tied()
    parked_at = network.first.weight.data_ptr()
    ParkedNetwork(network, CPU)
    with pytest.raises(RuntimeError, match="out of memory"):
        network(torch.full((1, 3), torch.nan))
    assert network.seen[0] != parked_at
    assert network.first.weight.data_ptr() == parked_at
