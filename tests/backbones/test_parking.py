"""Parked networks: the same numbers, and nothing left on the device afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ramctl.backbones.parking import ParkedNetworks


def test_copies_work_and_the_weights_stay_where_they_are() -> None:
    network = nn.Linear(2, 2).requires_grad_(False)
    twin = nn.Module()
    twin.weight = network.weight  # tied weights travel once
    parked_at, value = network.weight.data_ptr(), network.weight.clone()
    with ParkedNetworks([network, twin], torch.device("cpu")).at_work():
        assert network.weight.data_ptr() != parked_at
        assert twin.weight is network.weight
        assert torch.equal(network.weight, value)
    assert network.weight.data_ptr() == parked_at


def test_they_come_back_after_an_error() -> None:
    network = nn.Linear(2, 2).requires_grad_(False)
    value = network.weight.clone()
    parked = ParkedNetworks([network], torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of memory"), parked.at_work():
        raise RuntimeError("out of memory")
    assert torch.equal(network.weight, value)
