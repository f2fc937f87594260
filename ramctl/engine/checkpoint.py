"""Checkpoints that survive a kill at any instant, say when they are damaged, and resume bit for bit.

A checkpoint is a folder ``step-000050``. It is written under a temporary name, flushed, and renamed; ``latest`` and
``best`` are then replaced atomically. Its manifest holds the SHA-256 of every file, so a damaged one is found, named,
and the previous one used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ramctl.backbones.base import Backbone
from ramctl.config import LoraSection
from ramctl.engine.policy import Policy
from ramctl.engine.trainer import Trainer
from ramctl.errors import CheckpointError
from ramctl.hashing import file_sha256

#: the evaluation weights, under the name diffusers' load_lora_weights looks for.
EVALUATION_FILE = "pytorch_lora_weights.safetensors"
SET_FILES = {
    "evaluation": EVALUATION_FILE,
    "policy": "policy_lora_weights.safetensors",
    "old": "old_lora_weights.safetensors",
}
FULL_SET_FILES = {name: f"{name}_weights.safetensors" for name in SET_FILES}
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.toml"
_STEP = re.compile(r"^step-(\d{6,})$")


def set_files(lora: LoraSection) -> dict[str, str]:
    """File name of each weight set."""
    return SET_FILES if lora.rank else FULL_SET_FILES


def _flush(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step; a reader sees the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _point(link: Path, target: str) -> None:
    """Make ``link`` point to its sibling ``target``: a symbolic link, or a text file where links are not possible."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        try:
            temporary.symlink_to(target)
        except OSError:
            temporary.write_text(target, encoding="utf-8")
        temporary.replace(link)
    finally:
        temporary.unlink(missing_ok=True)


