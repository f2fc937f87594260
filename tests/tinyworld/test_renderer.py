from __future__ import annotations

import numpy as np
import pytest

from ramctl.scorers.geneval.rules import Detection, judge, parse_task
from ramctl.tinyworld.grammar import COLORS, KINDS, SHAPES, all_scenes, corrupt
from ramctl.tinyworld.renderer import (
    SIZE,
    DrawnObject,
    bounding_box,
    compose,
    coverage,
    draw_scene,
    random_background,
    render_scene,
    render_sign,
    signed_distance,
)

SCENES = all_scenes()
DARK = np.array([20, 20, 20], dtype=np.float32)


def sample(kind, count, seed):
    rng = np.random.default_rng(seed)
    rows = SCENES[kind]
    return [(row := rows[int(rng.integers(len(rows)))], compose(row, rng)) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_true_box_is_where_the_paint_is(shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y, radius = rng.uniform(20, 44), rng.uniform(20, 44), rng.uniform(6.5, 8.5)
        obj = DrawnObject(shape, "white", x, y, radius)
        left, top, right, bottom = bounding_box(obj)
        painted = draw_scene([obj], np.zeros(3, dtype=np.float32))[..., 0] > 0.5 * COLORS["white"][0]
        rows, columns = np.nonzero(painted)
        assert abs(left - columns.min()) <= 1 and abs(right - 1 - columns.max()) <= 1
        assert abs(top - rows.min()) <= 1 and abs(bottom - 1 - rows.max()) <= 1
        # The box is centred on the object, so that relations measured on boxes are those of the places.
        assert abs((left + right) / 2 - x) <= 1 and abs((top + bottom) / 2 - y) <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distance_scales_with_the_radius(shape):
    x, y = np.meshgrid(np.linspace(-2, 2, 41, dtype=np.float32), np.linspace(-2, 2, 41, dtype=np.float32))
    unit = signed_distance(shape, x, y, 1.0)
    assert np.allclose(signed_distance(shape, 7 * x, 7 * y, 7.0), 7 * unit, atol=1e-3)
    assert unit.min() < 0 < unit.max()


def test_an_unknown_shape_is_refused():
    x = np.zeros((1, 1), dtype=np.float32)
    with pytest.raises(ValueError, match="hexagon"):
        signed_distance("hexagon", x, x, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_objects_neither_overlap_nor_leave_the_picture(kind):
    for _, objects in sample(kind, 60, seed=1):
        covers = [coverage(obj) for obj in objects]
        assert np.sum(covers, axis=0).max() <= 1.001
        for cover in covers:
            edge = np.concatenate([cover[0], cover[-1], cover[:, 0], cover[:, -1]])
            assert edge.max() < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_composed_scene_is_right_by_the_rules(kind):
    """True boxes, so this holds the renderer to GenEval's relation rule."""
    for metadata, objects in sample(kind, 150, seed=2):
        boxes = [tuple(float(v) for v in bounding_box(obj)) for obj in objects]
        seen = [Detection(o.shape, 1.0, box, o.color) for o, box in zip(objects, boxes, strict=True)]
        verdict = judge(seen, parse_task(metadata))
        assert verdict.official and verdict.strict and verdict.partial == 1, (metadata, verdict.reasons)


def test_every_position_prompt_holds_its_relation():
    rng = np.random.default_rng(3)
    for metadata in SCENES["position"]:
        for _ in range(3):
            objects = compose(metadata, rng)
            seen = [Detection(o.shape, 1.0, tuple(map(float, bounding_box(o)))) for o in objects]
            assert judge(seen, parse_task(metadata)).strict


@pytest.mark.parametrize("kind", KINDS)
def test_corrupted_scenes_can_be_drawn_and_are_wrong(kind):
    rng = np.random.default_rng(4)
    for metadata, _ in sample(kind, 100, seed=4):
        objects = compose(corrupt(metadata, rng), rng)
        seen = [Detection(o.shape, 1.0, tuple(map(float, bounding_box(o))), o.color) for o in objects]
        assert not judge(seen, parse_task(metadata)).strict


def test_objects_of_one_clause_share_a_colour():
    for _, objects in sample("counting", 50, seed=5):
        assert len({obj.color for obj in objects}) == 1


def test_paint_has_the_palettes_colours_on_a_dark_ground():
    for color, rgb in COLORS.items():
        picture = draw_scene([DrawnObject("circle", color, 32, 32, 8)], DARK)
        assert tuple(picture[32, 32]) == rgb
        assert tuple(picture[2, 2]) == (20, 20, 20)
    rng = np.random.default_rng(6)
    assert max(random_background(rng).max() for _ in range(200)) < 60


def test_edges_are_anti_aliased():
    cover = coverage(DrawnObject("circle", "red", 32.3, 31.6, 7.4))
    assert ((cover > 0.1) & (cover < 0.9)).sum() > 20
    assert cover.sum() == pytest.approx(np.pi * 7.4**2, rel=0.01)


def test_pictures_are_a_function_of_the_generator():
    metadata = SCENES["color_attr"][17]
    one, two, other = (render_scene(metadata, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape == (SIZE, SIZE, 3) and one.dtype == np.uint8
    assert (one == two).all()
    assert (one != other).any()


@pytest.mark.parametrize("word", ["cat", "moon", "wade", "iii"])
def test_signs_show_dark_letters_on_a_light_plate(word):
    picture = render_sign(word, np.random.default_rng(7))
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    light = picture.min(axis=2) > 190
    rows, columns = np.nonzero(light)
    assert light.sum() > 800
    inside = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].max(axis=2) < 100
    ink = np.nonzero(inside[:, 3:-3])[1]
    # The word fits: no ink in the plate's outermost columns.
    assert len(ink) > 40
    assert ink.min() > 0 and ink.max() < inside.shape[1] - 7


def test_different_words_make_different_signs():
    cat, cap = (render_sign(word, np.random.default_rng(8)) for word in ("cat", "cap"))
    assert (cat != cap).any()
