"""PickScore v1 (arXiv 2305.01569): which picture people would pick, by a CLIP ViT-H/14 trained on their choices.

The rule: the learned temperature (about 100) times the cosine of picture and prompt. That raw number is what papers
report, 19 to 24 for most pictures. The reward is a 26th of it, as in Flow-GRPO and DiffusionNFT; 26 has no meaning but
that rewards come out between 0 and 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ramctl.scorers.base import Floats, Images, ImageScore
from ramctl.scorers.clip_scorer import ClipScorer, cosine

if TYPE_CHECKING:
    from torch import Tensor

    from ramctl.scorers.clip import ClipEncoder

WEIGHTS = "pickscore"
#: PickScore was trained with this tokenizer and comes without one.
TOKENIZER = "clip-vit-h14-tokenizer"

DIVISOR = 26.0


class PickScoreScorer(ClipScorer):
    """``value`` = raw / 26; the detail ``raw`` = temperature x cosine.

    Options: see :class:`~ramctl.scorers.clip_scorer.ClipScorer`. ``float32`` takes 4 GB of memory.
    """

    name = "pickscore"
    rule = "raw-over-26"
    # CLIP's training holds the temperature at 100 or less.
    value_range = (-100 / DIVISOR, 100 / DIVISOR)

    def encoder_version(self) -> str:
        """Weights, configuration, tokenizer, precision."""
        from ramctl.scorers.clip import hub_version

        return hub_version(WEIGHTS, TOKENIZER, self.dtype)

    def make_encoder(self) -> ClipEncoder:
        """The CLIP ViT-H/14 of PickScore."""
        from ramctl.scorers.clip import shared_encoder
        from ramctl.scorers.clip_checkpoints import load_hub_clip
        from ramctl.scorers.clip_tokens import hub_tokenizer

        return shared_encoder(
            self.encoder_version(),
            self.device,
            self.dtype,
            lambda: load_hub_clip(WEIGHTS),
            lambda: hub_tokenizer(TOKENIZER),
        )

    def prepare(self, image: Images) -> Tensor:
        """CLIP's own preparation, as the hub's processor does it."""
        from ramctl.scorers.clip import preprocess

        return preprocess(image, self.engine[0].image_size)

    def judge(self, image: Floats, text: Floats | None) -> ImageScore:
        """Temperature x cosine, and a 26th of it."""
        raw = self.engine[0].logit_scale * cosine(image, text)
        return ImageScore(value=raw / DIVISOR, details={"raw": raw})
