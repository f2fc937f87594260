"""How many items a pass takes at once, and what happens when the GPU has no room for them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import TypeVar

import torch

from ramctl.errors import OutOfMemoryError

T = TypeVar("T")

#: Image tokens of a training pass on a card with this many bytes (80 GB cards report a little more); with half as many
#: bytes, half the tokens, and with twice as many (an H200) twice, beyond which a pass does not get faster.
_GPU_TOKENS, _ROOMY_GPU, _MOST_TOKENS = 16_384, 74e9, 32_768
#: The same for any pass on a CPU. Larger batches spread the cost of starting an operation and its threads; but a
#: network that draws pictures of more than ``_FEW_TOKENS`` is itself large, and trains on a quarter.
_CPU_TOKENS, _FEW_TOKENS = 4_096, 256


def auto_micro_batch(
    latent_shape: tuple[int, int, int], device: torch.device, *, training: bool, card: int | None = None
) -> int:
    """Pictures per pass when the preset does not say: a budget of image tokens (2x2 latent patches).

    A no-gradient pass keeps no activations and on a GPU takes four times the pictures of a training pass. At 512 pixels
    on a GPU of 80 GB this gives 16 for training, on one of 141 GB 32, on one of 24 GB 4. On a CPU pictures of 64 pixels
    are taken 256 at a time, pictures of 512 pixels four at a time, and one for training.

    ``card`` is the memory in bytes of a GPU that is planned for; None: that of the ``device`` itself.
    """
    tokens = max(1, latent_shape[1] * latent_shape[2] // 4)
    if device.type == "cuda":
        budget = _tokens_on_gpu(device, card) * (1 if training else 4)
    else:
        budget = _CPU_TOKENS // (4 if training and tokens > _FEW_TOKENS else 1)
    return max(1, budget // tokens)


def _tokens_on_gpu(device: torch.device, card: int | None) -> int:
    if card is None:
        if not torch.cuda.is_available():
            return _GPU_TOKENS
        card = torch.cuda.get_device_properties(device).total_memory
    return min(_MOST_TOKENS, int(_GPU_TOKENS * 2.0 ** math.floor(math.log2(card / _ROOMY_GPU))))


def even_batch(total: int, most: int) -> int:
    """The smallest size that takes ``total`` items in as few passes as ``most`` at once: 48 for 96 items and 64.

    Passes of one size are one shape, which torch.compile compiles once and which leaves no small last pass.
    """
    return math.ceil(total / math.ceil(total / most)) if total else most


def drawing_batch(size: int) -> MicroBatch:
    """Passes that draw pictures, where no preset's key names their size (``ramctl sample``, ``ramctl evaluate``)."""
    return MicroBatch(size, "drawing pictures,", "Free its memory of other programs.")


class MicroBatch:
    """The size of one phase's passes. It is halved once if the GPU's memory runs out, and stays so.

    Args:
        size: items at once.
        phase: what the passes do, for the message.
        remedy: what to do when memory runs out, for the message.
    """

    def __init__(self, size: int, phase: str, remedy: str) -> None:
        self.size, self.phase, self.remedy = size, phase, remedy
        self.halved = False

    def run(self, work: Callable[[int], T], total: int | None = None) -> T:
        """``work(size)``; where memory runs out once more with half the size, so it must bear being started again.

        Args:
            work: is told how many items to take at once.
            total: items that there are, to take them in passes of equal size (:func:`even_batch`).

        Raises:
            OutOfMemoryError: half the size is too much as well, or was halved before.
        """
        while True:
            size = self.size if total is None else even_batch(total, self.size)
            try:
                return work(size)
            except torch.OutOfMemoryError as error:
                if self.halved or size < 2:
                    raise OutOfMemoryError(
                        f"The GPU ran out of memory while {self.phase} {size} at once. {self.remedy}"
                    ) from error
            # Out here the error's frames, which hold the tensors of the failed pass, are gone.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.size = (size + 1) // 2
            self.halved = True
