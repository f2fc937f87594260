"""Inputs no scorer may stumble over, tried on every scorer that can be made without a download.

A scorer joins by a line in SCORERS: how it is made, and a prompt it can use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ramctl.errors import DataError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Scorer, Scores
from ramctl.scorers.registry import create
from ramctl.tinyworld.grammar import KINDS, all_scenes, scene_prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the official file")


@dataclass(frozen=True)
class Case:
    """A scorer of the table.

    ``free_text``: any text is a prompt; else the scorer's own tests try odd ones.
    ``clip``: needs the small CLIP weights.
    """

    make: Callable[[], Scorer]
    prompt: Prompt
    free_text: bool = True
    clip: bool = False


def scene() -> Prompt:
    return scene_prompt(all_scenes()[KINDS[0]][0])


def on_cpu(name: str, **options: Any) -> Case:
    return Case(lambda: create(name, {"device": "cpu", **options}), Prompt("a red circle"), clip=True)


SCORERS: dict[str, Case] = {
    "jpeg-compressibility": Case(lambda: create("jpeg-compressibility"), Prompt("a red circle")),
    "jpeg-incompressibility": Case(lambda: create("jpeg-incompressibility"), Prompt("a red circle")),
    "ocr": Case(lambda: create("ocr", {"detector_side": 192, "threads": 1}), Prompt('a sign "open"'), free_text=False),
    "geneval, tinyworld": Case(lambda: create("geneval", {"detector": "tinyworld"}), scene(), free_text=False),
    "pickscore": on_cpu("pickscore"),
    "hpsv2": on_cpu("hpsv2"),
    "aesthetic": on_cpu("aesthetic"),
    "clipscore, flow_grpo": on_cpu("clipscore"),
    "clipscore, clip": on_cpu("clipscore", variant="clip"),
    "clipscore, hessel": on_cpu("clipscore", variant="hessel"),
}

_RNG = np.random.default_rng(0)


def _noise(*shape: int) -> Any:
    return _RNG.integers(0, 256, shape, dtype=np.uint8)


LARGE = "2048x2048"

#: Every one of these is a picture: uint8, RGB, some pixels.
PICTURES = {
    "noise, 64x64": _noise(1, 64, 64, 3),
    "one pixel": _noise(1, 1, 1, 3),
    "odd sides": _noise(1, 33, 61, 3),
    "tall": _noise(1, 300, 40, 3),
    "a strip of 1x500": _noise(1, 1, 500, 3),
    "a strip of 500x1": _noise(1, 500, 1, 3),
    LARGE: np.kron(_noise(1, 16, 16, 3), np.ones((1, 128, 128, 1), dtype=np.uint8)),
    "black": np.zeros((1, 64, 64, 3), dtype=np.uint8),
    "white": np.full((1, 64, 64, 3), 255, dtype=np.uint8),
    "one grey": np.full((1, 64, 64, 3), 127, dtype=np.uint8),
    "three pictures": _noise(3, 48, 48, 3),
    "a view that is not contiguous": _noise(2, 64, 64, 3)[:, ::-1, ::2],
    "channels first in memory": np.moveaxis(np.ascontiguousarray(_noise(1, 3, 64, 64)), 1, 3),
}

#: None of these is: nothing about them may be guessed.
NOT_PICTURES = {
    "float": np.zeros((1, 64, 64, 3), dtype=np.float32),
    "float with NaN": np.full((1, 64, 64, 3), np.nan, dtype=np.float32),
    "16 bits": np.zeros((1, 64, 64, 3), dtype=np.uint16),
    "yes or no": np.zeros((1, 64, 64, 3), dtype=bool),
    "channels first": np.zeros((1, 3, 64, 64), dtype=np.uint8),
    "grey": np.zeros((1, 64, 64, 1), dtype=np.uint8),
    "grey without channels": np.zeros((1, 64, 64), dtype=np.uint8),
    "RGBA": np.zeros((1, 64, 64, 4), dtype=np.uint8),
    "one picture without its batch": np.zeros((64, 64, 3), dtype=np.uint8),
    "a list": [np.zeros((64, 64, 3), dtype=np.uint8)],
    "nothing": None,
}

TEXTS = {
    "empty": "",
    "spaces": "   ",
    "a line break": "a red\ncircle\t",
    "longer than the encoder": "a red circle and " * 200,
    "emoji": "🔴 and 👩‍👩‍👧",
    "curly quotes": "a “red” circle’s edge",
    "HTML entities": "a &amp;quot;red&amp;quot; &lt;circle&gt; &#128308;",
    "full width": "ｒｅｄ　ｃｉｒｃｌｅ",
    "not Latin": "красный круг 红色圆圈 دائرة",
    "accents apart": "cafe\u0301",
    "zero bytes": "a\x00red\x00circle",
    "the encoder's own marks": "<|endoftext|> a <end_of_text> circle <|startoftext|>",
    "one letter many times": "a" * 5000,
}


@pytest.fixture(scope="module", params=SCORERS)
def case(request: pytest.FixtureRequest) -> Case:
    return SCORERS[request.param]


@pytest.fixture(scope="module")
def scorer(case: Case, request: pytest.FixtureRequest) -> Scorer:
    if case.clip:
        request.getfixturevalue("clip_store")
    made = case.make()
    made.ensure_loaded()
    return made


def check(scores: Scores, scorer: Scorer, count: int) -> None:
    """All scored, with finite values in the declared range."""
    assert len(scores) == count
    assert not scores.failed.any(), scores.errors
    low, high = scorer.value_range
    assert all(math.isfinite(value) and low - 1e-6 <= value <= high + 1e-6 for value in scores.value)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == LARGE else name for name in PICTURES]
)
def test_any_picture_is_scored(scorer: Scorer, case: Case, name: str) -> None:
    images = PICTURES[name]
    before = images.copy()
    check(scorer.score(images, [case.prompt] * len(images)), scorer, len(images))
    np.testing.assert_array_equal(images, before)  # and left as it was


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_anything_else_is_refused_by_name(scorer: Scorer, case: Case, name: str) -> None:
    with pytest.raises(DataError, match=scorer.name) as caught:
        scorer.score(NOT_PICTURES[name], [case.prompt])  # type: ignore[arg-type]
    assert "uint8 [N, H, W, 3]" in str(caught.value)


def test_no_pictures_are_no_scores(scorer: Scorer) -> None:
    assert len(scorer.score(np.zeros((0, 64, 64, 3), dtype=np.uint8), [])) == 0


@pytest.mark.parametrize("prompts", [0, 1, 3])
def test_as_many_prompts_as_pictures(scorer: Scorer, case: Case, prompts: int) -> None:
    with pytest.raises(DataError, match=f"2 images and {prompts} prompts"):
        scorer.score(PICTURES["three pictures"][:2], [case.prompt] * prompts)


@pytest.mark.parametrize("shape", [(2, 0, 64, 3), (2, 64, 0, 3), (2, 0, 0, 3)])
def test_pictures_without_pixels_fail_with_a_reason(scorer: Scorer, case: Case, shape: tuple[int, ...]) -> None:
    scores = scorer.score(np.zeros(shape, dtype=np.uint8), [case.prompt] * 2)
    assert scores.failed.all() and np.isnan(scores.value).all() and all(scores.errors)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("case", [name for name, case in SCORERS.items() if case.free_text], indirect=True)
def test_any_text_is_a_prompt(scorer: Scorer, case: Case, name: str) -> None:
    check(scorer.score(PICTURES["noise, 64x64"], [Prompt(TEXTS[name])]), scorer, 1)


def test_the_same_picture_and_prompt_twice_score_the_same(scorer: Scorer, case: Case) -> None:
    images = np.concatenate([PICTURES["noise, 64x64"]] * 2)
    first, second = scorer.score(images, [case.prompt] * 2).value
    assert first == pytest.approx(second, abs=1e-6)
