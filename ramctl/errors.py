"""The failures a user can cause, each printable as it stands: what happened, where, and what to do about it.

The command line prints the message of a :class:`RamctlError` without a traceback and exits with its ``exit_code``.
Anything else that escapes is a bug of ours and is reported as one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RamctlError(Exception):
    """A failure with a message for the user; ``exit_code`` 1: the work failed."""

    exit_code = 1


class UsageError(RamctlError):
    """The command line, a preset or an option is wrong; ``exit_code`` 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A preset, a config file or an override holds an unknown key, a wrong type or an impossible value."""


class DataError(UsageError):
    """A prompt file, its metadata or an image folder cannot be used as it is."""


class MissingDependencyError(RamctlError):
    """A package or a weight file is absent; the message holds the command that gets it."""


class ScorerError(RamctlError):
    """A scorer cannot work: its self-test failed or it broke on a whole batch."""


class CheckpointError(RamctlError):
    """A checkpoint is absent, damaged or belongs to another run."""


class RunFolderError(RamctlError):
    """The run folder cannot be used: locked by another process, read-only, full, or of another preset."""


class DivergedError(RamctlError):
    """Training went wrong: non-finite numbers, or the reward collapsed while the policy drifted away."""


class OutOfMemoryError(RamctlError):
    """A pass does not fit into the GPU's memory, not even with half its micro-batch."""


def did_you_mean(wrong: str, valid: Iterable[str], *, limit: int = 3) -> str:
    """`` Did you mean 'a' or 'b'?`` for the names nearest to ``wrong``, or an empty string when none is near."""
    near = difflib.get_close_matches(wrong, list(valid), n=limit, cutoff=0.5)
    if not near:
        return ""
    return f" Did you mean {' or '.join(repr(name) for name in near)}?"
