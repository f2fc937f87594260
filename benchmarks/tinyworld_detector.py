"""OMP_NUM_THREADS=1 python benchmarks/tinyworld_detector.py: how well and how fast pictures are read back.

Draws scenes of the six kinds and reads them clean, after JPEG quality 75 (Pillow's default chroma
subsampling) and after a Gaussian blur of sigma 0.7. A picture is read right when the detector reports, above
GenEval's counting threshold of 0.9, exactly the objects drawn: shape, colour, and every side of the box
within one pixel.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ramctl.scorers.geneval.rules import COUNTING_THRESHOLD, Detection
from ramctl.tinyworld.detector import TinyworldDetector
from ramctl.tinyworld.grammar import KINDS, all_scenes
from ramctl.tinyworld.renderer import DrawnObject, bounding_box, compose, draw_scene, random_background

Picture = NDArray[np.uint8]


def read_right(found: list[Detection], drawn: list[DrawnObject], *, threshold: float = COUNTING_THRESHOLD) -> bool:
    """Whether the detections above the threshold are the drawn objects, boxes within one pixel per side."""
    counted = [d for d in found if d.score > threshold]
    if len(counted) != len(drawn):
        return False
    for obj in drawn:
        box = bounding_box(obj)
        match = next(
            (
                d
                for d in counted
                if (d.class_name, d.color) == (obj.shape, obj.color)
                and max(abs(a - b) for a, b in zip(d.box, box, strict=True)) <= 1
            ),
            None,
        )
        if match is None:
            return False
        counted.remove(match)
    return True


def jpeg(picture: Picture) -> Picture:
    """The picture after Pillow's JPEG at quality 75."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def blur(picture: Picture) -> Picture:
    """The picture after a Gaussian blur of sigma 0.7 pixels."""
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 0.7), dtype=np.uint8)


def main() -> None:
    """Measure and print RESULT lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1200, help="pictures per condition")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-errors", action="store_true", help="print what was drawn and what was read")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    rng = np.random.default_rng(args.seed)
    scenes = all_scenes()
    drawn, pictures = [], []
    for number in range(args.pictures):
        choices = scenes[KINDS[number % len(KINDS)]]
        drawn.append(compose(choices[int(rng.integers(len(choices)))], rng))
        pictures.append(draw_scene(drawn[-1], random_background(rng)))
    detector = TinyworldDetector()
    detector.load()
    conditions: dict[str, Callable[[Picture], Picture]] = {
        "clean": lambda p: p,
        "jpeg75": jpeg,
        "blur0.7": blur,
    }
    for name, change in conditions.items():
        changed = np.stack([change(p) for p in pictures])
        start = time.perf_counter()
        found = detector.detect(changed)
        spent = time.perf_counter() - start
        right = [read_right(f, d) for f, d in zip(found, drawn, strict=True)]
        print(f"RESULT {name}_accuracy={np.mean(right):.4f}")
        print(f"RESULT {name}_ms_per_image={1000 * spent / len(pictures):.3f}")
        if args.show_errors:
            for good, f, d in zip(right, found, drawn, strict=True):
                if not good:
                    print("drawn", [(o.shape, o.color, bounding_box(o)) for o in d], "\n read", f)


if __name__ == "__main__":
    main()
