from __future__ import annotations

import io
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from ramctl.tinyworld.detector import TinyworldDetector
from ramctl.tinyworld.grammar import ALPHABET, COLORS, KINDS, SHAPES, all_scenes
from ramctl.tinyworld.renderer import (
    DrawnObject,
    bounding_box,
    compose,
    draw_scene,
    random_background,
    render_sign,
)

COUNTING, ORDINARY = 0.9, 0.3
DARK = np.array([22, 20, 25], dtype=np.float32)


@pytest.fixture(scope="module")
def detector():
    made = TinyworldDetector()
    made.load()
    return made


@pytest.fixture(scope="module")
def scenes():
    """600 pictures, a hundred of each kind, with what is on them."""
    rng = np.random.default_rng(11)
    choices = all_scenes()
    drawn = []
    for number in range(600):
        rows = choices[KINDS[number % len(KINDS)]]
        drawn.append(compose(rows[int(rng.integers(len(rows)))], rng))
    return drawn, np.stack([draw_scene(objects, random_background(rng)) for objects in drawn])


def jpeg(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def read_right(found, drawn):
    """Exactly the drawn objects above the counting threshold: shape, colour, every side of the box within a
    pixel."""
    counted = [d for d in found if d.score > COUNTING]
    for obj in drawn:
        box = bounding_box(obj)
        same = [d for d in counted if (d.class_name, d.color) == (obj.shape, obj.color)]
        near = [d for d in same if max(abs(a - b) for a, b in zip(d.box, box, strict=True)) <= 1]
        if not near:
            return False
        counted.remove(near[0])
    return not counted


def accuracy(detector, drawn, pictures):
    return np.mean([read_right(f, d) for f, d in zip(detector.detect(pictures), drawn, strict=True)])


def names(detections, threshold=ORDINARY):
    return sorted((d.class_name, d.color) for d in detections if d.score > threshold)


def test_clean_pictures_are_read_exactly(detector, scenes):
    assert accuracy(detector, *scenes) >= 0.99


def test_jpeg_pictures_are_read_exactly(detector, scenes):
    drawn, pictures = scenes
    assert accuracy(detector, drawn, np.stack([jpeg(p) for p in pictures])) >= 0.95


def test_blurred_pictures_are_read_exactly(detector, scenes):
    drawn, pictures = scenes
    assert accuracy(detector, drawn, np.stack([cv2.GaussianBlur(p, (0, 0), 0.7) for p in pictures])) >= 0.95


def test_soft_shapes_still_count(detector):
    for shape in SHAPES:
        for radius in (6.5, 8.5):
            sharp = draw_scene([DrawnObject(shape, "green", 31.3, 33.8, radius)], DARK)
            soft = cv2.GaussianBlur(sharp, (0, 0), 1.0)
            assert names(detector.detect(soft[None])[0], COUNTING) == [(shape, "green")]


def test_every_shape_in_every_colour(detector):
    for shape in SHAPES:
        for color in COLORS:
            picture = draw_scene([DrawnObject(shape, color, 31.3, 33.8, 7.2)], DARK)
            assert names(detector.detect(picture[None])[0], COUNTING) == [(shape, color)]


def test_no_more_than_a_few_milliseconds_per_picture(detector, scenes):
    # The claim is 2 ms on an idle core (benchmarks/tinyworld_detector.py); the margin is for busy test
    # machines.
    best = min(timed(detector, scenes[1][:60]) for _ in range(3))
    assert best < 8


def timed(detector, pictures):
    start = time.perf_counter()
    detector.detect(pictures)
    return 1000 * (time.perf_counter() - start) / len(pictures)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_pictures_hold_nothing(detector, level):
    assert detector.detect(np.full((1, 64, 64, 3), level, np.uint8)) == [[]]


def test_noise_holds_nothing(detector):
    rng = np.random.default_rng(0)
    loud = rng.integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    quiet = np.clip(rng.normal(30, 15, (20, 64, 64, 3)), 0, 255).astype(np.uint8)
    for pictures in (loud, quiet):
        assert not any(names(found) for found in detector.detect(pictures))


def test_cloudy_pictures_hold_hardly_anything(detector):
    rng = np.random.default_rng(1)
    noise = [cv2.GaussianBlur(rng.normal(0, 1, (64, 64, 3)).astype(np.float32), (0, 0), 2) for _ in range(40)]
    pictures = np.stack([np.clip(100 + 60 * n / n.std(), 0, 255).astype(np.uint8) for n in noise])
    found = detector.detect(pictures)
    assert np.mean([len(names(f)) for f in found]) < 0.5
    assert np.mean([len(names(f, COUNTING)) for f in found]) < 0.1


def test_signs_are_not_taken_for_counted_shapes(detector):
    rng = np.random.default_rng(2)
    words = ["".join(rng.choice(list(ALPHABET), 4)) for _ in range(30)]
    pictures = np.stack([render_sign(word, rng) for word in words])
    assert np.mean([len(names(f, COUNTING)) for f in detector.detect(pictures)]) < 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_half_a_shape_is_no_shape(detector, shape):
    picture = draw_scene([DrawnObject(shape, "red", 32, 32, 7.5)], DARK)
    picture[:, :31] = DARK
    assert names(detector.detect(picture[None])[0], COUNTING) == []


@pytest.mark.parametrize(("width", "height"), [(9, 16), (8, 20), (5, 24)])
def test_bars_and_ovals_are_neither_squares_nor_circles(detector, width, height):
    bar, oval = np.full((2, 64, 64, 3), 20, dtype=np.uint8)
    bar[20 : 20 + height, 30 : 30 + width] = COLORS["blue"]
    cv2.ellipse(oval, (32, 32), (width // 2, height // 2), 0, 0, 360, COLORS["red"], -1, cv2.LINE_AA)
    for picture in (bar, oval):
        assert names(detector.detect(picture[None])[0]) == []


def test_confidence_falls_as_a_shape_falls_apart(detector):
    rng = np.random.default_rng(4)
    picture = draw_scene([DrawnObject("star", "yellow", 32, 32, 8)], DARK)
    pushes = [cv2.GaussianBlur(rng.normal(0, 1, (64, 64)).astype(np.float32), (0, 0), 3) for _ in range(2)]
    rows, columns = np.mgrid[0:64, 0:64].astype(np.float32)
    scores = []
    for strength in (0, 1.5, 4):
        dx, dy = (strength * p / p.std() for p in pushes)
        bent = cv2.remap(picture, columns + dx, rows + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        found = detector.detect(bent[None])[0]
        scores.append(max((d.score for d in found if d.class_name == "star"), default=0.0))
    assert scores[0] > COUNTING
    assert scores[0] > scores[1] > scores[2]
    assert scores[2] < ORDINARY


def test_touching_objects_of_different_colours_are_two(detector):
    for shape in SHAPES:
        pair = [DrawnObject(shape, "red", 22, 32, 8), DrawnObject("circle", "blue", 37.5, 32, 7.5)]
        found = detector.detect(draw_scene(pair, DARK)[None])[0]
        assert names(found) == sorted([(shape, "red"), ("circle", "blue")])


def test_touching_objects_of_one_colour_are_two(detector):
    for right in (37.0, 36.0):
        pair = [DrawnObject("circle", "red", 22, 32, 8), DrawnObject("circle", "red", right, 33, 7.5)]
        picture = draw_scene(pair, DARK)
        joined = (picture[32, 22:37, 0] > 120).all()
        assert joined
        assert names(detector.detect(picture[None])[0]) == [("circle", "red"), ("circle", "red")]


def test_shifted_colours_keep_their_names_and_strangers_get_none(detector):
    for color in COLORS:
        picture = draw_scene([DrawnObject("square", color, 32, 32, 8)], DARK)
        shifted = np.clip(picture * np.array([0.92, 1.04, 0.93]) + 3, 0, 255).astype(np.uint8)
        assert names(detector.detect(shifted[None])[0]) == [("square", color)]
    grey = np.full((64, 64, 3), 20, dtype=np.uint8)
    grey[26:38, 26:38] = (150, 145, 140)
    assert [d.color for d in detector.detect(grey[None])[0]] == [None]


def test_a_light_background_is_as_good_as_a_dark_one(detector):
    picture = draw_scene([DrawnObject("cross", "blue", 30, 30, 8)], np.array([230, 230, 225], dtype=np.float32))
    assert names(detector.detect(picture[None])[0], COUNTING) == [("cross", "blue")]


def test_crowded_pictures_are_counted(detector):
    crowd = [
        DrawnObject(SHAPES[i % 6], list(COLORS)[i % 8], 10.67 + 21.33 * (i % 3), 10.67 + 21.33 * (i // 3), 8.5)
        for i in range(9)
    ]
    found = detector.detect(draw_scene(crowd, DARK)[None])[0]
    assert names(found, COUNTING) == sorted((o.shape, o.color) for o in crowd)


@pytest.mark.parametrize("size", [32, 48, 100, 128, 512])
def test_objects_scale_with_the_picture(detector, size):
    picture = draw_scene([DrawnObject("triangle", "green", 20, 24, 8), DrawnObject("ring", "pink", 44, 40, 8)], DARK)
    how = cv2.INTER_AREA if size < 64 else cv2.INTER_LINEAR
    found = detector.detect(cv2.resize(picture, (size, size), interpolation=how)[None])[0]
    assert names(found) == [("ring", "pink"), ("triangle", "green")]


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (7, 9), (8, 8), (33, 65), (512, 32)])
def test_odd_sizes_do_not_crash(detector, shape):
    rng = np.random.default_rng(5)
    pictures = rng.integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    assert len(detector.detect(pictures)) == 2
    assert all(0 <= d.score <= 1 for found in detector.detect(pictures) for d in found)


def test_reading_is_repeatable_and_leaves_the_picture_alone(detector, scenes):
    pictures = scenes[1][:20].copy()
    pictures.flags.writeable = False
    assert detector.detect(pictures) == detector.detect(pictures)
    assert detector.detect(pictures)[3] == detector.detect(pictures[3:4])[0]
