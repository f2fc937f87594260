"""Where a scorer's networks run, and in what precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ramctl.errors import OutOfMemoryError, UsageError

if TYPE_CHECKING:
    import torch


#: Precisions of a scorer's network.
DTYPES = ("float32", "bfloat16", "float16")


def check_network_options(scorer: str, dtype: str, batch_size: int) -> None:
    """Refuse what no scorer with a network can run with.

    Raises:
        UsageError: another precision, or a batch without pictures.
    """
    if dtype not in DTYPES:
        raise UsageError(f"Scorer {scorer!r}: dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}.")
    if batch_size < 1:
        raise UsageError(f"Scorer {scorer!r}: batch_size is {batch_size}, it must be 1 or more.")


def scorer_device(option: str) -> torch.device:
    """The device an option names: ``auto`` (this process's GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UsageError: another word, or a GPU that is not there.
    """
    import torch

    if option == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(option)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"A scorer's device is {option!r}; it must be auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"A scorer's device is {option!r}, but this machine has {torch.cuda.device_count()} GPUs.")
    return device


def placed(network: Any, device: torch.device, dtype: torch.dtype, what: str) -> Any:
    """A network on its device and in its precision; ``what`` names it.

    Raises:
        OutOfMemoryError: the GPU has no room for it.
    """
    import torch

    try:
        return network.to(device=device, dtype=dtype)
    except torch.OutOfMemoryError:
        raise OutOfMemoryError(
            f'The GPU\'s memory does not hold {what}: give the scorer dtype = "bfloat16" or device = "cpu".'
        ) from None
