"""How fast and how exact the OCR scorer is on 64x64 signs, for several settings.

    python benchmarks/ocr_speed.py --pictures 48 --settings 320:160:1 192:160:1 192:160:2

A setting is ``detector side:line width:threads``. Each family of pictures shows known words, in one family
misspelled ones; a picture counts as exact when the engine reads what is drawn, letter for letter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from ramctl.prompts import Prompt
from ramctl.scorers.base import Images
from ramctl.scorers.ocr import OcrScorer, normalise, rapid
from ramctl.tinyworld.grammar import misspell, random_word, sign_prompt
from ramctl.tinyworld.renderer import SIZE, render_sign

DEFAULT_SETTINGS = ("320:320:1", "320:160:1", "192:320:1", "192:160:1", "192:160:2", "192:96:1", "128:160:1")


@dataclass(frozen=True)
class Family:
    """Pictures of one kind: the words drawn, uint8 [N, 64, 64, 3], and prompts that ask for these words."""

    name: str
    words: Sequence[str]
    pictures: Images
    prompts: Sequence[Prompt]


def blurred(picture: Images, radius: float) -> Images:
    """Gaussian blur, as of a model that draws soft edges."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)), dtype=np.uint8)


def noisy(picture: Images, deviation: float, rng: np.random.Generator) -> Images:
    """Gaussian noise per channel."""
    return np.clip(picture + rng.normal(0, deviation, picture.shape), 0, 255).astype(np.uint8)


def pale(picture: Images) -> Images:
    """A third of the contrast, slightly blurred."""
    return blurred((picture * 0.35 + 80).astype(np.uint8), 0.8)


def warped(picture: Images, rng: np.random.Generator) -> Images:
    """The corners moved by up to 8 pixels."""
    corners = np.array([0, 0, 0, SIZE, SIZE, SIZE, SIZE, 0]) + rng.uniform(-8, 8, 8)
    image = Image.fromarray(picture).transform(
        (SIZE, SIZE), Image.Transform.QUAD, tuple(corners.tolist()), Image.Resampling.BILINEAR
    )
    return np.asarray(image, dtype=np.uint8)


def families(count: int, seed: int) -> list[Family]:
    """``count`` pictures of each kind."""
    rng = np.random.default_rng(seed)
    words = [random_word(rng) for _ in range(count)]
    changes: dict[str, Callable[[Images], Images]] = {
        "clean": lambda picture: picture,
        "misspelled": lambda picture: picture,
        "blur 1.5": lambda picture: blurred(picture, 1.5),
        "noise 50": lambda picture: noisy(picture, 50, rng),
        "pale": pale,
        "warped": lambda picture: warped(picture, rng),
    }
    made = []
    for name, change in changes.items():
        shown = [misspell(word, rng) for word in words] if name == "misspelled" else words
        pictures = np.stack([change(render_sign(word, rng)) for word in shown])
        made.append(Family(name, shown, pictures, [sign_prompt(word) for word in shown]))
    return made


def measure(setting: str, kinds: Sequence[Family], repeats: int) -> str:
    """One line of the table: exact share / mean reward per family, median milliseconds per picture."""
    side, line_width, threads = (int(number) for number in setting.split(":"))
    rapid.LINE_WIDTH = line_width
    scorer = OcrScorer(detector_side=side, threads=threads)
    # Every thread makes its engine at its first picture; that belongs to no measurement.
    scorer.score(kinds[0].pictures[: 4 * threads], kinds[0].prompts[: 4 * threads])
    cells, times = [], []
    for kind in kinds:
        for _ in range(repeats):
            start = time.perf_counter()
            scores = scorer.score(kind.pictures, kind.prompts)
            times.append((time.perf_counter() - start) / len(kind.words) * 1000)
        read = [normalise(str(record.get("text"))) for record in scores.records]
        exact = sum(text == word for text, word in zip(read, kind.words, strict=True)) / len(read)
        cells.append(f"{exact:.3f}/{np.nanmean(scores.value):.3f}".rjust(14))
    return f"{setting:<12}{''.join(cells)}{statistics.median(times):>10.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=48, help="pictures per family")
    parser.add_argument("--settings", nargs="+", default=DEFAULT_SETTINGS, metavar="SIDE:WIDTH:THREADS")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = families(options.pictures, options.seed)
    print(f"{'setting':<12}{''.join(kind.name.rjust(14) for kind in kinds)}{'ms/image':>10}", flush=True)
    for setting in options.settings:
        print(measure(setting, kinds, options.repeats), flush=True)


if __name__ == "__main__":
    main()
