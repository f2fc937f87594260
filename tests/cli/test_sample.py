"""``ramctl sample`` as a user types it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ramctl.cli import app
from ramctl.images import read_image_folder
from ramctl.prompts import Prompt


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        app.main(words)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def results(text: str) -> dict[str, str]:
    assert all(line.startswith("RESULT ") for line in text.splitlines()), text
    return dict(line.removeprefix("RESULT ").split("=", 1) for line in text.splitlines())


def test_pictures_of_a_checkpoint_beside_those_of_its_base(
    tiny_checkpoint: Path, tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["sample", str(tiny_checkpoint.parent), "--prompt", "a photo of a star", "--compare-base", "-n", "2"]
    words += ["--prompts", str(tiny_preset.with_name("signs.jsonl")), "--device", "cpu", "--output", str(out)]
    assert run(*words) == 0
    captured = capsys.readouterr()
    said = results(captured.out)
    assert said == {
        "images": "12",
        "folder": str(out),
        "tuned": str(out / "tuned"),
        "base": str(out / "base"),
        "grid": str(out / "grid.png"),
    }
    assert "6 of 6 pictures" in captured.err
    prompts = [row.prompt for row in read_image_folder(out / "tuned")][::2]
    assert prompts[0] == Prompt("a photo of a star")
    assert prompts[1].metadata["target"] == "fox"
    # What sample writes, score reads: the base's pictures as well.
    assert run("score", str(out / "base"), "--scorer", "jpeg-compressibility") == 0
    assert results(capsys.readouterr().out)["jpeg-compressibility/images"] == "6"


def test_settings_come_from_the_source_unless_given(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    for name, extra in (("a", []), ("b", ["--steps", "1", "--guidance-scale", "1", "--negative-prompt", "red"])):
        assert run("sample", str(tiny_checkpoint), "-p", "a star", "-o", str(tmp_path / name), *extra) == 0
    facts = [json.loads((tmp_path / name / "sampling.json").read_text()) for name in ("a", "b")]
    keys = ("sampling_steps", "guidance_scale", "negative_prompt", "precision")
    assert [tuple(fact[key] for key in keys) for fact in facts] == [
        (2, 1.5, "", "float32"),
        (1, 1.0, "red", "float32"),
    ]


def test_a_lora_goes_out_and_comes_back(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.safetensors"
    assert run("sample", str(tiny_checkpoint), "--export-lora", str(file), "--lora-format", "kohya") == 0
    captured = capsys.readouterr()
    assert results(captured.out) == {"lora": str(file)} and "47 layers" in captured.err
    words = ["models/tinyworld", "--lora", str(file), "-p", "a star", "--device", "cpu", "--steps", "2"]
    assert run("sample", *words, "--compare-base", "-o", str(tmp_path / "out")) == 0
    said = results(capsys.readouterr().out)
    assert said["images"] == "2" and Path(said["base"]).is_dir()
    # Exported and drawn with in one go; the default folder names the file.
    assert (
        run("sample", *words, "--export-lora", str(tmp_path / "again.safetensors"), "-o", str(tmp_path / "more")) == 0
    )
    assert {"lora", "grid"} <= results(capsys.readouterr().out).keys()


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["models/tinyworld"], "--prompt TEXT", 2),
        (["models/tinyworld", "-p", "a star", "--guidance-scale", "-1"], "guidance_scale must be 0 or more", 2),
        (["models/tinyworld", "-p", "a star", "--steps", "0"], "sampling_steps must be 1 or more", 2),
        (["models/tinyworld", "-p", "a star", "--compare-base"], "is a base model", 2),
        (["models/tinyworld", "-p", "a star", "--weights", "old"], "is a base model", 2),
        (["models/tinyworld", "-p", "a star", "--precision", "fp16"], "float32, bfloat16", 2),
        (["models/tinyworld", "--prompts", "gone.txt"], "gone.txt does not exist", 2),
        (["models/tinyworl", "-p", "a star"], "Nothing is at models/tinyworl", 1),
        (["models/tinyworld", "-p", "a star", "--lora", "gone.safetensors"], "gone.safetensors does not exist", 1),
        (["models/tinyworld", "--export-lora", "x.safetensors"], "has no LoRA to export", 2),
        (["models/tinyworld", "--export-lora", "x.safetensors", "--lora-format", "koya"], "Did you mean 'kohya'", 2),
        (["models/tinyworld", "-p", "a star", "--sampler", "eulr"], "Did you mean 'euler'", 2),
        (["models/tinyworld", "-p", "a \udcff star"], "not valid Unicode", 2),
        (["models/tinyworld", "-p", "a star", "--negative-prompt", "\udcff"], "not valid Unicode", 2),
        (["models/tinyworld", "-p", "a star", "--lora-format", "kohya"], "give --export-lora FILE", 2),
        (["models/tinyworld", "-p", "a star", "--lora", "."], "LoRA file . is a folder", 1),
        (["models/tinyworld", "-p", "a star", "--output", "/dev/null"], "Output folder /dev/null is a file", 2),
        (["models/tinyworld", "-p", "a star", "--output", "/dev/null/x"], "/dev/null/x cannot be made in /dev/null", 2),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(
    words: list[str],
    said: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("sample", *words) == code
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert len(captured.err.strip().splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("sample", "models/tinyworld", "-p", "a star") == 2
    assert "one process" in capsys.readouterr().err


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sample", "--help") == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for option in ("--prompt", "--compare-base", "--weights", "--base", "one process"):
        assert option in text
