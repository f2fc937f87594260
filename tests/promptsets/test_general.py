"""The general sets: eleven kinds by hand to evaluate on, a grammar's captions to train on."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ramctl.errors import DataError, UsageError
from ramctl.prompts import Prompt, read_prompts
from ramctl.promptsets import general
from ramctl.resources import resource_dir

FOLDER = resource_dir("prompts") / "general"
KINDS = {
    *("colors", "counting", "conflicting", "positional", "text", "rare_words"),
    *("misspellings", "descriptions", "structure", "inventions", "stories"),
}


@pytest.fixture(scope="module")
def train() -> list[Prompt]:
    return read_prompts(FOLDER / "train.jsonl")


@pytest.fixture(scope="module")
def test() -> list[Prompt]:
    return read_prompts(FOLDER / "test.jsonl")


def test_the_command_regenerates_the_shipped_files_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "ramctl.promptsets.general", str(tmp_path)],
        cwd=Path(general.__file__).parents[2],
        env={"PYTHONHASHSEED": "4321"},
        capture_output=True,
        check=True,
    )
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "general" / name).read_bytes() == (FOLDER / name).read_bytes(), name


def test_the_test_set_has_twenty_prompts_of_each_of_eleven_kinds(test: list[Prompt]) -> None:
    assert Counter(prompt.tag for prompt in test) == dict.fromkeys(KINDS, 20)
    assert len({prompt.text for prompt in test}) == 220


def test_prompts_that_name_a_text_quote_it_once(test: list[Prompt]) -> None:
    for prompt in test:
        assert prompt.text.count('"') == (2 if prompt.tag == "text" else 0), prompt.text


def test_no_test_prompt_is_trained_on(train: list[Prompt], test: list[Prompt]) -> None:
    def letters(prompt: Prompt) -> str:
        return re.sub(r"\W", "", prompt.text.lower())

    trained = {letters(prompt) for prompt in train}
    assert len(trained) == len(train)
    assert not trained & {letters(prompt) for prompt in test}


def test_the_training_set_is_a_few_thousand_varied_captions(train: list[Prompt]) -> None:
    assert len(train) == 4_800
    kinds = Counter(prompt.tag for prompt in train)
    assert len(kinds) == 11
    assert min(kinds.values()) >= 150
    assert max(kinds.values()) <= 700
    words = Counter(word for prompt in train for word in set(re.findall(r"[a-zé]{4,}", prompt.text.lower())))
    assert len(words) > 900
    # No content word runs through the set.
    assert words.most_common(1)[0][1] < 0.35 * len(train)
    lengths = [len(prompt.text) for prompt in train]
    assert 55 < sum(lengths) / len(lengths) < 90
    assert max(lengths) < 180


def test_articles_agree_and_no_slot_is_left(train: list[Prompt]) -> None:
    for prompt in train:
        assert not re.search(r"\b[aA] (?:[aeio]|u(?!ni|se))", prompt.text), prompt.text
        assert not re.search(r"\b[aA]n [^aeiouh]", prompt.text), prompt.text
        assert not re.search(r"[{}%@]|  | ,", prompt.text), prompt.text


def test_a_kind_that_cannot_fill_its_share_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"words": {"fruit": "apple, pear"}, "kind": [{"name": "fruits", "prompts": 3, "texts": "{a:fruit}"}]}
    real = general.read_table
    monkeypatch.setattr(general, "read_table", lambda name: table if name == "general.toml" else real(name))
    with pytest.raises(DataError, match="fruits: the patterns give 2 different prompts, not 3"):
        general.training_prompts()


def test_without_a_folder_the_command_says_how_it_is_called() -> None:
    with pytest.raises(UsageError, match=r"ramctl\.promptsets\.general prompts"):
        general.main(["a", "b"])
