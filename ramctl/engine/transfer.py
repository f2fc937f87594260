"""Small tensors from the host to the device, without making either wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from pinned memory to a GPU, since an ordinary copy waits for all queued work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload_indices(indices: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n] on the device, to index with; a Python list would be copied and waited for."""
    return upload(torch.tensor(indices, dtype=torch.long), device)
