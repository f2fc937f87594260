from __future__ import annotations

import numpy as np
import pytest

from ramctl.tinyworld.grammar import (
    ALPHABET,
    COLORS,
    KINDS,
    MAX_LETTERS,
    MIN_LETTERS,
    SHAPES,
    all_scenes,
    corrupt,
    misspell,
    random_word,
    scene_key,
    scene_prompt,
    sign_prompt,
)

SCENES = all_scenes()


def picture_request(metadata):
    """What a picture of the scene must show, whatever the order of its clauses."""
    clauses = [(c["class"], c["count"], c.get("color")) for c in metadata["include"]]
    relation = next(((c["position"][0]) for c in metadata["include"] if "position" in c), None)
    if relation is None:
        return frozenset(clauses), None
    if relation in ("left of", "above"):
        return tuple(clauses), relation
    return tuple(reversed(clauses)), {"right of": "left of", "below": "above"}[relation]


def test_every_kind_is_there_and_tagged():
    assert tuple(SCENES) == KINDS
    for kind, rows in SCENES.items():
        assert {row["tag"] for row in rows} == {kind}
        texts = [scene_prompt(row).text for row in rows]
        assert len(set(texts)) == len(texts)


def test_prompts_use_genevals_wording():
    texts = {scene_prompt(row).text for rows in SCENES.values() for row in rows}
    for text in (
        "a photo of a circle",
        "a photo of a star and a cross",
        "a photo of three crosses",
        "a photo of two orange rings",
        "a photo of an orange square",
        "a photo of a circle left of a square",
        "a photo of a pink star and an orange ring",
    ):
        assert text in texts


def test_position_metadata_puts_the_target_first():
    row = next(r for r in SCENES["position"] if scene_prompt(r).text == "a photo of a star above a ring")
    assert row["include"] == [
        {"class": "ring", "count": 1},
        {"class": "star", "count": 1, "position": ["above", 0]},
    ]


def test_counting_excludes_one_more():
    for row in SCENES["counting"]:
        (wanted,), (forbidden,) = row["include"], row["exclude"]
        assert forbidden == {"class": wanted["class"], "count": wanted["count"] + 1}


def test_scene_key_is_the_same_exactly_for_the_same_picture():
    for kind, rows in SCENES.items():
        by_key, by_request = {}, {}
        for row in rows:
            by_key.setdefault(scene_key(row), set()).add(picture_request(row))
            by_request.setdefault(picture_request(row), set()).add(scene_key(row))
        assert all(len(requests) == 1 for requests in by_key.values()), kind
        assert all(len(keys) == 1 for keys in by_request.values()), kind


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        ("position", "a photo of a circle left of a square", "a photo of a square right of a circle"),
        ("position", "a photo of a star above a ring", "a photo of a ring below a star"),
        ("two_object", "a photo of a star and a ring", "a photo of a ring and a star"),
        ("color_attr", "a photo of a red star and a blue ring", "a photo of a blue ring and a red star"),
    ],
)
def test_scene_key_does_not_see_the_order(kind, one, other):
    keys = {scene_prompt(row).text: scene_key(row) for row in SCENES[kind]}
    assert keys[one] == keys[other]


def test_scene_key_sees_the_side():
    keys = {scene_prompt(row).text: scene_key(row) for row in SCENES["position"]}
    assert keys["a photo of a circle left of a square"] != keys["a photo of a square left of a circle"]


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_never_asks_for_the_same_picture_and_leaves_its_input_alone(kind):
    rng = np.random.default_rng(0)
    rows = SCENES[kind]
    for _ in range(400):
        row = rows[int(rng.integers(len(rows)))]
        before = repr(row)
        wrong = corrupt(row, rng)
        assert picture_request(wrong) != picture_request(row)
        assert repr(row) == before
        assert wrong["tag"] == kind
        assert wrong["include"]
        for clause in wrong["include"]:
            assert clause["class"] in SHAPES
            assert clause.get("color", "red") in COLORS
            assert 1 <= clause["count"] <= 5


def test_words_are_short_and_lower_case():
    rng = np.random.default_rng(1)
    words = [random_word(rng) for _ in range(300)]
    assert all(MIN_LETTERS <= len(word) <= MAX_LETTERS for word in words)
    assert all(set(word) <= set(ALPHABET) for word in words)
    assert len(set(words)) > 250


def test_misspelt_words_keep_their_length_and_differ_in_one_to_three_letters():
    rng = np.random.default_rng(2)
    for _ in range(300):
        word = random_word(rng)
        wrong = misspell(word, rng)
        assert len(wrong) == len(word)
        assert sum(a != b for a, b in zip(word, wrong, strict=True)) in (1, 2, 3)


def test_sign_prompts_quote_their_target():
    prompt = sign_prompt("moon")
    assert prompt.text.split('"') == ["a sign that says ", "moon", ""]
    assert (prompt.tag, prompt.metadata["target"]) == ("ocr", "moon")
