"""The folder of one run: its lock, its config, its metrics file.

Nothing of an earlier run is ever overwritten: another preset's folder is refused, ``--fresh`` takes a new name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ramctl.config import Config
from ramctl.engine.checkpoint import CONFIG_FILE, STATE_FILE, write_atomically
from ramctl.errors import CheckpointError, ConfigError, RunFolderError
from ramctl.hashing import file_sha256
from ramctl.resources import find_resource
from ramctl.settings import Settings, config_differences, load_settings, settings_toml

#: Environment variable in which a launching process tells its children what the user typed.
TYPED_ARGUMENTS = "RAMCTL_TYPED_ARGUMENTS"

#: Keys that may change between a run and its resumption: they do not change the experiment.
FREE_TO_CHANGE = (
    "description",
    "model.text_encoders",
    "reward.self_test",
    "reward.max_failed_share",
    "train.steps",
    "train.micro_batch",
    "train.sweep_micro_batch",
    "train.gradient_checkpointing",
    "train.guard",
    "rollout.micro_batch",
    "rollout.float8",
    "evaluation.every",
    "evaluation.picture_prompts",
    "checkpoint.",
    "tracking.",
    "runtime.device",
    "runtime.threads",
    "runtime.compile",
)

#: Key of a checkpoint's state under which the hashes of the prompt files are kept.
PROMPT_HASHES = "prompts_sha256"

# What flock answers where another process holds the lock; anything else is about the file system.
_HELD = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)


def numbered(folder: Path) -> Path:
    """The folder itself when it does not exist, else the first free ``<name>-2``, ``<name>-3``, …"""
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def resume_command(folder: Path) -> str:
    """The command line that resumes the run in ``folder``: the one that was typed.

    ``--fresh`` is left out, which takes the new folder's name in its place.
    """
    rest = shlex.split(os.environ[TYPED_ARGUMENTS]) if TYPED_ARGUMENTS in os.environ else sys.argv[1:]
    if "--fresh" not in rest:
        return shlex.join(["ramctl", *rest])
    kept: list[str] = []
    while rest:
        word, *rest = rest
        if word == "--output":
            rest = rest[1:]
        elif word != "--fresh" and not word.startswith("--output="):
            kept.append(word)
    return shlex.join(["ramctl", *kept, "--output", str(folder)])


def prompt_hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the prompt files' bytes by the key that names them (``prompts.train``, ``prompts.evaluation``)."""
    return {key: file_sha256(find_resource(path)) for key, path in _prompt_files(config).items()}


