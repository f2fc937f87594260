"""DrawBench's prompts in the forms they come in."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramctl.drawbench import drawbench_file, read_drawbench
from ramctl.errors import DataError, MissingDependencyError
from ramctl.prompts import Prompt
from ramctl.weights import find_entry


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_a_table_brings_its_categories(tmp_path: Path) -> None:
    text = '\ufeffPrompts,Category\n"A red car, and a sheep.",Colors\n  ,Colors\nOne cat.,\nOne cat.,Counting\n'
    assert read_drawbench(written(tmp_path, "a.csv", text)) == [
        Prompt("A red car, and a sheep.", {"tag": "Colors"}),
        Prompt("One cat."),
    ]
    assert read_drawbench(written(tmp_path, "a.tsv", "tag\tprompt\nText\tA “sign”\n")) == [
        Prompt("A “sign”", {"tag": "Text"})
    ]


def test_lines_that_repeat_prompts_are_taken_once(tmp_path: Path) -> None:
    lines = [f"prompt {i % 200}" for i in range(1000)]
    prompts = read_drawbench(written(tmp_path, "a.txt", "\n".join(lines)))
    assert [prompt.text for prompt in prompts] == lines[:200]
    rows = '{"prompt": "x", "tag": "a"}\n{"prompt": "x", "tag": "b"}\n{"prompt": "y"}\n'
    assert read_drawbench(written(tmp_path, "a.jsonl", rows)) == [Prompt("x", {"tag": "a"}), Prompt("y")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must name the columns"),
        ("a red cube\na dog\n", "must name the columns"),
        ("Prompts,Category\n", "holds no prompts"),
        ('Prompts\n"' + "x" * 200_000 + '"\n', "line"),
    ],
)
def test_a_table_that_is_none_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_drawbench(written(tmp_path, "a.csv", text))


def test_files_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"gone.csv does not exist"):
        read_drawbench(tmp_path / "gone.csv")
    assert drawbench_file(tmp_path / "mine.txt") == tmp_path / "mine.txt"
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="ramctl download-weights drawbench"):
        drawbench_file(None)
    (tmp_path / "drawbench").mkdir()
    fetched = tmp_path / "drawbench" / find_entry("drawbench").files[0].path
    fetched.write_text("Prompts,Category\na,b\n")
    assert drawbench_file(None) == fetched
    assert read_drawbench(fetched) == [Prompt("a", {"tag": "b"})]
