"""The pretraining pictures: captions and renderings, many at once, in worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramctl.tinyworld.grammar import (
    Metadata,
    all_scenes,
    corrupt,
    misspell,
    random_word,
    scene_prompt,
    sign_prompt,
)
from ramctl.tinyworld.renderer import SIZE, Picture, render_scene, render_sign

#: Share of each kind among the pretraining pictures.
KIND_WEIGHTS: Mapping[str, float] = {
    "single_object": 0.03,
    "two_object": 0.08,
    "counting": 0.13,
    "colors": 0.05,
    "position": 0.15,
    "color_attr": 0.2,
    "ocr": 0.36,
}
_CHUNK = 2000


@dataclass(frozen=True)
class CaptionedPictures:
    """``captions``: N strings; ``pictures``: uint8 [N, 64, 64, 3]."""

    captions: list[str]
    pictures: NDArray[np.uint8]


def _sample(
    scenes: Mapping[str, list[Metadata]], weights: Mapping[str, float], wrong: float, rng: np.random.Generator
) -> tuple[str, Picture]:
    kind = str(rng.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values())))
    is_wrong = rng.random() < wrong
    if kind == "ocr":
        word = random_word(rng)
        return sign_prompt(word).text, render_sign(misspell(word, rng) if is_wrong else word, rng)
    asked = scenes[kind][int(rng.integers(len(scenes[kind])))]
    return scene_prompt(asked).text, render_scene(corrupt(asked, rng) if is_wrong else asked, rng)


def _chunk(task: tuple[int, int, int, float, Mapping[str, float]]) -> CaptionedPictures:
    seed, index, count, wrong, weights = task
    rng = np.random.default_rng([seed, index])
    scenes = all_scenes()
    rows = [_sample(scenes, weights, wrong, rng) for _ in range(count)]
    return CaptionedPictures([caption for caption, _ in rows], np.stack([picture for _, picture in rows]))


def make_dataset(
    count: int,
    *,
    wrong: float,
    seed: int,
    processes: int,
    weights: Mapping[str, float] = KIND_WEIGHTS,
) -> CaptionedPictures:
    """Draw ``count`` captioned pictures, a share ``wrong`` of which do not show what their caption says.

    The same arguments give the same pictures whatever the number of processes.
    """
    tasks = [
        (seed, index, min(_CHUNK, count - start), wrong, weights) for index, start in enumerate(range(0, count, _CHUNK))
    ]
    pictures = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    captions: list[str] = []
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for chunk in pool.imap(_chunk, tasks):
            pictures[len(captions) : len(captions) + len(chunk.captions)] = chunk.pictures
            captions.extend(chunk.captions)
    return CaptionedPictures(captions, pictures)
