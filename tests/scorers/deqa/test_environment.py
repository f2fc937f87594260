"""DeQA's environment: which interpreter is taken, and a making that fails leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramctl.errors import MissingDependencyError, UsageError
from ramctl.scorers.deqa import environment
from ramctl.scorers.deqa.environment import create, find_python, main


def interpreter(file: Path, says: str = "") -> Path:
    """An executable that prints a text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\necho {says}\n")
    file.chmod(0o755)
    return file


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.delenv("RAMCTL_DEQA_PYTHON", raising=False)
    return tmp_path / "weights"


def test_option_then_variable_then_the_default_folder(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = interpreter(store / "deqa" / "venv" / "bin" / "python")
    assert find_python() == default
    named = interpreter(tmp_path / "named")
    monkeypatch.setenv("RAMCTL_DEQA_PYTHON", str(named))
    assert find_python() == named
    option = interpreter(tmp_path / "option")
    assert find_python(str(option)) == option


def test_what_is_missing_is_named_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingDependencyError, match=r"deqa/venv.*python -m ramctl\.scorers\.deqa\.environment"):
        find_python()
    with pytest.raises(MissingDependencyError, match=r"nowhere/python.*the option python"):
        find_python(str(tmp_path / "nowhere" / "python"))
    monkeypatch.setenv("RAMCTL_DEQA_PYTHON", "no-such-python")
    with pytest.raises(MissingDependencyError, match=r"no-such-python.*RAMCTL_DEQA_PYTHON"):
        find_python()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        create(tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("version", ["3 9", "3 13", "2 7"])
def test_an_interpreter_of_another_version_is_refused(tmp_path: Path, version: str) -> None:
    other = interpreter(tmp_path / "python", version)
    with pytest.raises(UsageError, match=rf"Python {version.replace(' ', '.')}; .* 3\.10 to 3\.12"):
        create(tmp_path / "new", str(other))
    assert not (tmp_path / "new").exists()


def test_an_interpreter_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "new"), "--python", str(tmp_path / "nothing")]) == 2
    assert "not a Python interpreter" in capsys.readouterr().err


@pytest.mark.slow
def test_a_making_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", ""), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    assert main([str(tmp_path / "new"), "--torch", "ramctl-no-such-package==0"]) == 1
    assert not (tmp_path / "new").exists()


def test_every_package_is_pinned() -> None:
    assert all("==" in requirement for requirement in (environment.TORCH, *environment.REQUIREMENTS))
    assert "transformers==4.36.1" in environment.REQUIREMENTS