def _pointed(link: Path) -> Path | None:
    """The folder a pointer names, or None when there is no pointer."""
    if link.is_symlink():
        return link.parent / link.readlink()
    if link.is_file():
        return link.parent / link.read_text(encoding="utf-8").strip()
    return None


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint knows besides tensors: ``step`` finished steps and whatever the run adds in ``extra``."""

    step: int
    extra: Mapping[str, Any]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder (the file is named), or None when every file matches its manifest."""
    manifest_path = folder / MANIFEST_FILE
    try:
        manifest: dict[str, str] = dict(json.loads(manifest_path.read_text(encoding="utf-8"))["sha256"])
    except FileNotFoundError:
        return f"{manifest_path} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{manifest_path} is damaged"
    if not manifest:
        return f"{manifest_path} is damaged (it lists no file)"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if file_sha256(path) != expected:
            return f"{path} is damaged (its SHA-256 differs from the manifest)"
    return None


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep

    # -- finding ----------------------------------------------------------------------------------------------------

    def steps(self) -> dict[int, Path]:
        """Step number → folder, ascending; temporary folders are not among them."""
        found = {
            int(match.group(1)): path
            for path in (self.folder.iterdir() if self.folder.is_dir() else ())
            if (match := _STEP.match(path.name)) and path.is_dir()
        }
        return dict(sorted(found.items()))

    def newest_intact(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that passes its manifest, and what is wrong with each newer one."""
        problems: list[str] = []
        for path in reversed(self.steps().values()):
            problem = damage(path)
            if problem is None:
                return path, problems
            problems.append(problem)
        return None, problems

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best score, where one was marked."""
        return _pointed(self.folder / "best")

    def mark_best(self, step: int) -> None:
        """Move ``best`` to the checkpoint of ``step``; the one that it pointed to no longer stays for being the best.

        Raises:
            OSError: the disk is full or not writable; ``best`` is as it was.
        """
        name = self.steps()[step].name
        _point(self.folder / "best", name)
        self._prune(name)

    # -- writing ----------------------------------------------------------------------------------------------------

    def save(self, trainer: Trainer, config_text: str, extra: Mapping[str, Any], *, best: bool = False) -> Path:
        """Write the trainer's state as ``step-<n>`` and move ``latest`` (and ``best``) to it.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        name = f"step-{trainer.step_index:06d}"
        final, temporary = self.folder / name, self.folder / f".{name}.{os.getpid()}.tmp"
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            self._write(temporary, trainer, config_text, extra)
            if final.exists():  # the same step again, after a resume: the older one gives way only now
                retired = self.folder / f".{name}.{os.getpid()}.old"
                final.rename(retired)
                temporary.rename(final)
                shutil.rmtree(retired, ignore_errors=True)
            else:
                temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _flush(self.folder)
        _point(self.folder / "latest", name)
        if best:
            _point(self.folder / "best", name)
        self._prune(name)
        return final

    def _write(self, folder: Path, trainer: Trainer, config_text: str, extra: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        lora = trainer.policy.lora
        for which, file_name in set_files(lora).items():
            tensors = trainer.policy.tensors(which)  # type: ignore[arg-type]
            trainer.backbone.save_set(folder, file_name, tensors, lora)
        save_file(_optimizer_tensors(trainer), folder / OPTIMIZER_FILE)
        state = {"step": trainer.step_index, **extra}
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        (folder / CONFIG_FILE).write_text(config_text, encoding="utf-8")
        manifest = {"sha256": {path.name: file_sha256(path) for path in sorted(folder.iterdir())}}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            # safetensors makes its files readable by their owner only; colleagues share run folders.
            path.chmod((folder / STATE_FILE).stat().st_mode)
            _flush(path)
        _flush(folder)

    def _prune(self, newest: str) -> None:
        best = self.best
        removable = [p for p in self.steps().values() if p.name != newest and (best is None or p.name != best.name)]
        excess = len(removable) + 1 - self.keep
        for path in removable[: max(0, excess)]:
            # Renamed first: a half-removed folder must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def sweep_leftovers(self) -> None:
        """Remove temporary folders that a killed process left behind (call under the run's lock)."""
        for path in self.folder.glob(".*.tmp"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".step-*.old"):
            # A kill between the two renames of a re-saved step: the older copy is the checkpoint.
            original = self.folder / path.name[1:].split(".")[0]
            if original.exists() or damage(path) is not None:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(original)

    # -- reading ----------------------------------------------------------------------------------------------------

    @staticmethod
    def restore(folder: Path, trainer: Trainer) -> CheckpointState:
        """Load a checkpoint into a trainer made from the same config.

        Raises:
            CheckpointError: the checkpoint is damaged (the file is named) or holds other tensors.
        """
        problem = damage(folder)
        if problem is not None:
            raise CheckpointError(f"Checkpoint {folder.name} cannot be used: {problem}.")
        lora = trainer.policy.lora
        try:
            trainer.policy.load(
                {which: trainer.backbone.read_set(folder / name, lora) for which, name in set_files(lora).items()}
            )
            _load_optimizer(trainer, folder / OPTIMIZER_FILE)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"Checkpoint {folder} belongs to another model or LoRA: {error}.") from error
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        trainer.step_index = int(state.pop("step"))
        return CheckpointState(trainer.step_index, state)


def load_weights(policy: Policy, backbone: Backbone, folder: Path, which: str = "evaluation") -> None:
    """Load one set of a checkpoint as the policy's evaluation weights (for sampling and evaluation).

    Raises:
        CheckpointError: the checkpoint is damaged, or its tensors do not fit this model.
    """
    problem = damage(folder)
    if problem is not None:
        raise CheckpointError(f"Checkpoint {folder} cannot be used: {problem}.")
    try:
        policy.load({"evaluation": backbone.read_set(folder / set_files(policy.lora)[which], policy.lora)})
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"Checkpoint {folder} belongs to another model or LoRA: {error}.") from error


def find_checkpoint(path: Path) -> Path:
    """The checkpoint a user means: a step folder, ``latest`` or ``best``, or a run folder (its newest intact one).

    Raises:
        CheckpointError: there is none.
    """
    pointed = _pointed(path)
    if pointed is not None:
        # A kill while a step was written anew can leave `latest` pointing at nothing for as long as nobody resumes.
        path = path.parent if path.name == "latest" and not pointed.exists() else pointed
    if (path / MANIFEST_FILE).is_file():
        return path
    if path.is_dir():
        newest, problems = CheckpointStore(path).newest_intact()
        if newest is not None:
            return newest
        if problems:
            raise CheckpointError(f"No intact checkpoint in {path}: {problems[0]}.")
        raise CheckpointError(f"{path} holds no checkpoint (no step-… folder with a {MANIFEST_FILE}).")
    raise CheckpointError(f"Checkpoint {path} does not exist.")


def _optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """AdamW's moments and step counts by parameter name."""
    return dict(_named_state(trainer))


def _named_state(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in trainer.policy.parameters.items():
        for key, value in trainer.optimizer.state[parameter].items():
            yield f"{name}|{key}", value.detach().cpu().contiguous()


def _load_optimizer(trainer: Trainer, path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(path)
    for name, parameter in trainer.policy.parameters.items():
        state = {
            key: tensors[f"{name}|{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}|{key}" in tensors
        }
        if not state:  # saved before the first update
            continue
        trainer.optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
        }
