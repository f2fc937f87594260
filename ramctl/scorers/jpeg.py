"""How large a picture is as a JPEG: the two rewards of DDPO (arXiv 2305.13301) that need no model.

The size is taken at quality 95 with Pillow's default chroma subsampling, in kB of 1000 bytes, as in DDPO's
code. Other implementations divide the compressibility by 500; since advantages are scaled by their deviation,
that changes no training.
"""

from __future__ import annotations

import io
import math
from typing import ClassVar

import numpy as np
from PIL import Image, features
from PIL import __version__ as pillow_version

from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, SelfTest

QUALITY = 95

#: The test pictures' expected kB, and the share another JPEG library may be off: each rounds in its own way.
_KNOWN_KB = {"flat": 4.7, "noise": 307.9}
_TOLERANCE = 0.05


def jpeg_kilobytes(image: Images) -> float:
    """Size of ``uint8 [H, W, 3]`` RGB as a JPEG of quality 95, in kB (1000 bytes)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


class _JpegScorer(Scorer):
    _sign: ClassVar[float]

    @property
    def version(self) -> str:
        """Rule, quality, and the versions of Pillow and its JPEG library, on which the last bytes depend."""
        library = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg"
        number = features.version("libjpeg_turbo" if library == "libjpeg-turbo" else "jpg")
        return f"{self.name}/ddpo-kB-q{QUALITY}/pillow-{pillow_version}/{library}-{number}"

    def score_image(self, image: Images, prompt: Prompt) -> ImageScore:
        """Score one picture; the prompt is not read."""
        kilobytes = jpeg_kilobytes(image)
        return ImageScore(value=self._sign * kilobytes, details={"kilobytes": kilobytes})

    def self_test(self) -> SelfTest:
        """A flat and a noisy picture of 512x512 pixels have the known sizes and the right order."""
        rng = np.random.default_rng(0)
        pictures = {
            "flat": np.full((512, 512, 3), 120, dtype=np.uint8),
            "noise": rng.integers(0, 256, (512, 512, 3), dtype=np.uint8),
        }
        scores = self.score(np.stack(list(pictures.values())), [Prompt("a picture")] * len(pictures))
        sizes = {name: self._sign * float(value) for name, value in zip(pictures, scores.value, strict=True)}
        passed = all(abs(sizes[name] - known) <= _TOLERANCE * known for name, known in _KNOWN_KB.items())
        summary = ", ".join(f"{name} {size:.1f} kB (expected {_KNOWN_KB[name]})" for name, size in sizes.items())
        return SelfTest(passed=passed, summary=summary)


class JpegCompressibility(_JpegScorer):
    """Minus the JPEG size in kB."""

    name = "jpeg-compressibility"
    value_range = (-math.inf, 0.0)
    _sign = -1.0


class JpegIncompressibility(_JpegScorer):
    """The JPEG size in kB."""

    name = "jpeg-incompressibility"
    value_range = (0.0, math.inf)
    _sign = 1.0
