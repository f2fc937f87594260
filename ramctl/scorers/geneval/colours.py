"""The colour of a detected object, by CLIP ViT-L/14, as GenEval's evaluator reads it.

The object stands on a flat grey canvas, cut to its box; the colour is the one whose text prototype its image
embedding is nearest to. A prototype is the normalised mean of the embeddings of three sentences naming the colour
and the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ramctl.errors import DataError
from ramctl.scorers.base import Images
from ramctl.scorers.geneval.rules import Box

if TYPE_CHECKING:
    from torch import Tensor

    from ramctl.scorers.clip import Batches, ClipEncoder

COLORS: tuple[str, ...] = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
_SENTENCES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_CANVAS = 0x99
#: Crops CLIP sees at once.
_BATCH = 32


def object_crop(image: Images, box: Box, mask: NDArray[np.bool_]) -> Images | None:
    """An object on the grey canvas: uint8 [h, w, 3], None when its box has no area.

    Args:
        image: uint8 [H, W, 3].
        box: (left, top, right, bottom) in pixels; rounded to whole ones, halves to even, as Pillow crops.
        mask: bool [h, w], the object's pixels inside its box.

    Raises:
        DataError: the mask has not the box's size, or the box leaves the picture.
    """
    left, top, right, bottom = (round(value) for value in box)
    if right <= left or bottom <= top:
        return None
    height, width = image.shape[:2]
    if left < 0 or top < 0 or right > width or bottom > height or mask.shape != (bottom - top, right - left):
        raise DataError(f"An object's mask {mask.shape} and box {box} do not fit the picture {(height, width)}.")
    crop: Images = np.where(mask[..., None], image[top:bottom, left:right], np.uint8(_CANVAS))
    return crop


class ColorNamer:
    """Names the colours of objects; prototypes are computed once per class.

    Args:
        device, dtype: where and how precisely CLIP runs.
    """

    def __init__(self, device: str = "auto", dtype: str = "float32") -> None:
        self.device = device
        self.dtype = dtype
        self._encoder: ClipEncoder | None = None
        self._batches: Batches | None = None
        self._prototypes: dict[str, Tensor] = {}

    @property
    def version(self) -> str:
        """CLIP's weights and precision.

        Raises:
            MissingDependencyError: CLIP's weights are not there.
        """
        from ramctl.scorers.clip import clip_vit_l14_version

        return clip_vit_l14_version(self.dtype)

    def load(self) -> None:
        """Read CLIP's weights (once per process, shared with the other scorers that use them).

        Raises:
            MissingDependencyError: they are not there.
        """
        from ramctl.scorers.clip import clip_vit_l14

        self._encoder = clip_vit_l14(self.device, self.dtype)

    def name(self, crops: Sequence[Images | None], class_names: Sequence[str]) -> list[str | None]:
        """The colour of each crop (see :func:`object_crop`) of an object of the class beside it; None for None.

        Raises:
            OutOfMemoryError: the GPU's memory does not hold half a batch of crops either.
        """
        import torch

        from ramctl.scorers.clip import Batches, preprocess

        encoder = self._clip()
        self._batches = batches = self._batches or Batches(_BATCH, "geneval")
        seen = [index for index, crop in enumerate(crops) if crop is not None and crop.size]
        colors: list[str | None] = [None] * len(crops)

        def nearest(part: slice) -> Tensor:
            shown = [crop for index in seen[part] if (crop := crops[index]) is not None]
            # Rounded as torchvision does: GenEval prepares the crops with open_clip's transform.
            pixels = torch.stack([preprocess(crop, encoder.image_size, crop="round") for crop in shown])
            features = encoder.image_features(pixels)
            prototypes = torch.stack([self._prototype(class_names[index]) for index in seen[part]])
            return (prototypes @ features.to(prototypes)[..., None]).squeeze(-1).argmax(dim=1)

        if seen:
            for index, color in zip(seen, batches.run(len(seen), nearest).tolist(), strict=True):
                colors[index] = COLORS[color]
        return colors

    def _clip(self) -> ClipEncoder:
        if self._encoder is None:
            self.load()
        assert self._encoder is not None
        return self._encoder

    def _prototype(self, name: str) -> Tensor:
        """float32 [10, D], one unit row per colour."""
        import torch

        if name not in self._prototypes:
            sentences = [s.format(color=color, name=name) for color in COLORS for s in _SENTENCES]
            features = self._clip().text_features(sentences).float()
            mean = features.reshape(len(COLORS), len(_SENTENCES), -1).mean(dim=1)
            self._prototypes[name] = torch.nn.functional.normalize(mean, dim=-1)
        return self._prototypes[name]
