"""HPSv2.1 (arXiv 2306.09341): human preference, by an open_clip ViT-H/14 trained on comparisons of pictures.

The rule: the cosine of picture and prompt, without a temperature; 0.15 to 0.35 for most pictures. Tables in papers
multiply by 100. It compares pictures of one prompt only, and v2.0 and v2.1 cannot be compared.

As published, the picture is shrunk as a float tensor until its longest side is 224 (bicubic with antialiasing, which
torchvision does since 0.17; values beyond 0 and 1 stay), padded to a square with black before the channel means are
taken off, and the prompt is cleaned in open_clip's way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ramctl.errors import MissingDependencyError
from ramctl.scorers.base import Floats, Images, ImageScore
from ramctl.scorers.clip_scorer import ClipScorer, cosine

if TYPE_CHECKING:
    from torch import Tensor

    from ramctl.scorers.clip import ClipEncoder

WEIGHTS = "hpsv2.1"
WEIGHTS_FILE = "HPS_v2.1_compressed.pt"
#: All CLIPs share one vocabulary; this entry holds nothing else.
VOCABULARY = "clip-vit-h14-tokenizer"

#: open_clip's ViT-H-14; its layers and widths are read off the checkpoint, these cannot be.
ACTIVATION = "gelu"
VISION_HEAD_WIDTH = 80
TEXT_HEAD_WIDTH = 64


def fit_longest(image: Images, size: int) -> Tensor:
    """The published preparation: longest side to ``size``, black borders, then CLIP's mean and deviation.

    Args:
        image: uint8 [H, W, 3] RGB.
        size: side of the result in pixels.

    Returns:
        float32 [3, size, size], normalised.

    Raises:
        DataError: a picture without pixels.
    """
    from torch.nn.functional import pad

    from ramctl.scorers.clip import normalise, resize_tensor, to_unit

    pixels = to_unit(image)
    scale = size / max(pixels.shape[1:])
    # A strip keeps at least one row: rounded to none it would be no picture.
    height, width = (max(1, round(side * scale)) for side in pixels.shape[1:])
    spare_rows, spare_columns = size - height, size - width
    top, left = spare_rows // 2, spare_columns // 2
    resized = resize_tensor(pixels, height, width, "bicubic")
    return normalise(pad(resized, (left, spare_columns - left, top, spare_rows - top)))


class Hpsv2Scorer(ClipScorer):
    """``value`` = cosine; the detail ``hps_x100`` is the number of the papers' tables.

    Options: see :class:`~ramctl.scorers.clip_scorer.ClipScorer`. ``float32`` takes 4 GB of memory.
    """

    name = "hpsv2"
    rule = "v2.1-cosine"
    value_range = (-1.0, 1.0)

    def encoder_version(self) -> str:
        """Weights, vocabulary, the version of the package that mends prompts, precision."""
        from importlib.metadata import PackageNotFoundError, version

        from ramctl.scorers.clip_tokens import OPEN_CLIP_FILES
        from ramctl.weights import fingerprint

        try:
            mender = f"ftfy-{version('ftfy')}"
        except PackageNotFoundError:
            raise MissingDependencyError(
                "The scorer 'hpsv2' needs the package ftfy, which is not installed: pip install ftfy"
            ) from None
        words = [f"{file.split('.')[0]}-{fingerprint(VOCABULARY, file)}" for file in OPEN_CLIP_FILES]
        return "/".join([f"{WEIGHTS}-{fingerprint(WEIGHTS, WEIGHTS_FILE)}", *words, mender, self.dtype])

    def make_encoder(self) -> ClipEncoder:
        """The CLIP ViT-H/14 of HPSv2.1."""
        from ramctl.scorers.clip import shared_encoder
        from ramctl.scorers.clip_checkpoints import LoadedClip, load_open_clip
        from ramctl.scorers.clip_tokens import open_clip_tokenizer

        def load() -> LoadedClip:
            return load_open_clip(
                WEIGHTS,
                WEIGHTS_FILE,
                activation=ACTIVATION,
                vision_head_width=VISION_HEAD_WIDTH,
                text_head_width=TEXT_HEAD_WIDTH,
            )

        return shared_encoder(
            self.encoder_version(), self.device, self.dtype, load, lambda: open_clip_tokenizer(VOCABULARY)
        )

    def prepare(self, image: Images) -> Tensor:
        """See :func:`fit_longest`."""
        return fit_longest(image, self.engine[0].image_size)

    def judge(self, image: Floats, text: Floats | None) -> ImageScore:
        """The cosine."""
        value = cosine(image, text)
        return ImageScore(value=value, details={"hps_x100": 100 * value})
