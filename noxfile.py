"""Development sessions: `nox -l` lists them. They use the environment nox runs in, so nothing is installed twice."""

from __future__ import annotations

import hashlib
import sys
import tarfile
import urllib.request
from pathlib import Path

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
    session.run("pytest", "-n", "auto", "-m", "not slow", *session.posargs)


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


# -- parity with the official packages' own code on random weights, each in an environment of its own


MMCV = (
    "https://files.pythonhosted.org/packages/88/ef/862b968b07ae49c21e4d71984e5e9da887d24ab117e40980405b8e228d1d/"
    "mmcv-1.7.2.tar.gz"
)
MMCV_SHA256 = "2116a1609f9d3f59824074774366fd8b9410437bc95a24d535669b35d55352be"


def _mmcv_source(session: nox.Session) -> Path:
    """mmcv's Python part, unpacked: it cannot be built on current stacks, and the script stands in for the rest."""
    folder = Path(session.create_tmp())
    archive = folder / MMCV.rpartition("/")[2]
    urllib.request.urlretrieve(MMCV, archive)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != MMCV_SHA256:
        session.error(f"{archive} arrived damaged")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    return folder / "mmcv-1.7.2"


@nox.session(venv_backend="venv")
def parity_clip(session: nox.Session) -> None:
    """pickscore, hpsv2, aesthetic and clipscore beside open_clip and hpsv2x (12 GB of memory)."""
    session.install("-r", "tests/parity/clip.txt")
    session.install("--no-deps", "torchvision==0.28.0", "open_clip_torch==3.3.0", "hpsv2x==1.2.0", "clint", "args")
    session.run("python", "tests/parity/clip_official.py", *session.posargs, env={"PYTHONPATH": "."})


@nox.session(venv_backend="venv")
def parity_imagereward(session: nox.Session) -> None:
    """imagereward beside image-reward 1.5."""
    session.install("-r", "tests/parity/imagereward.txt")
    session.install("--no-deps", "image-reward==1.5")
    official = str(Path(session.virtualenv.location, "bin", "python"))
    session.run(sys.executable, "tests/parity/imagereward_official.py", official, external=True)


@nox.session(venv_backend="venv")
def parity_mask2former(session: nox.Session) -> None:
    """The GenEval detector beside MMDetection 2.28.2."""
    session.install("-r", "tests/parity/mask2former.txt")
    session.install("--no-deps", "mmdet==2.28.2")
    paths = f".:{_mmcv_source(session)}"
    session.run("python", "tests/parity/mask2former_official.py", *session.posargs, env={"PYTHONPATH": paths})


@nox.session
def parity_deqa(session: nox.Session) -> None:
    """deqa's runner beside Q-Align's published code, on which DeQA's is built."""
    folder = Path(session.create_tmp())
    environment = folder / "deqa"
    session.run("python", "-m", "ramctl.scorers.deqa.environment", str(environment))
    session.run("python", "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "pyiqa==0.1.15")
    wheel = next(folder.glob("pyiqa-*.whl"))
    session.run("python", "tests/parity/deqa_official.py", str(environment / "bin" / "python"), str(wheel))


@nox.session(venv_backend="venv")
def parity_ocr(session: nox.Session) -> None:
    """RapidOCR beside PaddleOCR on the same pictures and weights (1.5 GB of packages)."""
    session.install(".[paddle]")
    session.run("python", "tests/parity/paddle_engine.py", *session.posargs, env={"PYTHONPATH": "."})
