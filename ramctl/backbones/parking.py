"""Networks that are needed once a step: kept in main memory, on the accelerator only while they work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ParkedNetwork:
    """A frozen network whose weights stay in main memory; each forward pass brings copies to the device.

    The copies are thrown away when the pass ends, so leaving costs nothing, and of several parked networks only the one
    at work takes room. Inputs must already be on the device.

    Args:
        network: frozen, on the CPU.
        device: where it works.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.device = device
        self._tensors = [*network.parameters(), *network.buffers()]  # each once, shared ones too
        if device.type == "cuda":
            for tensor in self._tensors:
                tensor.data = _pinned(tensor.data)
        self._parked = [tensor.data for tensor in self._tensors]
        network.register_forward_pre_hook(self._fetch)
        network.register_forward_hook(self._leave, always_call=True)

    def _fetch(self, *_: Any) -> None:
        for tensor in self._tensors:
            tensor.data = tensor.data.to(self.device, non_blocking=True, copy=True)

    def _leave(self, *_: Any) -> None:
        for tensor, data in zip(self._tensors, self._parked, strict=True):
            tensor.data = data


def _pinned(tensor: Tensor) -> Tensor:
    """Page-locked memory is copied several times faster; where the system gives none, the tensor as it is."""
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor
