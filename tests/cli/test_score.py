"""``ramctl score`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ramctl.cli import app
from ramctl.images import write_image_folder
from ramctl.tinyworld.grammar import sign_prompt
from ramctl.tinyworld.renderer import render_sign


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        app.main(words)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    words = ["lamp", "tree", "moon"]
    write_image_folder(
        tmp_path / "signs", [render_sign(w, rng) for w in words], [sign_prompt(w) for w in [*words[:2], "star"]]
    )
    return tmp_path / "signs"


def test_several_scorers_a_table_and_lines_for_scripts(
    signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "scores.jsonl"
    words = ["--scorer", "ocr", "-s", "jpeg-compressibility", "--option", "ocr.threads=1", "--output", str(out)]
    assert run("score", str(signs), *words) == 0
    captured = capsys.readouterr()
    said = dict(line.removeprefix("RESULT ").split("=", 1) for line in captured.out.splitlines())
    assert said["ocr/strict"] == "0.666667" and said["ocr/tag_strict/ocr"] == "0.666667"
    assert said["ocr/failed"] == "0" and said["jpeg-compressibility/images"] == "3"
    assert said["output"] == str(out)
    assert "jpeg-compressibility  all" not in captured.out and "ocr" in captured.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["scores"]["ocr"]["strict"] for row in rows] == [1, 1, 0]
    assert rows[2]["scores"]["ocr"]["record"]["text"].lower() == "moon"


def test_json_in_place_of_lines(signs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score", str(signs), "-s", "jpeg-compressibility", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["scorers"]["jpeg-compressibility"]["images"] == 3
    assert content["scorers"]["jpeg-compressibility"]["version"].startswith("jpeg-compressibility/")


def test_a_broken_picture_is_named_and_does_not_fail_the_command(
    signs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = signs / "00001.png"
    broken.write_bytes(broken.read_bytes()[:90])
    assert run("score", str(signs), "-s", "jpeg-compressibility") == 0
    captured = capsys.readouterr()
    assert "RESULT jpeg-compressibility/failed=1" in captured.out
    assert str(broken) in captured.err


def test_one_value_for_all_pictures_is_worth_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for count, said in ((8, True), (7, False)):
        folder = tmp_path / str(count)
        write_image_folder(folder, [np.full((32, 32, 3), 90, np.uint8)] * count, [sign_prompt("lamp")] * count)
        assert run("score", str(folder), "-s", "jpeg-compressibility", "--no-self-test") == 0
        captured = capsys.readouterr()
        assert ("jpeg-compressibility gave all" in captured.err) == said
        assert "gave all" not in captured.out


def test_no_picture_scored_is_a_failure(signs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in signs.glob("*.png"):
        file.write_bytes(b"")
    assert run("score", str(signs), "-s", "jpeg-compressibility") == 1
    captured = capsys.readouterr()
    assert "RESULT jpeg-compressibility/failed=3" in captured.out
    assert "No picture could be scored by jpeg-compressibility" in captured.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-s", "jpg-compressibility"], "Did you mean 'jpeg-compressibility'"),
        ([], "No scorer given. The scorers are geneval"),
        (["-s", "geneval"], "needs in every line of the prompt file"),
        (["-s", "ocr", "--option", "ocr.thread=1"], "Did you mean 'threads'"),
        (["-s", "ocr", "--option", "geneval.partial=clamped"], "not used here"),
        (["-s", "jpeg-compressibility", "--batch-size", "0"], "batch size must be 1 or more"),
    ],
)
def test_mistakes_are_usage_errors(
    words: list[str], said: str, signs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("score", str(signs), *words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    signs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("score", str(signs), "-s", "jpeg-compressibility", "-o", str(tmp_path)) == 1
    captured = capsys.readouterr()
    assert "cannot be written" in captured.err and "of 3 pictures" not in captured.err


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score", str(tmp_path / "gone"), "-s", "jpeg-compressibility") == 2
    assert "gone does not exist" in capsys.readouterr().err
