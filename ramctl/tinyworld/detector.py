"""Reads tinyworld pictures back: what shape, what colour, where. Classical measurement, nothing learned.

The flat background is the commonest colour. Pixels are explained as mixtures of the background and one
palette colour; connected regions become objects, split where colours differ or where touching objects part
at their necks. Each object is compared with the six shapes, drawn by the renderer's own signed distance at
the measured size and sub-pixel place; the confidence says how far the best of them coincides with the object
beyond what shapes taken for one another do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramctl.scorers.geneval.rules import Box, Detection
from ramctl.scorers.geneval.scorer import KnownPicture
from ramctl.tinyworld.grammar import COLORS, SHAPES, Metadata, scene_prompt
from ramctl.tinyworld.renderer import render_scene, signed_distance

Floats = NDArray[np.float32]
Bits = NDArray[np.uint8]
Picture = NDArray[np.uint8]

_NAMES = tuple(COLORS)
_PALETTE = np.array([COLORS[name] for name in _NAMES], dtype=np.float32)
#: RGB to luminance and damped chrominance: JPEG and autoencoders smear chrominance over a few pixels, so that
#: edges are measured mostly by luminance.
_MEASURE = np.array(
    [[0.299, 0.587, 0.114], [-0.0676, -0.1324, 0.2], [0.2, -0.1676, -0.0324]], dtype=np.float32
).T.copy()

_HALF, _PER_UNIT = 1.75, 64  # a template covers ±_HALF radii with _PER_UNIT samples per radius
#: Widths in pixels of the edges a shape may be drawn with: the renderer's, and that of a slightly blurred
#: picture.
_EDGES = (1.0, 2.4)
_MIN_CONTRAST = 50.0  # RGB distance of an object from the background
_MAX_COLOR_DISTANCE = 75.0  # RGB distance beyond which a colour is none of the palette's
_SPLIT_DISTANCE = 60.0  # RGB distance of two parts that makes them two objects
_NOISE = 0.06  # coverage below this is the picture's noise
_MIN_CONFIDENCE = 0.1
_DEPTHS = (0.2, 0.35, 0.5, 0.65, 0.8)  # shares of a region's depth at which touching objects may part
_MOST_PARTS = 9  # a region that falls into more pieces is noise, not touching objects
#: Share of the way from chance overlap to perfect overlap that counts as certain.
_CERTAIN = 0.34
#: Least chance overlap, where the other shapes are too unlike to give one: most compact blobs overlap with a
#: triangle of their area by this much, and a piece of a ring with a ring.
_FLOOR = {"triangle": 0.74, "ring": 0.6}


@dataclass(frozen=True)
class _Template:
    """A shape of radius 1 about the origin; ``chance`` is its overlap with the likest other shape."""

    name: str
    distance: Floats
    area: float
    cx: float
    cy: float
    chance: float


@dataclass(frozen=True)
class _Region:
    """Pixels of one object: ``mask`` uint8 {0, 1} [H, W], ``box`` (left, top, right, bottom)."""

    mask: Bits
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class _Canvas:
    """A picture taken apart.

    rgb: float32 [H, W, 3] less the background; measured: the same in luminance and damped chrominance; label:
    int [H, W], nearest palette colour; mask: uint8 [H, W], 1 where at least half covered by an object.
    """

    rgb: Floats
    measured: Floats
    label: NDArray[np.intp]
    mask: Bits
    background: Floats

    @property
    def min_area(self) -> int:
        """Smaller regions are specks, in pixels."""
        return max(10, round(0.005 * self.mask.size))


def _overlap(a: Floats, b: Floats) -> float:
    return float(np.minimum(a, b).sum() / max(float(np.maximum(a, b).sum()), 1e-6))


def _make_templates() -> list[_Template]:
    axis = np.arange(round(2 * _HALF * _PER_UNIT) + 1, dtype=np.float32) / _PER_UNIT - np.float32(_HALF)
    x, y = (grid.astype(np.float32) for grid in np.meshgrid(axis, axis))
    bare = []
    for name in SHAPES:
        distance = np.ascontiguousarray(signed_distance(name, x, y, 1.0), dtype=np.float32)
        inside = np.clip(0.5 - distance * _PER_UNIT, 0, 1)
        total = float(inside.sum())
        centroid = float((inside * x).sum()) / total, float((inside * y).sum()) / total
        bare.append(_Template(name, distance, total / _PER_UNIT**2, *centroid, chance=0.0))
    made = []
    for template in bare:
        drawn = _draw(template, 0.0, 0.0, 20.0, (-40, -40, 40, 40))
        rivals = [_draw(other, *_place(other, float(drawn.sum()), 0, 0), (-40, -40, 40, 40)) for other in bare]
        chance = max(_overlap(drawn, r) for r, other in zip(rivals, bare, strict=True) if other is not template)
        made.append(_Template(**{**template.__dict__, "chance": max(chance, _FLOOR.get(template.name, 0.0))}))
    return made


def _place(template: _Template, area: float, cx: float, cy: float) -> tuple[float, float, float]:
    """(x, y, radius) of the shape with this area and centroid, in pixels."""
    radius = (area / template.area) ** 0.5
    return cx - template.cx * radius, cy - template.cy * radius, radius


def _distance(template: _Template, x: float, y: float, radius: float, window: tuple[int, int, int, int]) -> Floats:
    """Signed distance in pixels of the shape over a window (left, top, right, bottom) of pixels."""
    import cv2

    left, top, right, bottom = window
    step, middle = _PER_UNIT / radius, _HALF * _PER_UNIT
    to_template = np.array([[step, 0, (left + 0.5 - x) * step + middle], [0, step, (top + 0.5 - y) * step + middle]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (right - left, bottom - top)
    sampled = cv2.warpAffine(template.distance, to_template, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(sampled, dtype=np.float32) * np.float32(radius)


def _draw(template: _Template, x: float, y: float, radius: float, window: tuple[int, int, int, int]) -> Floats:
    drawn: Floats = np.clip(0.5 - _distance(template, x, y, radius, window), 0, 1)
    return drawn


def _find_background(picture: Picture) -> Floats:
    """The commonest colour, float32 [3]: the fullest of 16³ bins, then twice the mean of its surroundings."""
    flat = picture.reshape(-1, 3)
    coarse = (flat >> 4).astype(np.int32)
    codes = (coarse[:, 0] << 8) | (coarse[:, 1] << 4) | coarse[:, 2]
    best = int(np.bincount(codes, minlength=4096).argmax())
    centre = np.array([best >> 8, (best >> 4) & 15, best & 15], dtype=np.float32) * 16 + 8
    for _ in range(2):
        near = (np.abs(flat - centre) < 20).all(axis=1)
        if near.any():
            centre = flat[near].mean(axis=0, dtype=np.float32)
    return centre


def _take_apart(picture: Picture) -> _Canvas:
    background = _find_background(picture)
    rgb: Floats = picture.astype(np.float32) - background
    measured: Floats = rgb @ _MEASURE
    towards = _PALETTE - background
    towards_measured = towards @ _MEASURE
    lengths = np.maximum((towards**2).sum(axis=1), 1.0)
    label = np.full(picture.shape[:2], -1, dtype=np.intp)
    mask = np.zeros(picture.shape[:2], dtype=np.uint8)
    rows, columns = np.nonzero((rgb**2).sum(axis=2) > (0.5 * _MIN_CONTRAST) ** 2)
    if len(rows):
        pixels = rgb[rows, columns]
        # The palette colour whose line to the background passes nearest: edges keep their object's colour.
        along = pixels @ towards.T
        share = np.clip(along / lengths, 0, 1)
        nearest = (share * share * lengths - 2 * share * along).argmin(axis=1)
        chosen = towards_measured[nearest]
        covered = (measured[rows, columns] * chosen).sum(axis=1)
        label[rows, columns] = nearest
        mask[rows, columns] = covered >= 0.5 * (chosen**2).sum(axis=1)
    return _Canvas(rgb, measured, label, mask, background)


def _regions(mask: Bits, min_area: int) -> list[_Region]:
    """4-connected regions of at least ``min_area`` pixels, largest first, at most 32 of them."""
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4, ltype=cv2.CV_32S)
    found = []
    for number in range(1, len(stats)):
        left, top, width, height, area = (int(v) for v in stats[number])
        if area >= min_area:
            box = (left, top, left + width, top + height)
            found.append((area, number, box))
    found.sort(reverse=True)
    return [_Region((labels == number).astype(np.uint8), box, area) for area, number, box in found[:32]]


def _core(region: _Region) -> Bits:
    """The region's inner pixels, which show its colour unmixed; all of them where it is too thin."""
    import cv2

    inner = cv2.erode(region.mask, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_REPLICATE)
    return np.asarray(inner if int(inner.sum()) >= 6 else region.mask, dtype=np.uint8)


