"""The shipped prompt files are what the generator writes, and no test prompt is trained on."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from ramctl.errors import UsageError
from ramctl.prompts import Prompt, read_prompts
from ramctl.promptsets import tiny
from ramctl.resources import resource_dir
from ramctl.scorers.geneval.rules import parse_task
from ramctl.tinyworld.grammar import ALPHABET, COLORS, KINDS, SHAPES, scene_key, scene_prompt
from ramctl.tinyworld.model import grammar_words

FILES = [f"{name}/{split}.jsonl" for name in ("geneval-tiny", "ocr-tiny") for split in ("train", "test")]


def shipped(name: str) -> list[Prompt]:
    return read_prompts(resource_dir("prompts") / name)


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return shipped("geneval-tiny/train.jsonl")


@pytest.fixture(scope="module")
def test() -> list[Prompt]:
    return shipped("geneval-tiny/test.jsonl")


def keys(prompts: Iterable[Prompt]) -> set[str]:
    return {scene_key(prompt.metadata) for prompt in prompts}


def values(prompts: Iterable[Prompt], key: str) -> Counter[str]:
    return Counter(str(clause[key]) for p in prompts for clause in p.metadata["include"] if key in clause)


def of_tag(prompts: Iterable[Prompt], tag: str) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.tag == tag]


def test_the_command_regenerates_the_shipped_files_byte_for_byte(tmp_path: Path) -> None:
    # Another hash seed: the order of sets must not get into the files.
    done = subprocess.run(
        [sys.executable, "-m", "ramctl.promptsets.tiny", str(tmp_path)],
        cwd=Path(tiny.__file__).parents[2],
        env={"PYTHONHASHSEED": "4321"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b""
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl")) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (resource_dir("prompts") / name).read_bytes(), name


def test_without_a_folder_the_command_says_how_it_is_called() -> None:
    with pytest.raises(UsageError, match=r"ramctl\.promptsets\.tiny prompts"):
        tiny.main([])


def test_no_held_out_arrangement_is_trained_on_in_any_order(train: list[Prompt], test: list[Prompt]) -> None:
    assert not keys(train) & keys(test)
    assert not {p.text for p in train} & {p.text for p in test}


def test_prompts_are_the_grammars_own_and_the_scorer_reads_them(train: list[Prompt], test: list[Prompt]) -> None:
    for prompt in {p.text: p for p in [*train, *test]}.values():
        assert scene_prompt(prompt.metadata).text == prompt.text
        parse_task(prompt.metadata)


def test_the_test_set_shows_every_tag_in_the_documented_numbers(test: list[Prompt]) -> None:
    assert 240 <= len(test) <= 260
    assert len({prompt.text for prompt in test}) == len(test)
    expected = {"single_object": 2, "two_object": 8, "counting": 54, "colors": 16, "position": 48, "color_attr": 112}
    assert Counter(prompt.tag for prompt in test) == expected


@pytest.mark.parametrize("tag", ["counting", "colors", "position", "color_attr"])
def test_held_out_prompts_show_shapes_colours_and_relations_evenly(test: list[Prompt], tag: str) -> None:
    prompts = of_tag(test, tag)
    shapes = values(prompts, "class")
    assert set(shapes) == set(SHAPES)
    assert max(shapes.values()) - min(shapes.values()) <= 1
    if tag != "position":
        colors = values(prompts, "color")
        assert set(colors) == set(COLORS)
        assert max(colors.values()) - min(colors.values()) <= 1
    if tag == "position":
        assert set(values(prompts, "position").values()) == {12}
    if tag == "counting":
        counts = values(prompts, "count")
        assert max(counts.values()) - min(counts.values()) <= 2


def test_held_out_pairs_and_places_are_asked_for_in_both_phrasings(test: list[Prompt]) -> None:
    for tag in ("two_object", "position"):
        asked = Counter(scene_key(prompt.metadata) for prompt in of_tag(test, tag))
        assert set(asked.values()) == {2}


def test_every_shape_and_colour_is_trained_under_every_tag(train: list[Prompt]) -> None:
    for tag in KINDS:
        prompts = of_tag(train, tag)
        if tag == "single_object":  # a held-out prompt of this kind is a held-out shape
            assert len(values(prompts, "class")) == len(SHAPES) - 2
        else:
            assert set(values(prompts, "class")) == set(SHAPES)
        if tag in ("counting", "colors", "color_attr"):
            assert set(values(prompts, "color")) == set(COLORS)


def test_training_lines_have_flow_grpos_proportions_and_repeat_evenly(train: list[Prompt]) -> None:
    assert 1000 <= len(train) <= 1500
    lines = Counter(prompt.tag for prompt in train)
    share = lines["position"] / 7
    for tag, wanted in {"counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}.items():
        assert lines[tag] / share == pytest.approx(wanted, rel=0.2), tag
    repeats = Counter(prompt.text for prompt in train)
    for tag in KINDS:
        assert {repeats[prompt.text] for prompt in of_tag(train, tag)} == {tiny.REPEATS[tag]}


def test_words_are_short_distinct_and_none_is_a_token_of_its_own() -> None:
    words = tiny.words()
    assert len(words) >= 500
    assert words == sorted(set(words))
    assert all(len(word) in (3, 4) and set(word) <= set(ALPHABET) for word in words)
    assert not set(words) & set(grammar_words())


def test_signs_are_split_by_word() -> None:
    train, test = (shipped(f"ocr-tiny/{split}.jsonl") for split in ("train", "test"))
    trained, held_out = ([prompt.metadata["target"] for prompt in prompts] for prompts in (train, test))
    assert len(test) == len(set(held_out)) == 240
    assert sorted([*trained, *held_out]) == tiny.words()
    assert all(p.text == f'a sign that says "{p.metadata["target"]}"' and p.tag == "ocr" for p in [*train, *test])
    # In the order of the seed, not of the alphabet: the first prompts are a fair sample.
    assert len({word[0] for word in held_out[:40]}) > 10
