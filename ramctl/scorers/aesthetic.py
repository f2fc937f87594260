"""LAION's aesthetic predictor (sac+logos+ava1-l14-linearMSE): how people would rate a picture, from 1 to 10.

The rule: the direction of the picture in CLIP ViT-L/14, through five linear layers. Between them is no activation, so
together they are one vector and one number; they are multiplied out once, in double precision. Pictures of diffusion
models mostly get 5 to 6.5. The prompt is not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ramctl.errors import ScorerError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Floats, Images, ImageScore, SelfTest
from ramctl.scorers.clip_scorer import ClipScorer, drawn_pictures

if TYPE_CHECKING:
    from torch import Tensor

    from ramctl.scorers.clip import ClipEncoder

WEIGHTS = "aesthetic"
WEIGHTS_FILE = "sac+logos+ava1-l14-linearMSE.pth"

#: What the official layers multiply out to: a bias, and a vector of this length.
KNOWN_BIAS = 5.2366
KNOWN_NORM = 18.0


class AestheticScorer(ClipScorer):
    """``value`` = the predicted rating.

    Options: see :class:`~ramctl.scorers.clip_scorer.ClipScorer`. The CLIP is shared with ``clipscore`` and with
    GenEval's colours.
    """

    name = "aesthetic"
    rule = "sac-logos-ava1-l14"
    reads_prompt = False
    # The ratings learned from lie within 1 and 10, but a linear layer keeps to no bounds.
    value_range = (-math.inf, math.inf)

    def __init__(self, device: str = "auto", dtype: str = "float32", batch_size: int = 32) -> None:
        super().__init__(device, dtype, batch_size)
        self._head: tuple[NDArray[np.float64], float] | None = None

    def encoder_version(self) -> str:
        """CLIP's version, and the head's weights."""
        from ramctl.scorers.clip import clip_vit_l14_version
        from ramctl.weights import fingerprint

        return f"head-{fingerprint(WEIGHTS, WEIGHTS_FILE)}/{clip_vit_l14_version(self.dtype)}"

    def make_encoder(self) -> ClipEncoder:
        """OpenAI's CLIP ViT-L/14."""
        from ramctl.scorers.clip import clip_vit_l14

        return clip_vit_l14(self.device, self.dtype)

    def load(self) -> None:
        """Read the head, then load the encoder.

        Raises:
            MissingDependencyError: weights are not there; with the command that gets them.
            ScorerError: they cannot be read, or the head does not fit the encoder.
        """
        from ramctl.scorers.clip_checkpoints import read_tensors
        from ramctl.weights import weight_file

        path = weight_file(WEIGHTS, WEIGHTS_FILE)
        try:
            vector, bias = multiply_out(read_tensors(path, WEIGHTS))
        except ValueError as error:
            raise ScorerError(f"{path} is not the aesthetic head: {error}") from None
        super().load()
        width = self.engine[0].width
        if len(vector) != width:
            raise ScorerError(f"{path} takes vectors of {len(vector)} numbers, CLIP's have {width}.")
        self._head = vector, bias

    def prepare(self, image: Images) -> Tensor:
        """CLIP's own preparation, cropped as OpenAI's code does."""
        from ramctl.scorers.clip import preprocess

        return preprocess(image, self.engine[0].image_size, crop="round")

    def judge(self, image: Floats, text: Floats | None) -> ImageScore:
        """The head's rating of a direction."""
        vector, bias = self.head
        return ImageScore(value=float(np.dot(image.astype(np.float64), vector)) + bias)

    @property
    def head(self) -> tuple[NDArray[np.float64], float]:
        """The layers multiplied out: vector float64 [D] and bias; :meth:`load` comes first."""
        if self._head is None:
            raise RuntimeError(f"the scorer {self.name!r} was used before load")
        return self._head

    def self_test(self) -> SelfTest:
        """The head is the official one, CLIP tells three drawn pictures apart, and their ratings are of the scale."""
        drawn = drawn_pictures()
        captions, pictures = list(drawn), np.stack(list(drawn.values()))
        scores = self.score(pictures, [Prompt(caption) for caption in captions])
        vector, bias = self.head
        norm = float(np.linalg.norm(vector))
        problems = []
        if abs(bias - KNOWN_BIAS) > 1e-3 or abs(norm - KNOWN_NORM) > 0.1:
            problems.append(f"the head is {norm:.2f} long with bias {bias:.4f}, not {KNOWN_NORM:.2f} and {KNOWN_BIAS}")
        if not _tells_apart(self.engine[0], captions, [self.prepare(picture) for picture in pictures]):
            problems.append("CLIP does not tell drawn pictures apart")
        ratings = ", ".join(f"{value:.2f}" for value in scores.value)
        if scores.failed.any() or not ((scores.value > 1) & (scores.value < 10)).all():
            problems.append(f"drawn pictures are rated {ratings}, not between 1 and 10")
        return SelfTest(
            passed=not problems,
            summary="; ".join(problems) or f"the head is the official one; drawn pictures are rated {ratings}",
        )


def multiply_out(layers: Mapping[str, Tensor]) -> tuple[NDArray[np.float64], float]:
    """Linear layers without activations as one: the vector float64 [D] and the bias.

    Args:
        layers: ``layers.N.weight`` [out, in] and ``layers.N.bias`` [out], in the order of N; the last has one output.

    Raises:
        ValueError: other keys, or shapes that do not follow one another.
    """
    keys = [key.split(".") for key in layers] if isinstance(layers, Mapping) else []
    numbers = sorted({int(key[1]) for key in keys if len(key) == 3 and key[0] == "layers" and key[1].isdigit()})
    expected = {f"layers.{number}.{kind}" for number in numbers for kind in ("weight", "bias")}
    if not numbers or set(layers) != expected:
        raise ValueError(f"its tensors are {', '.join(sorted(layers)[:4]) if keys else 'none'}")
    matrix, offset = None, np.zeros(0)
    for number in numbers:
        weight, bias = (layers[f"layers.{number}.{kind}"].double().numpy() for kind in ("weight", "bias"))
        matrix, offset = (weight, bias) if matrix is None else (weight @ matrix, weight @ offset + bias)
    if matrix is None or matrix.shape[0] != 1 or offset.shape != (1,):
        raise ValueError("its last layer has more than one output")
    return matrix[0], float(offset[0])


def _tells_apart(encoder: ClipEncoder, captions: list[str], pixels: list[Tensor]) -> bool:
    import torch

    cosines = encoder.text_features(captions) @ encoder.image_features(torch.stack(pixels)).T
    return bool((cosines.argmax(dim=1) == torch.arange(len(captions))).all())
