from __future__ import annotations

import numpy as np
import pytest

from ramctl.errors import DataError
from ramctl.image_stats import MAX_IMAGES, image_statistics


def flat(*color: int, count: int = 2, side: int = 16) -> np.ndarray:
    return np.broadcast_to(np.array(color, dtype=np.uint8), (count, side, side, 3)).copy()


def test_one_colour_has_no_edges_and_no_entropy() -> None:
    assert image_statistics(flat(128, 128, 128)) == {"edges": 0.0, "saturation": 0.0, "entropy": 0.0}
    assert image_statistics(flat(0, 0, 0))["saturation"] == 0.0


def test_saturation_is_that_of_hsv() -> None:
    assert image_statistics(flat(255, 0, 0))["saturation"] == pytest.approx(1.0)
    assert image_statistics(flat(200, 100, 100))["saturation"] == pytest.approx(0.5)


def test_two_colours_in_halves_are_one_bit_and_one_line_of_edges() -> None:
    images = flat(255, 255, 255)
    images[:, :, 8:] = 0
    stats = image_statistics(images)
    assert stats["entropy"] == pytest.approx(1.0)
    assert stats["edges"] == pytest.approx(1 / 16)


def test_colours_spread_evenly_reach_nine_bits() -> None:
    levels = np.arange(8, dtype=np.uint8) * 32
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, 16, 32, 3)
    assert image_statistics(cube)["entropy"] == pytest.approx(9.0)


def test_statistics_are_means_over_pictures() -> None:
    both = np.concatenate([flat(255, 0, 0, count=1), flat(128, 128, 128, count=1)])
    assert image_statistics(both)["saturation"] == pytest.approx(0.5)


def test_a_wiped_background_lowers_edges_and_entropy() -> None:
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    wiped = noisy.copy()
    wiped[:, :, :20] = 255
    before, after = image_statistics(noisy), image_statistics(wiped)
    assert after["edges"] < 0.6 * before["edges"]
    assert after["entropy"] < 0.8 * before["entropy"]


def test_many_and_large_pictures_are_sampled() -> None:
    many = np.concatenate([flat(255, 0, 0, count=3 * MAX_IMAGES, side=4), flat(9, 9, 9, count=3 * MAX_IMAGES, side=4)])
    assert image_statistics(many)["saturation"] == pytest.approx(0.5, abs=0.01)
    assert image_statistics(flat(255, 0, 0, count=1, side=1024))["saturation"] == pytest.approx(1.0)


def test_no_pictures_have_no_statistics() -> None:
    assert image_statistics(np.zeros((0, 8, 8, 3), dtype=np.uint8)) == {}


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), dtype=np.float32),
        np.zeros((2, 3, 8, 8), dtype=np.uint8),
        np.zeros((8, 8, 3), dtype=np.uint8),
        np.zeros((2, 0, 8, 3), dtype=np.uint8),
    ],
)
def test_anything_else_is_refused(images: np.ndarray) -> None:
    with pytest.raises(DataError, match="Image statistics take"):
        image_statistics(images)
