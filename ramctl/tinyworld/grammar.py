"""What tinyworld prompts ask for: scenes of the six GenEval kinds, and signs with a word on them.

Metadata follows GenEval's records: ``tag``, ``include`` (clauses of ``class``, ``count``, optional ``color`` and
``position`` = [relation, index of the target clause]) and ``exclude`` for counting. Two departures from GenEval, made
so that the small world has enough different prompts: counting prompts may name a colour, and the classes are shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ramctl.prompts import Prompt

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")

#: RGB of each colour word, far apart enough to survive JPEG and blur.
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 230, 40),
    "green": (40, 175, 60),
    "blue": (40, 90, 235),
    "purple": (140, 50, 190),
    "pink": (255, 145, 200),
    "white": (245, 245, 245),
}

KINDS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
NUMBER_WORDS: Mapping[int, str] = {2: "two", 3: "three", 4: "four"}
WORD_TAG = "ocr"

#: The letters a sign can show; a word has MIN_LETTERS to MAX_LETTERS of them.
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
MIN_LETTERS, MAX_LETTERS = 3, 4

Metadata = dict[str, Any]


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _plural(shape: str) -> str:
    return shape + "es" if shape.endswith("s") else shape + "s"


def scene_prompt(metadata: Mapping[str, Any]) -> Prompt:
    """The English sentence for a scene's metadata, in GenEval's wording ("a photo of …")."""
    include = metadata["include"]

    def noun(clause: Mapping[str, Any]) -> str:
        return f"{clause['color']} {clause['class']}" if "color" in clause else str(clause["class"])

    if metadata["tag"] == "counting":
        clause = include[0]
        color = f"{clause['color']} " if "color" in clause else ""
        text = f"{NUMBER_WORDS[clause['count']]} {color}{_plural(clause['class'])}"
    elif metadata["tag"] == "position":
        target, subject = include
        text = f"{_article(noun(subject))} {subject['position'][0]} {_article(noun(target))}"
    else:
        text = " and ".join(_article(noun(clause)) for clause in include)
    return Prompt(text=f"a photo of {text}", metadata=metadata)


def sign_prompt(word: str) -> Prompt:
    """The prompt for a sign with ``word`` on it; the OCR rule reads the target between the double quotes."""
    return Prompt(text=f'a sign that says "{word}"', metadata={"tag": WORD_TAG, "target": word})


def _one(shape: str, **more: Any) -> Metadata:
    return {"class": shape, "count": 1, **more}


def _counting(shape: str, count: int, color: str | None) -> Metadata:
    named = {} if color is None else {"color": color}
    return {
        "tag": "counting",
        "include": [{"class": shape, "count": count, **named}],
        "exclude": [{"class": shape, "count": count + 1}],
    }


def all_scenes() -> dict[str, list[Metadata]]:
    """Every scene the grammar can ask for, by kind, in a fixed order (color_attr: distinct shapes and colours)."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    return {
        "single_object": [{"tag": "single_object", "include": [_one(a)]} for a in SHAPES],
        "two_object": [{"tag": "two_object", "include": [_one(a), _one(b)]} for a, b in pairs],
        "counting": [_counting(a, n, c) for a in SHAPES for n in NUMBER_WORDS for c in (None, *COLORS)],
        "colors": [{"tag": "colors", "include": [_one(a, color=c)]} for a in SHAPES for c in COLORS],
        "position": [
            {"tag": "position", "include": [_one(b), _one(a, position=[relation, 0])]}
            for a, b in pairs
            for relation in RELATIONS
        ],
        "color_attr": [
            {"tag": "color_attr", "include": [_one(a, color=c), _one(b, color=d)]}
            for a, b in pairs
            for c in COLORS
            for d in COLORS
            if c != d
        ],
    }


def scene_key(metadata: Mapping[str, Any]) -> str:
    """A key equal for prompts that ask for the same picture whatever the order of the objects.

    "a circle left of a square" and "a square right of a circle" share it, as do the two orders of an "and".
    """
    mirrored = {"left of": "right of", "above": "below"}
    include = metadata["include"]
    parts = [f"{c['count']} {c.get('color', '-')} {c['class']}" for c in include]
    if metadata["tag"] == "position":
        target, subject = parts
        relation = include[1]["position"][0]
        if relation in mirrored:
            relation, target, subject = mirrored[relation], subject, target
        return f"position|{subject} {relation} {target}"
    return f"{metadata['tag']}|" + " & ".join(sorted(parts))


def corrupt(metadata: Mapping[str, Any], rng: np.random.Generator) -> Metadata:
    """A scene that is almost the one asked for, as a wrong web caption's picture is; the tag stays.

    One thing is changed: the shape, the colour, the count or the relation of one clause, an object left out, or the two
    objects' colours exchanged.
    """
    include = [dict(clause) for clause in metadata["include"]]
    clause = include[int(rng.integers(len(include)))]

    def shape() -> None:
        clause["class"] = str(rng.choice([s for s in SHAPES if s not in {c["class"] for c in include}]))

    def color() -> None:
        clause["color"] = str(rng.choice([c for c in COLORS if c != clause["color"]]))

    def count() -> None:
        clause["count"] = int(
            rng.choice([n for n in (1, 2, 3, 4, 5) if n != clause["count"] and abs(n - clause["count"]) < 3])
        )

    def relation() -> None:
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        subject = include[1]
        subject["position"] = [opposite[subject["position"][0]], 0]

    def drop() -> None:
        include.remove(clause)
        include[0].pop("position", None)

    def swap() -> None:
        include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]

    changes: list[Callable[[], None]] = {
        "single_object": [shape],
        "two_object": [shape, drop],
        "counting": [count, count, shape],
        "colors": [color, color, shape],
        "position": [relation, relation, shape, drop],
        "color_attr": [color, swap, swap, shape, drop],
    }[metadata["tag"]]
    changes[int(rng.integers(len(changes)))]()
    return {"tag": metadata["tag"], "include": include}


_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
_PATTERNS = ("cvc", "cvc", "cvcv", "cvvc", "ccvc", "cvcc", "vcc", "vcv", "vccv")


def random_word(rng: np.random.Generator) -> str:
    """A pronounceable word of 3 or 4 letters."""
    pattern = _PATTERNS[int(rng.integers(len(_PATTERNS)))]
    letters = {"c": _CONSONANTS, "v": _VOWELS}
    return "".join(letters[kind][int(rng.integers(len(letters[kind])))] for kind in pattern)


def misspell(word: str, rng: np.random.Generator) -> str:
    """The word with one to three letters exchanged for others: the sign of a careless painter."""
    letters = list(word)
    for place in rng.choice(len(letters), size=int(rng.integers(1, 4)), replace=False):
        letters[place] = str(rng.choice([c for c in ALPHABET if c != letters[place]]))
    return "".join(letters)
