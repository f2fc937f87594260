"""Networks that are needed once a step: kept in main memory, on the accelerator only while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class ParkedNetworks:
    """Frozen networks whose weights stay in main memory.

    Their tensors on the device are copies that are thrown away afterwards, so leaving costs nothing.

    Args:
        networks: frozen, on the CPU.
        device: where they work.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self._tensors = list({id(t): t for n in networks for t in (*n.parameters(), *n.buffers())}.values())
        if device.type == "cuda":
            for tensor in self._tensors:
                tensor.data = _pinned(tensor.data)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The weights are on the device inside this context."""
        parked = [tensor.data for tensor in self._tensors]
        try:
            for tensor in self._tensors:
                tensor.data = tensor.data.to(self.device, non_blocking=True, copy=True)
            yield
        finally:
            for tensor, data in zip(self._tensors, parked, strict=True):
                tensor.data = data


def _pinned(tensor: Tensor) -> Tensor:
    """Page-locked memory is copied several times faster; where the system gives none, the tensor as it is."""
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor
