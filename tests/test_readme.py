"""README's shell blocks are run, so that what it says to type works.

``install-and-test`` is run word for word by ``.ci/run``. The others run here with the training runs and evaluations cut
short, or as they stand with RAMCTL_README_IN_FULL=1 (``nox -s readme``), ``install-and-train`` then included.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- block: ([\w-]+) -->\s*```sh\n(.*?)```", README, re.DOTALL))
IN_FULL = os.environ.get("RAMCTL_README_IN_FULL") == "1"
#: in the order a reader runs them: later ones use what earlier ones made.
IN_ORDER = ("train", "train-variants", "sample", "export", "score", "evaluate", "downloads", "presets")


def shortened(line: str) -> str:
    """The same command on fewer steps and prompts."""
    if line.startswith("ramctl train") and "--dry-run" not in line:
        return re.sub(r" --steps \d+", "", line) + " --steps 2 --evaluation.prompts 8 --rollout.prompts_per_step 2"
    if line.startswith("ramctl evaluate"):
        return f"{line} --limit 8"
    return line


def run(script: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_every_shell_block_has_a_name_and_is_run_somewhere() -> None:
    shell = re.findall(r"```(?:sh|bash|shell|console)\n", README)
    assert len(shell) == len(BLOCKS)
    assert set(BLOCKS) == {*IN_ORDER, "install-and-test", "install-and-train", "full-size", "development"}


def test_ci_runs_the_install_and_test_block() -> None:
    assert "readme_block.py install-and-test | bash" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    printed = subprocess.run(
        [sys.executable, ROOT / ".ci" / "readme_block.py", "install-and-test"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == BLOCKS["install-and-test"]


def test_the_development_sessions_exist() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "-l"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for line in BLOCKS["development"].splitlines():
        for session in line.removeprefix("nox -s ").split():
            assert re.search(rf"^[*-] {session} ", listed, re.MULTILINE)


def test_the_full_size_commands_as_dry_runs(tmp_path: Path) -> None:
    """What they would fetch and do; the weights are gated and 18 GB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAMCTL_WEIGHTS": str(tmp_path / "weights")}
    printed = ""
    for line in BLOCKS["full-size"].splitlines():
        words = [sys.executable, "-m", *line.split(), "--dry-run"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert "RESULT bytes_to_fetch.sd3.5-medium=" in printed
    assert "RESULT plan.processes=8" in printed
    assert "RESULT plan.forwards.sample=46080" in printed


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_the_commands_work_in_a_readers_order(tmp_path: Path) -> None:
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    if shutil.which("ramctl", path=environment["PATH"]) is None:
        pytest.fail("the command ramctl is not installed beside this Python: pip install -e .")
    printed = {}
    for name in IN_ORDER:
        lines = BLOCKS[name].splitlines()
        printed[name] = run("\n".join(lines if IN_FULL else map(shortened, lines)), tmp_path, environment)
    assert "RESULT strict_after=" in printed["train"]
    assert "RESULT ocr/mean=" in printed["score"]
    assert "RESULT strict=" in printed["evaluate"]
    assert (tmp_path / "outputs" / "geneval-tiny" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.skipif(not IN_FULL, reason="installs and trains for minutes: nox -s readme")
def test_install_and_train_in_a_fresh_clone(tmp_path: Path) -> None:
    run(f"git clone -q {ROOT} clone", tmp_path, dict(os.environ))
    printed = run(BLOCKS["install-and-train"], tmp_path / "clone", dict(os.environ))
    assert "RESULT strict_gain=" in printed