def _prompt_files(config: Config) -> dict[str, str]:
    named = {"prompts.train": config.prompts.train, "prompts.evaluation": config.prompts.evaluation}
    return {key: path for key, path in named.items() if path is not None}


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self, warn: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the folder for this process; on a file system without locks only ``warn`` is told.

        Raises:
            RunFolderError: another process holds it (it is named), or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(
                f"Run folder {self.path} cannot be written: {os.strerror(error.errno or errno.EIO)}. "
                "Choose another with --output."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _HELD:
                    lock.seek(0)
                    raise RunFolderError(
                        f"Run folder {self.path} is in use by {lock.read().strip() or 'another process'}. "
                        "Wait for it to end, stop it, or choose another folder with --output."
                    ) from None
                if warn is not None:
                    warn(
                        f"The file system of {self.path} has no locks ({os.strerror(error.errno or errno.EIO)}): "
                        "start no second run in this folder."
                    )
            lock.seek(0)
            lock.truncate()
            lock.write(f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv)[:200]})\n")
            lock.flush()
            yield

    def check_owner(self, config: Config) -> None:
        """Refuse a folder with files in it that are not this preset's run.

        Raises:
            RunFolderError: it belongs to another preset, or is no run folder at all.
        """
        # Our lock, and what a killed process left of its first file, do not make it somebody's folder.
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        others = [name for name in names if name != ".lock" and not name.startswith(f".{CONFIG_FILE}.")]
        config_file = self.path / CONFIG_FILE
        if not others:
            return
        if not config_file.is_file():
            raise RunFolderError(
                f"Folder {self.path} is not empty and is no run folder (no {CONFIG_FILE}). Choose one with --output."
            )
        owner = load_settings(str(config_file)).config.name
        if owner != config.name:
            raise RunFolderError(
                f"Run folder {self.path} belongs to preset {owner!r}, not {config.name!r}. Choose one with --output."
            )

    def check_same_experiment(self, checkpoint: Path, settings: Settings) -> None:
        """Refuse to resume with settings or prompts that would make it another experiment.

        Checkpoints of runs that kept no hashes of their prompt files are not compared in that.

        Raises:
            ConfigError: the keys that differ are listed.
        """
        saved = load_settings(str(checkpoint / CONFIG_FILE)).config
        changes = [line for line in config_differences(saved, settings.config) if not line.startswith(FREE_TO_CHANGE)]
        changes += _changed_prompts(checkpoint, settings.config, changes)
        if changes:
            shown = "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
            raise ConfigError(
                f"{self.path} was trained with other settings: {shown}. "
                "Resume with the old ones, or start a new run with --fresh."
            )

    def write_config(self, settings: Settings) -> str:
        """Write the resolved config with provenance; its text."""
        text = settings_toml(settings, ("resolved configuration of this run; `ramctl train` can read it again",))
        write_atomically(self.path / CONFIG_FILE, text)
        return text

    # -- metrics ----------------------------------------------------------------------------------------------------

    def append(self, file_name: str, row: Mapping[str, Any]) -> None:
        """Add one line to a JSONL file of the run."""
        with (self.path / file_name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({k: _jsonable(v) for k, v in row.items()}) + "\n")

    def put(self, file_name: str, row: Mapping[str, Any]) -> None:
        """Set the row of its ``step`` in a JSONL file of the run: in place of an earlier one, in the order of steps."""
        others = [other for other in self.rows(file_name) if other["step"] != row["step"]]
        kept = sorted([*others, {k: _jsonable(v) for k, v in row.items()}], key=lambda one: float(one["step"]))
        write_atomically(self.path / file_name, "".join(json.dumps(one) + "\n" for one in kept))

    def rows(self, file_name: str) -> list[dict[str, Any]]:
        """All rows of a JSONL file; a half-written last line (a killed process) is left out."""
        path = self.path / file_name
        rows: list[dict[str, Any]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def rewind(self, step: int) -> None:
        """Drop rows after ``step`` from the JSONL files: those steps will be run again."""
        for file_name in ("metrics.jsonl", "evaluations.jsonl"):
            rows = self.rows(file_name)
            kept = [row for row in rows if row["step"] <= step]
            if (self.path / file_name).is_file():
                write_atomically(self.path / file_name, "".join(json.dumps(row) + "\n" for row in kept))


def _changed_prompts(checkpoint: Path, config: Config, changes: list[str]) -> list[str]:
    """Prompt files with other content than at ``checkpoint``, one line each; not where the file itself is another."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    before, now = state.get(PROMPT_HASHES, {}), prompt_hashes(config)
    return [
        f"{key}: the content of {path} (SHA-256 {before[key][:12]}… → {now[key][:12]}…)"
        for key, path in _prompt_files(config).items()
        if before.get(key, now[key]) != now[key] and not any(line.startswith(f"{key}:") for line in changes)
    ]


def _jsonable(value: Any) -> Any:
    """NaN becomes null: JSON has no NaN."""
    return None if isinstance(value, float) and value != value else value


def require_checkpoint(path: Path | None, problems: list[str]) -> None:
    """Refuse to start from zero in silence where every checkpoint is damaged.

    Raises:
        CheckpointError: there are checkpoints, and none is intact.
    """
    if path is None and problems:
        raise CheckpointError(
            f"No intact checkpoint to resume from: {'; '.join(problems[:3])}. Start a new run with --fresh."
        )
