"""The JPEG rewards: DDPO's size in kB, with the sign that each of the two names promises."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, Scorer
from ramctl.scorers.jpeg import JpegCompressibility, JpegIncompressibility

PROMPT = Prompt("anything")


def noise(*shape: int) -> Images:
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


def test_the_value_is_the_size_in_thousands_of_bytes_at_quality_95() -> None:
    image = noise(1, 40, 56, 3)
    buffer = io.BytesIO()
    Image.fromarray(image[0]).save(buffer, "JPEG", quality=95)
    scores = JpegIncompressibility().score(image, [PROMPT])
    assert scores.value[0] == pytest.approx(len(buffer.getvalue()) / 1000)
    assert scores.details["kilobytes"][0] == pytest.approx(len(buffer.getvalue()) / 1000)
    assert scores.strict is None


def test_known_sizes_of_large_pictures() -> None:
    flat = np.full((512, 512, 3), 120, dtype=np.uint8)
    sizes = JpegIncompressibility().score(np.stack([flat, noise(512, 512, 3)]), [PROMPT] * 2).value
    np.testing.assert_allclose(sizes, [4.7, 307.9], rtol=0.02)


def test_the_two_rewards_are_each_other_negated() -> None:
    images = np.stack([noise(32, 32, 3), np.zeros((32, 32, 3), dtype=np.uint8)])
    less, more = (scorer.score(images, [PROMPT] * 2) for scorer in (JpegCompressibility(), JpegIncompressibility()))
    np.testing.assert_array_equal(less.value, -more.value)
    np.testing.assert_array_equal(less.details["kilobytes"], more.details["kilobytes"])
    assert less.value[1] > less.value[0]


@pytest.mark.parametrize(
    ("scorer", "expected"), [(JpegCompressibility, (-math.inf, 0)), (JpegIncompressibility, (0, math.inf))]
)
def test_the_range_is_open_on_one_side(scorer: type[Scorer], expected: tuple[float, float]) -> None:
    assert scorer.value_range == expected


def test_one_at_a_time_equals_a_batch() -> None:
    images = noise(8, 24, 24, 3)
    scorer = JpegCompressibility()
    single = [scorer.score(images[i : i + 1], [PROMPT]).value[0] for i in range(8)]
    np.testing.assert_array_equal(scorer.score(images, [PROMPT] * 8).value, single)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (64, 64), (33, 17)])
def test_odd_sizes_are_scored(shape: tuple[int, int]) -> None:
    scores = JpegCompressibility().score(noise(1, *shape, 3), [PROMPT])
    assert not scores.failed[0] and scores.value[0] < 0


def test_a_size_jpeg_cannot_hold_is_failed_not_zero() -> None:
    scores = JpegCompressibility().score(np.zeros((1, 1, 70_000, 3), dtype=np.uint8), [PROMPT])
    assert scores.failed[0] and np.isnan(scores.value[0]) and scores.errors[0]


@pytest.mark.parametrize("scorer", [JpegCompressibility(), JpegIncompressibility()])
def test_self_test_and_version(scorer: Scorer) -> None:
    result = scorer.self_test()
    assert result.passed, result.summary
    import PIL

    assert scorer.name in scorer.version and f"pillow-{PIL.__version__}" in scorer.version and "q95" in scorer.version


def test_the_self_test_notices_another_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramctl.scorers.jpeg.QUALITY", 75)
    assert not JpegCompressibility().self_test().passed
