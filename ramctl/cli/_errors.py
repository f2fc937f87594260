"""From an exception to one or two plain lines and an exit code; the traceback is shown on demand only."""

from __future__ import annotations

import errno
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ramctl.cli._output import say
from ramctl.errors import RamctlError
from ramctl.launch import PARTNER_ENDED

INTERRUPTED = 130
_PACKAGE = Path(__file__).resolve().parents[1]
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM)
# Writers in compiled code (safetensors, torch, SQLite) raise their own types around the system's words.
_FULL_WORDS = ("no space left on device", "disk quota exceeded", "database or disk is full")
# torch.distributed has no type of its own for a partner that is gone: gloo raises RuntimeError, NCCL and the store
# types that stand for other failures, too.
_GONE_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "broken pipe",
    "remote process exit",
)


def report(error: BaseException, *, debug: bool) -> int:
    """Say on standard error what went wrong; returns the exit code.

    130 for an interrupt, the error's own code for a :class:`~ramctl.errors.RamctlError`, PARTNER_ENDED in a process
    that lost another one of its run, else 1. A closed pipe is silent: whoever read our output has seen enough.
    """
    if isinstance(error, BrokenPipeError):
        return 1
    if debug:
        say("".join(traceback.format_exception(error)).rstrip())
    if isinstance(error, KeyboardInterrupt):
        say("Interrupted.")
        return INTERRUPTED
    if isinstance(error, RamctlError):
        say(str(error))
        return error.exit_code
    if any(_is_partner_gone(cause) for cause in _chain(error)):
        say("Another process of this run has ended.")
        return PARTNER_ENDED
    known = _system_failure(error)
    say(known or _bug(error, debug=debug))
    return 1


def warn_plainly() -> None:
    """Let the package's own warnings be one line on standard error, each once; others' stay as they are."""
    usual, told = warnings.showwarning, set[str]()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not Path(filename).is_relative_to(_PACKAGE):
            usual(message, category, filename, lineno, file, line)
        elif str(message) not in told:
            told.add(str(message))
            say(f"Warning: {message}")

    warnings.showwarning = show


def _bug(error: BaseException, *, debug: bool) -> str:
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    advice = "" if debug else "; run with --debug for the traceback"
    return f"unexpected error: {what}\nThis is a bug{advice}."


def _system_failure(error: BaseException) -> str | None:
    """A failure of the machine in a sentence, or None. Causes are searched: libraries wrap them."""
    for cause in _chain(error):
        words = str(cause).lower()
        if isinstance(cause, OSError):
            sentence = _os_sentence(cause)
            if sentence:
                return sentence
        if any(phrase in words for phrase in _FULL_WORDS):
            return "No space is left on the disk. Free some, then run the same command again."
        if isinstance(cause, MemoryError):
            return "The machine ran out of memory. Close other programs, or ask for less at once."
        if type(cause).__module__.startswith(("torch._dynamo.exc", "torch._inductor.exc")):
            first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            return (
                f"torch.compile does not work on this machine ({first}). Go on without it: --runtime.compile false "
                "for train (with --rollout.float8 false, where that was on), --no-compile for evaluate."
            )
        if type(cause).__name__ == "OutOfMemoryError":
            return "The GPU ran out of memory. Free it of other programs, or ask for less at once."
    return None


def _is_partner_gone(error: BaseException) -> bool:
    words = str(error).lower()
    joined = type(error).__module__ == "torch.distributed" or "gloo" in words
    return isinstance(error, RuntimeError) and joined and any(phrase in words for phrase in _GONE_WORDS)


def _os_sentence(error: OSError) -> str | None:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _FULL:
        return f"No space is left on the disk{where}. Free some, then run the same command again."
    if error.errno == errno.EROFS:
        return f"The disk is read-only{where}. Work in a folder that can be written."
    if error.errno in _FORBIDDEN:
        return f"Permission denied{where}. Correct the file's rights, or work in another folder."
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception and what it was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
