"""Make DeQA's own Python environment: ``python -m ramctl.scorers.deqa.environment [FOLDER]``.

The code published with DeQA-Score works with transformers 4.36.1 and numpy 1.x: under newer releases its import or its
first forward pass fails. So it gets a virtual environment, by default ``deqa/venv`` beside the other weights, and the
scorer starts its runner there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ramctl.errors import MissingDependencyError, RamctlError, UsageError

COMMAND = "python -m ramctl.scorers.deqa.environment"

#: Names an interpreter of the user's own; the scorer's option ``python`` goes before it.
PYTHON_VARIABLE = "RAMCTL_DEQA_PYTHON"

#: tokenizers 0.15, which transformers 4.36 needs, has no wheels for newer interpreters; torch none for older ones.
OLDEST, NEWEST = (3, 10), (3, 12)

TORCH = "torch==2.13.0"
REQUIREMENTS = (
    "transformers==4.36.1",
    "tokenizers==0.15.2",
    "numpy==1.26.4",
    "huggingface-hub==0.25.2",
    "safetensors==0.4.5",
    "accelerate==0.25.0",
    "sentencepiece==0.2.0",
    "protobuf==4.25.8",
    "pillow==11.3.0",
    "icecream==2.1.3",
    "einops==0.6.1",
    "requests==2.32.5",
)


def default_folder() -> Path:
    """Where the environment lies when nobody says otherwise."""
    from ramctl.weights import weights_root

    return weights_root() / "deqa" / "venv"


def find_python(option: str = "") -> Path:
    """The interpreter DeQA runs in: the option, else ``RAMCTL_DEQA_PYTHON``, else the default environment's.

    Raises:
        MissingDependencyError: it is not there.
    """
    named = option or os.environ.get(PYTHON_VARIABLE, "")
    if named:
        found = shutil.which(Path(named).expanduser())
        if found is None:
            source = "the option python" if option else PYTHON_VARIABLE
            raise MissingDependencyError(
                f"The scorer 'deqa': there is no interpreter {named!r} ({source}). Make one: {COMMAND} FOLDER, "
                f"then name FOLDER/bin/python."
            )
        return Path(found)
    python = default_folder() / "bin" / "python"
    if not python.is_file():
        raise MissingDependencyError(
            f"The scorer 'deqa' runs in a Python environment of its own, which is not there ({python.parents[1]}): "
            f"{COMMAND}"
        )
    return python


def create(folder: Path, base: str = sys.executable, torch: str = TORCH) -> Path:
    """Make the environment with pip and return its interpreter. A folder whose making failed is removed again.

    Args:
        folder: where; must not exist or be empty.
        base: the interpreter to make it from, Python 3.10 to 3.12.
        torch: pip's requirement for torch; another CUDA version's build may be what a machine needs.

    Raises:
        UsageError: the folder is in use, or the interpreter is of another version.
        RamctlError: pip failed; its output has gone to standard error.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already. Remove it to make it anew, or name another folder.")
    _check_version(base)
    folder.parent.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    try:
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        subprocess.run([*pip, torch, *REQUIREMENTS], check=True, stdout=sys.stderr)
        subprocess.run([str(python), "-c", "import accelerate, torch, transformers"], check=True)
    except (subprocess.CalledProcessError, OSError, KeyboardInterrupt) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RamctlError(f"Making DeQA's environment in {folder} failed: {error}") from None
    return python


def _check_version(base: str) -> None:
    script = "import sys; print(*sys.version_info[:2])"
    try:
        answer = subprocess.run([base, "-c", script], check=True, capture_output=True, text=True).stdout
    except (subprocess.CalledProcessError, OSError) as error:
        raise UsageError(f"{base} is not a Python interpreter that starts: {error}") from None
    major, minor = (int(part) for part in answer.split())
    if not OLDEST <= (major, minor) <= NEWEST:
        raise UsageError(
            f"{base} is Python {major}.{minor}; the releases DeQA needs exist for 3.{OLDEST[1]} to 3.{NEWEST[1]}. "
            f"Name one of those: {COMMAND} --python python3.11"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("folder", nargs="?", type=Path, help="where to make it (default: beside the weights)")
    parser.add_argument("--python", default=sys.executable, help="interpreter to make it from (3.10 to 3.12)")
    parser.add_argument("--torch", default=TORCH, help=f"pip's requirement for torch (default {TORCH})")
    options = parser.parse_args(arguments)
    try:
        python = create((options.folder or default_folder()).absolute(), options.python, options.torch)
    except RamctlError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"RESULT python={python}")
    if options.folder is not None and options.folder.absolute() != default_folder().absolute():
        print(f"Tell ramctl about it: export {PYTHON_VARIABLE}={python}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
