"""CLIPScore: the cosine of picture and prompt in OpenAI's CLIP ViT-L/14, in the three ways it is reported.

Numbers of different variants cannot be compared; the version names which one was used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from ramctl.errors import UsageError
from ramctl.scorers.base import Floats, Images, ImageScore
from ramctl.scorers.clip_scorer import ClipScorer, cosine

if TYPE_CHECKING:
    from torch import Tensor

    from ramctl.scorers.clip import ClipEncoder

Variant = Literal["flow_grpo", "clip", "hessel"]

_HESSEL_WEIGHT = 2.5


class ClipScoreScorer(ClipScorer):
    """``value`` = cosine, or with ``hessel`` 2.5 times what of it is above zero.

    Options: ``device``, ``dtype`` and ``batch_size`` as in :class:`~ramctl.scorers.clip_scorer.ClipScorer`. The CLIP is
    shared with ``aesthetic`` and with GenEval's colours.

    Args:
        variant: ``flow_grpo`` (Flow-GRPO, DiffusionNFT): the whole picture squeezed to a square, bilinear with
            antialiasing; ``clip`` (Flow-Factory): CLIP's own preparation, a centre crop; ``hessel`` (arXiv 2104.08718):
            2.5 max(cosine, 0) of the same. The paper used ViT-B/32 and began each caption with "A photo depicts",
            which is not added here.

    Raises:
        UsageError: an option out of its range.
    """

    name = "clipscore"

    def __init__(
        self, variant: Variant = "flow_grpo", device: str = "auto", dtype: str = "float32", batch_size: int = 32
    ) -> None:
        super().__init__(device, dtype, batch_size)
        if variant not in get_args(Variant):
            raise UsageError(
                f"Scorer 'clipscore': variant is {variant!r}, it must be one of {', '.join(get_args(Variant))}."
            )
        self.variant = variant
        self.rule = variant.replace("_", "-")
        self.value_range = (0.0, _HESSEL_WEIGHT) if variant == "hessel" else (-1.0, 1.0)  # type: ignore[misc]

    def encoder_version(self) -> str:
        """CLIP's version."""
        from ramctl.scorers.clip import clip_vit_l14_version

        return clip_vit_l14_version(self.dtype)

    def make_encoder(self) -> ClipEncoder:
        """OpenAI's CLIP ViT-L/14."""
        from ramctl.scorers.clip import clip_vit_l14

        return clip_vit_l14(self.device, self.dtype)

    def prepare(self, image: Images) -> Tensor:
        """The variant's preparation."""
        from ramctl.scorers.clip import normalise, preprocess, resize_tensor, to_unit

        size = self.engine[0].image_size
        if self.variant == "flow_grpo":
            return normalise(resize_tensor(to_unit(image), size, size, "bilinear"))
        # Hessel's code crops with torchvision, Flow-Factory's with the hub's processor.
        return preprocess(image, size, crop="round" if self.variant == "hessel" else "floor")

    def judge(self, image: Floats, text: Floats | None) -> ImageScore:
        """The cosine, or Hessel's weighting of it."""
        value = cosine(image, text)
        return ImageScore(value=_HESSEL_WEIGHT * max(value, 0.0) if self.variant == "hessel" else value)
