from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ramctl import doctor
from ramctl.cli.app import main
from ramctl.doctor_check import Check


def run_with(checks: list[Check], monkeypatch: pytest.MonkeyPatch) -> int:
    asked = [(check.name, lambda check=check: check) for check in checks]
    monkeypatch.setattr(doctor, "all_checks", lambda *, deep: asked)
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    code = caught.value.code
    assert isinstance(code, int)
    return code


def test_all_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("python", "ok", "3.12"), Check("scorer ocr", "warning", "no weights", "get them")]
    assert run_with(checks, monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "✓ python      3.12",
        "! scorer ocr  no weights",
        "              → get them",
    ]
    assert captured.out.splitlines() == [
        "RESULT doctor.python=ok",
        "RESULT doctor.scorer.ocr=warning",
        "RESULT doctor=ok",
    ]


def test_one_failure_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with([Check("a", "failed", "gone", "do this"), Check("b", "ok", "fine")], monkeypatch) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["✗ a  gone", "     → do this", "✓ b  fine"]
    assert captured.out.splitlines()[-1] == "RESULT doctor=failed"


@pytest.mark.parametrize(("arguments", "deep"), [([], False), (["--deep"], True)])
def test_weights_are_only_loaded_when_asked(
    arguments: list[str], deep: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []
    fine = [("python", lambda: Check("python", "ok", "3.12"))]
    monkeypatch.setattr(doctor, "all_checks", lambda *, deep: asked.append(deep) or fine)
    with pytest.raises(SystemExit):
        main(["doctor", *arguments])
    assert asked == [deep]


@pytest.mark.slow
def test_on_this_machine_every_check_ends_and_the_exit_code_agrees(tmp_path: Path) -> None:
    root = str(Path(doctor.__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from ramctl.cli.app import main; main(['doctor'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line]
    assert all(line.startswith("RESULT doctor") for line in lines), done.stdout
    assert lines[-1] == ("RESULT doctor=ok" if done.returncode == 0 else "RESULT doctor=failed"), done.stderr
    assert "the check broke" not in done.stderr
    assert list(tmp_path.iterdir()) == []
