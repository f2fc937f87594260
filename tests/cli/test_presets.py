from __future__ import annotations

from pathlib import Path

import pytest

from ramctl import settings
from ramctl.cli.app import main
from ramctl.settings import load_settings


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(("presets", *words))
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_list_is_a_table_for_people_and_one_line_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    captured = capsys.readouterr()
    row = next(line for line in captured.err.splitlines() if line.strip().startswith("geneval-tiny "))
    assert "GenEval rules" in row
    assert "models/tinyworld" in row
    assert "geneval-tiny.toml" in row
    assert captured.out.startswith("RESULT presets=")
    assert "geneval-tiny" in captured.out.strip().removeprefix("RESULT presets=").split(",")


def test_list_shows_a_broken_preset_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.toml").write_text('name = "broken"\n[ram]\nmm = 1\n')
    monkeypatch.setattr(settings, "resource_dir", lambda kind: tmp_path)
    assert run() == 0
    assert "✗ Unknown key 'ram.mm' in preset broken" in capsys.readouterr().err


def test_show_prints_toml_that_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "geneval-tiny") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    copy = tmp_path / "copy.toml"
    copy.write_text(captured.out)
    assert load_settings(str(copy)).config == load_settings("geneval-tiny").config
    assert "resolution = 64  # preset geneval-tiny" in captured.out


def test_show_takes_a_config_file_and_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[train]\nsteps = 7\n")
    assert run("show", "geneval-tiny", "--config", str(file), "--lr", "1e-4", "--path-cost", "--seed=3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"steps = 7  # file {file}" in lines
    assert "lr = 0.0001  # command line" in lines
    assert "path_cost = true  # command line" in lines
    assert "seed = 3  # command line" in lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("show", "geneval-tinny"), "Did you mean 'geneval-tiny'"),
        (("show", "no.toml"), "no.toml does not exist"),
        (("show", "geneval-tiny", "--lrr", "1"), "Did you mean 'optimizer.lr'?"),
        (("show", "geneval-tiny", "--cofnig", "x"), "Unknown option --cofnig. Did you mean --config?"),
        (("show", "geneval-tiny", "--lr", "fast"), "optimizer.lr must be a number"),
        (("show", "geneval-tiny", "extra"), "Unexpected argument 'extra'"),
        (("show", "--lr", "1", "geneval-tiny"), "after the command's own arguments"),
        (("explain", "rewardmultiplier"), "Did you mean 'ram.reward_multiplier'?"),
    ],
)
def test_wrong_input_is_one_or_two_lines_and_exit_2(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) <= 2
    assert captured.out == ""


def test_explain_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "images-per-prompt") == 0
    text = capsys.readouterr().out
    assert "rollout.images_per_prompt\n  Group size: pictures per prompt\n" in text
    assert "takes    a whole number; at least 2" in text
    assert "default  24" in text
    assert "evaluation.images_per_prompt" in text


def test_explain_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "checkpoint") == 0
    text = capsys.readouterr().out
    assert "checkpoint.every" in text
    assert "checkpoint.keep" in text
    assert "optimizer" not in text
