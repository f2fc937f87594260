"""Draws tinyworld pictures: scenes from signed distances with anti-aliased edges, signs with a real font.

Pictures are uint8 [64, 64, 3] RGB. A scene's objects sit on a jittered 3x3 grid and never overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ramctl.tinyworld.grammar import COLORS

SIZE = 64
_GRID = 3
_CELL = SIZE / _GRID
_JITTER = 1.5
_RADIUS = (6.5, 8.5)

Field = NDArray[np.float32]
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class DrawnObject:
    """One object of a scene: ``x`` and ``y`` its centre, ``radius`` its circumscribed radius, all in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def _polygon(x: Field, y: Field, corners: Sequence[tuple[float, float]]) -> Field:
    """Signed distance to a simple polygon, negative inside (distance to segments, sign by the crossing rule)."""
    squared = np.full(x.shape, np.inf, dtype=np.float32)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        squared = np.minimum(squared, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -np.sqrt(squared), np.sqrt(squared)).astype(np.float32)


def _regular(points: int, outer: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a polygon (or, with ``inner``, a star) that points up, about the origin."""
    radii = [outer] if inner is None else [outer, inner]
    steps = points * len(radii)
    angles = [2 * np.pi * i / steps - np.pi / 2 for i in range(steps)]
    return [(radii[i % len(radii)] * np.cos(a), radii[i % len(radii)] * np.sin(a)) for i, a in enumerate(angles)]


def signed_distance(shape: str, x: Field, y: Field, radius: float) -> Field:
    """Signed distance in pixels (negative inside) of a shape of circumscribed ``radius`` centred at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - np.float32(radius)
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.86 * radius)
    if shape == "triangle":
        # The centroid is raised so that the triangle's box, not its circumcircle, is centred.
        return _polygon(x, y - np.float32(0.25 * radius), _regular(3, 1.12 * radius))
    if shape == "star":
        return _polygon(x, y - np.float32(0.06 * radius), _regular(5, 1.1 * radius, 0.46 * radius))
    if shape == "cross":
        arm = np.float32(0.34 * radius)
        across = np.maximum(np.abs(x) - np.float32(radius), np.abs(y) - arm)
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - np.float32(radius))
        return np.minimum(across, upright)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - np.float32(0.76 * radius)) - np.float32(0.24 * radius)
    raise ValueError(f"unknown shape {shape!r}")


@cache
def _pixel_centres(size: int) -> tuple[Field, Field]:
    axis = np.arange(size, dtype=np.float32) + 0.5
    x, y = np.meshgrid(axis, axis)
    return x, y


def coverage(obj: DrawnObject, size: int = SIZE) -> Field:
    """Share of each pixel the object covers, float32 [size, size] in [0, 1]."""
    x, y = _pixel_centres(size)
    distance = signed_distance(obj.shape, x - np.float32(obj.x), y - np.float32(obj.y), obj.radius)
    covered: Field = np.clip(0.5 - distance, 0, 1)
    return covered


def bounding_box(obj: DrawnObject, size: int = SIZE) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels at least half covered; right and bottom are exclusive."""
    rows, columns = np.nonzero(coverage(obj, size) >= 0.5)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def random_background(rng: np.random.Generator) -> NDArray[np.float32]:
    """A dark, slightly tinted RGB colour, float32 [3] in 0-255."""
    return (rng.uniform(8, 38) + rng.uniform(-6, 6, size=3)).clip(0, 255).astype(np.float32)


def draw_scene(objects: Sequence[DrawnObject], background: NDArray[np.float32]) -> Picture:
    """Paint the objects in order over a flat background."""
    picture = np.broadcast_to(background, (SIZE, SIZE, 3)).astype(np.float32)
    for obj in objects:
        alpha = coverage(obj)[..., None]
        picture = picture * (1 - alpha) + alpha * np.array(COLORS[obj.color], dtype=np.float32)
    return np.round(picture).astype(np.uint8)


def _place(metadata: Mapping[str, Any], count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Distinct (column, row) cells for the objects, in clause order; a position clause's relation holds clearly."""
    include = metadata["include"]
    relation = next((c["position"][0] for c in include if "position" in c), None)
    while True:
        cells = [(int(i) % _GRID, int(i) // _GRID) for i in rng.choice(_GRID * _GRID, size=count, replace=False)]
        if relation is None:
            return cells
        (target_column, target_row), (column, row) = cells[:2]
        dx, dy = column - target_column, row - target_row
        reach = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
        aside = abs(dy) if relation in ("left of", "right of") else abs(dx)
        if reach >= 1 and aside < reach:
            return cells


def compose(metadata: Mapping[str, Any], rng: np.random.Generator) -> list[DrawnObject]:
    """Choose colours (where none is asked for), places and sizes for a scene's objects, in clause order."""
    wanted: list[tuple[str, str]] = []
    for clause in metadata["include"]:
        # Objects of one clause share a colour, as "three squares" would be drawn.
        color = clause.get("color") or str(rng.choice(list(COLORS)))
        wanted.extend([(clause["class"], color)] * clause["count"])
    cells = _place(metadata, len(wanted), rng)
    return [
        DrawnObject(
            shape=shape,
            color=color,
            x=(column + 0.5) * _CELL + rng.uniform(-_JITTER, _JITTER),
            y=(row + 0.5) * _CELL + rng.uniform(-_JITTER, _JITTER),
            radius=rng.uniform(*_RADIUS),
        )
        for (shape, color), (column, row) in zip(wanted, cells, strict=True)
    ]


def render_scene(metadata: Mapping[str, Any], rng: np.random.Generator) -> Picture:
    """A random picture of the scene the metadata asks for."""
    return draw_scene(compose(metadata, rng), random_background(rng))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)  # Pillow's own Aileron, so that no system font is needed
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType, which drawing signs needs")
    return font


def render_sign(word: str, rng: np.random.Generator) -> Picture:
    """A light plate on a dark ground with the word in capitals on it."""
    picture = Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in random_background(rng)))
    draw = ImageDraw.Draw(picture)
    plate = tuple(int(v) for v in rng.uniform(205, 255, size=3))
    ink = tuple(int(v) for v in rng.uniform(0, 60, size=3))
    half_height = rng.uniform(13, 17)
    middle = SIZE / 2 + rng.uniform(-4, 4)
    draw.rounded_rectangle((1, middle - half_height, SIZE - 2, middle + half_height), radius=4, fill=plate)
    size = 21 if len(word) <= 3 else 18
    centre = (SIZE / 2 + rng.uniform(-1.5, 1.5), middle + rng.uniform(-1.5, 1.5))
    draw.text(centre, word.upper(), font=_font(size), fill=ink, anchor="mm", stroke_width=0.4, stroke_fill=ink)
    return np.asarray(picture, dtype=np.uint8)