def _split_by_color(canvas: _Canvas, region: _Region) -> list[_Region]:
    """The parts of a region that have clearly different palette colours; itself when it has one."""
    core = _core(region) > 0
    counts = np.bincount(canvas.label[core], minlength=len(_NAMES))
    least = max(0.1 * counts.sum(), 0.4 * canvas.min_area)
    present = [int(k) for k in np.nonzero(counts >= least)[0]]
    if len(present) < 2:
        return [region]
    means = [canvas.rgb[core & (canvas.label == k)].mean(axis=0) for k in present]
    apart = [float(np.linalg.norm(a - b)) for i, a in enumerate(means) for b in means[:i]]
    if max(apart) < _SPLIT_DISTANCE:
        return [region]
    parts: list[_Region] = []
    for k in present:
        own = region.mask * (canvas.label == k).astype(np.uint8)
        parts.extend(_regions(own, canvas.min_area))
    return parts if len(parts) > 1 else [region]


def _split_at_necks(region: _Region, min_area: int) -> list[list[_Region]]:
    """Ways to part touching objects of one colour: what is left of the region beyond several depths."""
    import cv2

    left, top, right, bottom = region.box
    own = region.mask[top:bottom, left:right]
    depth = cv2.distanceTransform(np.pad(own, 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    ways: list[list[_Region]] = []
    for level in _DEPTHS:
        seeds = _regions((depth > level * depth.max()).astype(np.uint8), 2)
        if not 2 <= len(seeds) <= _MOST_PARTS:
            continue
        nearest = np.stack([_to_nearest(seed.mask) for seed in seeds]).argmin(axis=0)
        parts = []
        for number in range(len(seeds)):
            mask = np.zeros_like(region.mask)
            mask[top:bottom, left:right] = own & (nearest == number)
            parts.extend(_regions(mask, min_area)[:1])
        if len(parts) > 1 and [p.area for p in parts] not in [[p.area for p in way] for way in ways]:
            ways.append(parts)
    return ways


def _to_nearest(mask: Bits) -> Floats:
    """Distance of each pixel from the mask."""
    import cv2

    return np.asarray(cv2.distanceTransform(1 - mask, cv2.DIST_L2, 3), dtype=np.float32)


class TinyworldDetector:
    """Finds shapes in tinyworld pictures (64x64 is the norm, any size works; objects scale with the picture).

    ``score`` is above 0.9 (GenEval's counting threshold) for a clean shape and low for a blob that is none. A
    detection's ``color`` is None when it is none of the palette's.
    """

    name = "tinyworld"
    version = "1"
    class_names: Sequence[str] = SHAPES
    colors: Sequence[str] = _NAMES

    def __init__(self) -> None:
        self._templates: list[_Template] = []

    def load(self) -> None:
        """Draw the templates (a few milliseconds)."""
        if not self._templates:
            self._templates = _make_templates()

    def detect(self, images: Picture) -> list[list[Detection]]:
        """Objects of each picture, most confident first; images uint8 [N, H, W, 3] RGB."""
        self.load()
        return [self._detect_one(np.ascontiguousarray(image)) for image in images]

    def examples(self) -> list[KnownPicture]:
        """Pictures of every kind, drawn for the prompt beside them or with one thing wrong."""
        rng = np.random.default_rng(7)
        return [
            KnownPicture(render_scene(drawn, rng), scene_prompt(asked), strict=strict)
            for asked, drawn, strict in _examples()
        ]

    def _detect_one(self, picture: Picture) -> list[Detection]:
        if min(picture.shape[:2]) < 8:
            return []
        canvas = _take_apart(picture)
        found: list[Detection] = []
        for whole in _regions(canvas.mask, canvas.min_area):
            for region in _split_by_color(canvas, whole):
                found.extend(self._read_parted(canvas, region))
        found = [d for d in found if d.score >= _MIN_CONFIDENCE]
        return sorted(found, key=lambda d: -d.score)

    def _read_parted(self, canvas: _Canvas, region: _Region) -> list[Detection]:
        """Read a region as one object, or as several touching ones where that explains it better."""
        best = [self._read(canvas, region)]
        confidence = best[0].score
        if confidence > 0.9 or region.area < 2 * canvas.min_area:
            return best
        for parts in _split_at_necks(region, canvas.min_area):
            read = [self._read(canvas, part) for part in parts]
            weights = [part.area for part in parts]
            mean = float(np.average([d.score for d in read], weights=weights))
            if mean > confidence + 0.1:
                best, confidence = read, mean
        return best

    def _read(self, canvas: _Canvas, region: _Region) -> Detection:
        rgb = canvas.rgb[_core(region) > 0].mean(axis=0)
        window = _window(region, canvas)
        covered = _coverage(canvas, region, window, rgb)
        area = float(covered.sum())
        contrast = float(np.linalg.norm(rgb))
        nothing = Detection(SHAPES[0], 0.0, _as_box(region.box))
        if area < 1 or contrast < _MIN_CONTRAST:
            return nothing
        left, top, right, bottom = window
        cx = float(covered.sum(axis=0) @ np.arange(left + 0.5, right)) / area
        cy = float(covered.sum(axis=1) @ np.arange(top + 0.5, bottom)) / area
        best, overlap, inside = self._templates[0], -1.0, None
        for template in self._templates:
            distance = _distance(template, *_place(template, area, cx, cy), window)
            for width in _EDGES:
                found = _overlap(covered, np.clip(0.5 - distance / np.float32(width), 0, 1))
                if found > overlap:
                    best, overlap, inside = template, found, distance <= 0
        confidence = min(max((overlap - best.chance) / (1 - best.chance) / _CERTAIN, 0.0), 1.0)
        box = _extent(inside, window) if inside is not None and confidence > 0.3 else None
        return Detection(best.name, confidence, _as_box(box or region.box), _color_word(rgb + canvas.background))


def _window(region: _Region, canvas: _Canvas) -> tuple[int, int, int, int]:
    """The region's box with a margin for its soft edge, inside the picture."""
    height, width = canvas.mask.shape
    margin = max(2, max(height, width) // 32)
    left, top, right, bottom = region.box
    return (
        max(left - margin, 0),
        max(top - margin, 0),
        min(right + margin, width),
        min(bottom + margin, height),
    )


def _coverage(canvas: _Canvas, region: _Region, window: tuple[int, int, int, int], rgb: Floats) -> Floats:
    """How much of each pixel of the window the region's object covers, float32 in [0, 1]."""
    left, top, right, bottom = window
    colour = rgb @ _MEASURE
    covered = canvas.measured[top:bottom, left:right] @ colour / max(float(colour @ colour), 1.0)
    np.clip(covered, 0, 1, out=covered)
    covered[covered < _NOISE] = 0
    own = region.mask[top:bottom, left:right]
    rest = canvas.mask[top:bottom, left:right] & (1 - own)
    if rest.any():
        covered[_to_nearest(rest) < _to_nearest(own)] = 0
    return np.asarray(covered, dtype=np.float32)


def _extent(inside: NDArray[np.bool_], window: tuple[int, int, int, int]) -> tuple[int, int, int, int] | None:
    columns, rows = np.nonzero(inside.any(axis=0))[0], np.nonzero(inside.any(axis=1))[0]
    if not len(columns):
        return None
    left, top = window[:2]
    return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1


def _as_box(box: tuple[int, int, int, int]) -> Box:
    return float(box[0]), float(box[1]), float(box[2]), float(box[3])


def _color_word(rgb: Floats) -> str | None:
    distances = np.linalg.norm(_PALETTE - rgb, axis=1)
    nearest = int(distances.argmin())
    return _NAMES[nearest] if distances[nearest] <= _MAX_COLOR_DISTANCE else None


def _examples() -> list[tuple[Metadata, Metadata, bool]]:
    """(asked for, drawn, whether the picture is strictly right), two of each kind."""

    def scene(tag: str, *include: Metadata) -> Metadata:
        return {"tag": tag, "include": [{"count": 1, **clause} for clause in include]}

    def position(relation: str) -> Metadata:
        return scene("position", {"class": "ring"}, {"class": "star", "position": [relation, 0]})

    single = scene("single_object", {"class": "star"})
    two = scene("two_object", {"class": "circle"}, {"class": "cross"})
    three = scene("counting", {"class": "square", "count": 3})
    three["exclude"] = [{"class": "square", "count": 4}]
    red, pink = (scene("colors", {"class": "ring", "color": color}) for color in ("red", "pink"))
    colors = [("blue", "yellow"), ("yellow", "blue")]
    pair, swapped = (
        scene("color_attr", {"class": "triangle", "color": a}, {"class": "square", "color": b}) for a, b in colors
    )
    return [
        (single, single, True),
        (single, scene("single_object", {"class": "triangle"}), False),
        (two, two, True),
        (two, scene("two_object", {"class": "circle"}), False),
        (three, three, True),
        (three, scene("counting", {"class": "square", "count": 4}), False),
        (red, red, True),
        (red, pink, False),
        (position("left of"), position("left of"), True),
        (position("left of"), position("right of"), False),
        (pair, pair, True),
        (pair, swapped, False),
    ]
