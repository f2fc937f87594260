"""``ramctl train --dry-run --gpu-memory``: a question about a card, from any machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramctl.cli import app


def ramctl(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """``ramctl train …`` in this process: (exit code, standard output, standard error)."""
    with pytest.raises(SystemExit) as caught:
        app.main(["train", *map(str, words)])
    captured = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, captured.out, captured.err


def test_a_card_is_asked_about(tiny_preset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (tiny_preset, "--dry-run", "--gpu-memory", "24", "--runtime.device", "auto")
    code, out, error = ramctl(capsys, *words)
    assert code == 0
    assert "RESULT plan.fits=true" in out and f"RESULT plan.memory.free={24 * 2**30}" in out
    assert "fits 24 GB (a card of 24 GiB = 25.77 GB" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu-memory", "24"], "give it with --dry-run"),
        (["--gpu-memory", "24", "--dry-run"], "--runtime.device cuda"),  # the preset trains on the CPU
        (["--gpu-memory", "inf", "--dry-run"], "--gpu-memory is inf"),
    ],
)
def test_a_question_that_makes_no_sense_is_one_line_and_exit_code_2(
    tiny_preset: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    code, out, error = ramctl(capsys, tiny_preset, *words)
    assert (code, out) == (2, "")
    assert said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("size", ["0.5", "nan", "24GB"])
def test_a_card_has_a_size(tiny_preset: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    code, _, error = ramctl(capsys, tiny_preset, "--dry-run", "--gpu-memory", size)
    assert code == 2 and "--gpu-memory" in error


def test_the_run_that_is_planned_is_the_one_asked_for(
    tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "elsewhere"
    words = ("--dry-run", "--output", folder, "--num-processes", "5", "--max_failed_share", "1")
    _, _, error = ramctl(capsys, tiny_preset, *words, "--reward.scorers.jpeg-compressibility.output", "strickt")
    assert str(folder) in error.replace("\n", "")
    assert "5 cannot share 4 pictures per step" in error
    assert "is 'strickt', which this scorer does not report" in error
    assert not folder.exists()
