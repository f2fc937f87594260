"""The OCR set: targets that the rule can read, split by text, in English one can look at."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ramctl.errors import DataError, UsageError
from ramctl.prompts import Prompt, read_prompts
from ramctl.promptsets import ocr
from ramctl.promptsets.choosing import Words, read_table
from ramctl.resources import resource_dir

FOLDER = resource_dir("prompts") / "ocr"


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return read_prompts(FOLDER / "train.jsonl.gz")


@pytest.fixture(scope="module")
def test() -> list[Prompt]:
    return read_prompts(FOLDER / "test.jsonl")


def targets(prompts: list[Prompt]) -> list[str]:
    return [prompt.metadata["target"] for prompt in prompts]


def test_the_command_regenerates_the_shipped_files(tmp_path: Path) -> None:
    # Another hash seed: the order of sets must not get into the files.
    subprocess.run(
        [sys.executable, "-m", "ramctl.promptsets.ocr", str(tmp_path)],
        cwd=Path(ocr.__file__).parents[2],
        env={"PYTHONHASHSEED": "4321"},
        capture_output=True,
        check=True,
    )
    assert (tmp_path / "ocr" / "test.jsonl").read_bytes() == (FOLDER / "test.jsonl").read_bytes()
    # Another zlib may pack the same lines differently.
    made, shipped = (gzip.decompress((f / "train.jsonl.gz").read_bytes()) for f in (tmp_path / "ocr", FOLDER))
    assert made == shipped


def test_sizes(train: list[Prompt], test: list[Prompt]) -> None:
    assert (len(train), len(test)) == (20_000, 1_000)


def test_the_target_stands_between_the_only_two_double_quotes(train: list[Prompt], test: list[Prompt]) -> None:
    for prompt in [*train, *test]:
        assert prompt.text.split('"')[1:-1] == [prompt.metadata["target"]]
        assert prompt.text.count('"') == 2


def test_targets_have_the_published_sizes(train: list[Prompt], test: list[Prompt]) -> None:
    for prompts in (train, test):
        texts = targets(prompts)
        assert all(2 <= len(text) <= 29 and 1 <= len(text.split()) <= 7 for text in texts)
        assert all(text == " ".join(text.split()) for text in texts)
        assert 15.5 < sum(map(len, texts)) / len(texts) < 17.5
        words = Counter(len(text.split()) for text in texts)
        assert 0.8 < (words[2] + words[3] + words[4]) / len(texts) < 0.95
        assert words[1] > 0.03 * len(texts)
        assert words[5] + words[6] + words[7] > 0.05 * len(texts)


def test_one_target_in_a_hundred_is_not_ascii(train: list[Prompt], test: list[Prompt]) -> None:
    for prompts in (train, test):
        odd = [text for text in targets(prompts) if not text.isascii()]
        assert 0.007 < len(odd) / len(prompts) < 0.015
    assert set("é½²₂’€°ñü") <= set("".join(targets(train)))


def test_no_target_is_in_both_files_or_twice_in_one(train: list[Prompt], test: list[Prompt]) -> None:
    def letters(text: str) -> str:
        # Coarser than the scorer's rule, which drops spaces and case only.
        return re.sub(r"[\W_]", "", text.lower())

    trained, held_out = ([letters(text) for text in targets(prompts)] for prompts in (train, test))
    assert len(set(trained)) == 20_000
    assert len(set(held_out)) == 1_000
    assert not set(trained) & set(held_out)
    assert len({p.text for p in train}) == 20_000


def test_the_tag_counts_the_targets_words(train: list[Prompt], test: list[Prompt]) -> None:
    names = ["one_word", "two_words", "three_words", "four_words", *["five_or_more"] * 3]
    for prompt in [*train, *test]:
        assert prompt.tag == names[len(prompt.metadata["target"].split()) - 1]
    assert set(Counter(prompt.tag for prompt in test)) == set(names)


def test_articles_agree_and_no_slot_is_left(train: list[Prompt], test: list[Prompt]) -> None:
    for prompt in [*train, *test]:
        scene = re.sub('"[^"]*"', '"x"', prompt.text)
        assert not re.search(r"\ba (?:[aeio]|u(?!ni|se))", scene), scene
        assert not re.search(r"\ban [^aeiou]", scene), scene
        assert not re.search(r"[{}%@]|  | ,", scene), scene


def test_both_files_hold_every_kind_in_the_same_share(train: list[Prompt], test: list[Prompt]) -> None:
    # A kind is told by its scenes' fixed beginnings; three that no other kind has.
    for opening in ("a birthday cake with", "a blackboard in a classroom", "a scoreboard at a stadium"):
        parts = [sum(p.text.startswith(opening) for p in prompts) / len(prompts) for prompts in (train, test)]
        assert parts[0] > 0.001
        assert parts[1] == pytest.approx(parts[0], abs=0.004)


def test_letters_come_in_capitals_and_as_written(test: list[Prompt]) -> None:
    capitals = sum(text.isupper() for text in targets(test)) / len(test)
    assert 0.25 < capitals < 0.55


def test_sums_on_the_blackboard_are_right() -> None:
    sums = Words(read_table("ocr.toml")["words"])["sum"]
    numeric = [entry for entry in sums if re.fullmatch(r"\d+ [+\-x/] \d+ = \d+", entry)]
    assert len(numeric) > 20
    for entry in numeric:
        left, right = entry.replace("x", "*").split(" = ")
        assert eval(left) == int(right), entry


def test_ranges_run_upwards(train: list[Prompt], test: list[Prompt]) -> None:
    pairs = [
        (int(found[1]), int(found[2]))
        for text in targets([*train, *test])
        if (found := re.fullmatch(r"(?:read pages|lap) (\d+) (?:to|of) (\d+)", text.lower()))
    ]
    assert len(pairs) > 50
    assert all(first < last for first, last in pairs)


def test_a_kind_that_cannot_fill_its_share_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "words": {"fruit": "apple, pear"},
        "kind": [
            {"name": "few", "targets": 1, "texts": "{fruit}", "letters": ["written"], "scenes": 'a card with "%"'},
        ],
    }
    monkeypatch.setattr(ocr, "read_table", lambda name: table)
    with pytest.raises(DataError, match="few: the patterns give 2 different texts, not 21000"):
        ocr.make()


@pytest.mark.parametrize("scene", ["a card", 'a card with "%" and "%"', 'a "big" card with "%"'])
def test_a_scene_without_its_one_place_for_the_text_is_refused(scene: str) -> None:
    row = {"name": "cards", "targets": 1, "texts": "x", "letters": ["written"], "scenes": scene}
    with pytest.raises(DataError, match="cards"):
        ocr.read_kinds({"kind": [row]})


def test_without_a_folder_the_command_says_how_it_is_called() -> None:
    with pytest.raises(UsageError, match=r"ramctl\.promptsets\.ocr prompts"):
        ocr.main(["--help"])


def test_lines_are_json_with_the_prompt_last() -> None:
    first = json.loads((FOLDER / "test.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert list(first) == ["tag", "target", "prompt"]
