"""``ramctl evaluate`` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ramctl.cli import app


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        app.main(words)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def results(text: str) -> dict[str, str]:
    assert all(line.startswith("RESULT ") for line in text.splitlines()), text
    return dict(line.removeprefix("RESULT ").split("=", 1) for line in text.splitlines())


@pytest.fixture
def run_folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_checkpoint.parent, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_a_checkpoint_against_its_base(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run_folder / "latest"), "--rewards", "geneval,jpeg-compressibility"]
    assert run(*words, "--compare", "base") == 0
    captured = capsys.readouterr()
    said = results(captured.out)
    for key in (
        "value",
        "value_low",
        "strict",
        "strict_high",
        "geneval/official",
        "geneval/tag_strict/position",
        "jpeg-compressibility/mean",
        "compare/strict_difference_low",
        "compare/value_difference",
    ):
        assert key in said
    assert said["images"] == "6" and said["failed"] == "0"
    assert json.loads(Path(said["scores"]).read_text())["comparison"]["other"] == "base"
    assert "tiny-test-step-000001 against base" in captured.err
    assert Path(said["page"]).read_text().count("Largest changes") == 2  # one per scorer
    assert (Path(said["compare/folder"]) / "evaluation.html").is_file()
    assert run(*words) == 0
    again = capsys.readouterr()
    assert "6 pictures in" in again.err and "kept" in again.err
    assert {key: results(again.out)[key] for key in ("value", "strict")} == {
        key: said[key] for key in ("value", "strict")
    }


def test_the_untrained_baseline_under_a_presets_protocol(
    tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", "models/tinyworld", "--preset", str(tiny_preset), "--limit", "2", "--device", "cpu"]
    assert run("evaluate", *words) == 0
    said = results(capsys.readouterr().out)
    assert said["folder"] == "outputs/evaluations/tinyworld" and said["images"] == "2"
    content = json.loads(Path(said["scores"]).read_text())
    assert content["protocol"]["weights"] == "base" and content["protocol"]["sampling_steps"] == 2
    assert list(content["scorers"]) == ["jpeg-compressibility"]


def test_a_plan_below_its_protocol_is_told_before_anything_is_drawn(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ramctl.evaluating.Plan.notes", lambda _: ["four pictures per prompt"])
    assert run("evaluate", str(run_folder / "latest"), "--rewards", "geneval", "--limit", "2") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("four pictures per prompt") == 1
    drawing = next(i for i, line in enumerate(lines) if line.startswith("drawing"))
    assert lines.index("four pictures per prompt") < drawing


def test_a_second_source_is_compared_with(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run_folder / "latest"), "--rewards", "geneval", "--limit", "2"]
    found = []
    for other in ("base", "models/tinyworld", str(run_folder)):
        assert run(*words, other) == 0
        found.append(results(capsys.readouterr().out))
    assert [each["compare"] for each in found] == ["base", "tinyworld", "tiny-test-step-000001"]
    assert found[0]["compare/value"] == found[1]["compare/value"]
    assert found[2]["compare/value_difference"] == "0"
    assert found[0]["official_macro"] == found[0]["geneval/official_macro"]


def test_drawbench_has_results_and_a_page_of_its_own(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.csv").write_text(
        "Prompts,Category\na red star,Colors\ntwo rings,Counting\na red star,Colors\n"
    )
    words = ["evaluate", str(run_folder / "latest"), "--rewards", "geneval", "--limit", "2", "--device", "cpu"]
    words += ["--drawbench-metrics", "jpeg-compressibility,jpeg-incompressibility", "--drawbench-prompts"]
    assert run(*words, str(tmp_path / "prompts.csv")) == 0
    said = results(capsys.readouterr().out)
    assert said["drawbench/images"] == "2"
    assert {"drawbench/jpeg-compressibility/tag/Colors", "drawbench/jpeg-incompressibility/mean_high"} <= said.keys()
    assert "Counting" in Path(said["drawbench/page"]).read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Name one source"),
        (["x", "base", "--compare", "base"], "not both"),
        (["x", "--model", "models/tinyworld"], "Name one source"),
        (["--model", "models/tinyworld", "--rewards", "genevl"], "Did you mean 'geneval'"),
        (["--model", "models/tinyworld", "--steps", "0"], "sampling_steps must be 1 or more"),
        (["--model", "models/tinyworld", "--drawbench-metrics", "pickscor"], "Did you mean 'pickscore'"),
        (["--model", "models/tinyworld", "--sampler", "eulr"], "Did you mean 'euler'"),
        (["--model", "models/tinyworld", "--preset", "genval-tiny"], "no preset 'genval-tiny'"),
        (["--model", "models/tinyworld", "--prompts", "gone.jsonl"], "gone.jsonl does not exist"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", *words) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert list(tmp_path.iterdir()) == []
