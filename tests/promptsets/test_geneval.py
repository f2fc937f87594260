"""GenEval's 553 records byte for byte, and a training set that asks for none of their pictures."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ramctl.errors import UsageError
from ramctl.prompts import Prompt, read_prompts, write_prompts
from ramctl.promptsets import geneval
from ramctl.resources import resource_dir
from ramctl.scorers.geneval.rules import parse_task

TEST = resource_dir("prompts") / "geneval" / "test.jsonl"
TRAIN = resource_dir("prompts") / "geneval" / "train.jsonl.gz"

#: SHA-256 of GenEval's evaluation_metadata.jsonl. The generator of djghosh13/geneval writes these bytes, and public
#: projects that carry the official file state the same hash.
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"

#: Some captions by their number in GenEval's own human annotations (annotations_if-xl.csv): an independent witness
#: of content and order.
ANNOTATED = {
    14: "a photo of a parking meter",
    48: "a photo of an orange",
    70: "a photo of an apple",
    103: "a photo of a broccoli and a parking meter",
    108: "a photo of a skateboard and a sink",
    156: "a photo of a computer keyboard and a cell phone",
    159: "a photo of a tv and a cell phone",
    208: "a photo of three zebras",
    220: "a photo of four donuts",
    252: "a photo of three cows",
    316: "a photo of a yellow orange",
    328: "a photo of a white teddy bear",
    345: "a photo of a green bus",
    371: "a photo of a bus below a toothbrush",
    417: "a photo of a bicycle above a parking meter",
    421: "a photo of a chair left of a zebra",
    437: "a photo of a cell phone left of a tennis racket",
    469: "a photo of a black kite and a green bear",
}


@pytest.fixture(scope="module")
def test() -> list[Prompt]:
    return read_prompts(TEST)


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return read_prompts(TRAIN)


def picture(prompt: Prompt) -> frozenset[Any]:
    """What a prompt asks for, read from its English alone: nothing of the generator is used."""
    text = prompt.text.removeprefix("a photo of ")

    def bare(phrase: str) -> str:
        return re.sub(r"^an? ", "", phrase)

    if relation := re.fullmatch(r"(.+) (left of|right of|above|below) (.+)", text):
        first, word, second = bare(relation[1]), relation[2], bare(relation[3])
        if word in ("right of", "below"):
            first, second = second, first
        axis = "x" if word.endswith("of") else "y"
        return frozenset({(first, f"{axis} first"), (second, f"{axis} second")})
    return frozenset(bare(part) for part in text.split(" and "))


def test_the_evaluation_file_is_genevals_byte_for_byte() -> None:
    assert hashlib.sha256(TEST.read_bytes()).hexdigest() == OFFICIAL_SHA256


def test_the_recipe_gives_the_file_under_the_installed_numpy(tmp_path: Path) -> None:
    write_prompts(tmp_path / "test.jsonl", geneval.evaluation_prompts())
    assert (tmp_path / "test.jsonl").read_bytes() == TEST.read_bytes()


def test_the_captions_stand_where_genevals_annotations_say(test: list[Prompt]) -> None:
    assert {number: test[number].text for number in ANNOTATED} == ANNOTATED


def test_the_evaluation_set_has_genevals_numbers(test: list[Prompt]) -> None:
    expected = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert Counter(prompt.tag for prompt in test) == expected
    assert len({prompt.text for prompt in test}) == 553


def test_another_seed_draws_another_set(test: list[Prompt]) -> None:
    other = geneval.evaluation_prompts(seed=44, draws=10)
    assert 120 < len(other) <= 130
    assert other[:80] != test[:80]
    assert {p.text for p in other[:80]} == {p.text for p in test[:80]}


def test_the_training_file_is_what_the_generator_writes(test: list[Prompt]) -> None:
    lines = [json.dumps(prompt.to_json()) for prompt in geneval.training_prompts(test)]
    assert gzip.decompress(TRAIN.read_bytes()).decode() == "\n".join(lines) + "\n"


def test_training_lines_have_flow_grpos_proportions(train: list[Prompt]) -> None:
    lines = Counter(prompt.tag for prompt in train)
    assert sum(lines.values()) == 50_000
    whole = sum(geneval.PROPORTIONS.values())
    for tag, part in {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}.items():
        assert abs(lines[tag] - 50_000 * part / whole) < 1, tag
    assert "single_object" not in lines


def test_no_training_prompt_asks_for_the_picture_of_a_test_prompt(train: list[Prompt], test: list[Prompt]) -> None:
    held_out = {(prompt.tag, picture(prompt)) for prompt in test}
    # One picture is asked for twice: "a laptop left of a cow" and "a cow right of a laptop".
    assert len(held_out) == 552
    assert not held_out & {(prompt.tag, picture(prompt)) for prompt in train}
    assert not {geneval.unordered_key(p.metadata) for p in test} & {geneval.unordered_key(p.metadata) for p in train}


def test_small_pools_repeat_evenly_and_large_ones_not_at_all(train: list[Prompt]) -> None:
    repeats: dict[str, Counter[str]] = {}
    for prompt in train:
        repeats.setdefault(prompt.tag, Counter())[prompt.text] += 1
    for tag in ("position", "color_attr", "two_object"):
        assert set(repeats[tag].values()) == {1}
    # Every prompt the test set leaves free is trained: 240 - 80 counts and 790 - 94 colours.
    assert len(repeats["counting"]) == 160
    assert set(repeats["counting"].values()) == {91, 92}
    assert len(repeats["colors"]) == 696
    assert set(repeats["colors"].values()) == {4, 5}


def test_every_class_colour_and_relation_is_trained(train: list[Prompt]) -> None:
    for tag in ("position", "color_attr", "two_object"):
        clauses = [clause for prompt in train if prompt.tag == tag for clause in prompt.metadata["include"]]
        known = geneval.COLORED_CLASSES if tag == "color_attr" else geneval.CLASSES
        assert {clause["class"] for clause in clauses} == set(known)
        if tag == "position":
            relations = Counter(clause["position"][0] for clause in clauses if "position" in clause)
            assert set(relations) == set(geneval.RELATIONS)
            assert min(relations.values()) > 0.9 * max(relations.values())
        if tag == "color_attr":
            assert {clause["color"] for clause in clauses} == set(geneval.COLORS)


def test_the_scorer_reads_every_record(train: list[Prompt], test: list[Prompt]) -> None:
    for prompt in {prompt.text: prompt for prompt in [*train, *test]}.values():
        task = parse_task(prompt.metadata, class_names=geneval.CLASSES, colors=geneval.COLORS)
        for clause in task.include:
            number = {1: "", 2: "two ", 3: "three ", 4: "four "}[clause.count]
            color = f"{clause.color} " if clause.color else ""
            assert f"{number}{color}{clause.class_name}" in prompt.text
            assert clause.relation is None or f" {clause.relation} " in prompt.text
        assert [(c.class_name, c.count) for c in task.exclude] == [
            (c.class_name, c.count + 1) for c in task.include if task.tag == "counting"
        ]


def test_training_lines_are_mixed(train: list[Prompt]) -> None:
    shares = Counter(prompt.tag for prompt in train[:1000])
    assert 330 < shares["position"] < 490
    assert shares["two_object"] > 30


def test_the_unordered_key_ignores_the_order_of_the_objects_and_nothing_else() -> None:
    def key(prompt: Prompt) -> str:
        return geneval.unordered_key(prompt.metadata)

    assert key(geneval.two_object("cat", "dog")) == key(geneval.two_object("dog", "cat"))
    assert key(geneval.position("cat", "left of", "dog")) == key(geneval.position("dog", "right of", "cat"))
    assert key(geneval.position("cat", "above", "dog")) == key(geneval.position("dog", "below", "cat"))
    red_cat, blue_dog = ("cat", "red"), ("dog", "blue")
    assert key(geneval.color_attr(red_cat, blue_dog)) == key(geneval.color_attr(blue_dog, red_cat))
    different = [
        geneval.position("cat", "left of", "dog"),
        geneval.position("cat", "right of", "dog"),
        geneval.position("cat", "above", "dog"),
        geneval.position("cat", "below", "dog"),
        geneval.two_object("cat", "dog"),
        geneval.color_attr(red_cat, blue_dog),
        geneval.color_attr(("cat", "blue"), ("dog", "red")),
        geneval.colors("cat", "red"),
        geneval.counting("cat", 2),
        geneval.counting("cat", 3),
        geneval.single_object("cat"),
    ]
    assert len({key(prompt) for prompt in different}) == len(different)


def test_without_a_folder_the_command_says_how_it_is_called() -> None:
    with pytest.raises(UsageError, match=r"ramctl\.promptsets\.geneval prompts"):
        geneval.main([])
