"""Development sessions: `nox -l` lists them. They use the environment nox runs in, so nothing is installed twice."""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]

PYTHON_FILES = ("ramctl", "tests", "benchmarks", "noxfile.py")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and formatting."""
    session.run("ruff", "check", *PYTHON_FILES)
    session.run("ruff", "format", "--check", *PYTHON_FILES)


@nox.session
def types(session: nox.Session) -> None:
    """mypy in strict mode over the package."""
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The unit suite: no network, minutes. `nox -s tests -- -k NAME` passes arguments on."""
    session.run("pytest", "-m", "not slow", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that train, start processes or run README's commands."""
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def readme(session: nox.Session) -> None:
    """README's shell blocks, exactly as they stand, the full training runs included (half an hour on two cores)."""
    session.run("python", "-m", "pytest", "tests/test_readme.py", "-m", "slow", env={"RAMCTL_README_IN_FULL": "1"})


@nox.session
def pretrain(session: nox.Session) -> None:
    """Pretrain the embedded model anew into models/tinyworld-new (one GPU, under ten minutes)."""
    session.run("python", "-m", "ramctl.tinyworld.pretrain", "models/tinyworld-new", "--compiled", *session.posargs)
