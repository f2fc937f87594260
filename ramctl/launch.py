"""Starts N processes of this same command on one machine, joined by torch.distributed's environment variables.

Several machines are the business of ``accelerate launch`` or ``torchrun``, which set the same variables.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO

from ramctl.errors import RamctlError

#: Exit code of a process that failed only because another one of its run has ended; launch() passes on the other's.
PARTNER_ENDED = 3

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 20.0
_FIRST_WORD_SECONDS = 10.0


class _Terminated(Exception):
    """A SIGTERM has reached the launching process."""


def _on_sigterm(signum: int, frame: object) -> None:
    # `timeout` signals the process and then its group; the second one must not end the ending of the others.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def is_launched() -> bool:
    """Whether this process is already one of several (started by us, accelerate or torchrun)."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back to the block's end: an exception inside of Popen loses a process already there."""
    arrived: list[int] = []
    # What is ignored stays so, as a process inherits that.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(n))]
    previous = [signal.signal(number, lambda number, frame: arrived.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ending:
    """Ends a process that is still joined to others at its exit, without taking the interpreter apart.

    After an error nobody has left the process group, since its partners may be waiting in it. Gloo's threads then let
    go of tensors while the interpreter is taken apart, and at times that aborts the process: SIGABRT in place of the
    exit code. Make it before anything else registers with ``atexit``: it comes last, after all other clearing up.
    """

    def __init__(self) -> None:
        self.code = 1
        if is_launched():
            atexit.register(self._end)

    def _end(self) -> None:
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_initialized():
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a closed pipe
                stream.flush()
        os._exit(self.code)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run ``ramctl <arguments>``, the words as they were typed, in that many processes; the exit code of the run.

    The first process owns the terminal. The others' messages are kept aside; one is shown only where the first process
    has failed because of that other one, or not at all, so that a mistake of the user's is reported once. When one
    process fails the rest are ended.

    Raises:
        RamctlError: a process could not be started; those that were have ended.
    """
    port = _free_port()
    running: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes]] = []
    previous = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
        for rank in range(processes):
            with _undisturbed():
                _start(running, logs, arguments, _environment(rank, processes, port, arguments))
        return _wait(running, logs)
    except _Terminated:
        _end(running, terminate=True)
        previous = signal.SIG_IGN  # still the same SIGTERM, for all that this process has left to do
        return 130
    except KeyboardInterrupt:  # a terminal has sent it to the children, too; `kill` has not
        _end(running, terminate=False)
        return 130
    except BaseException:
        _end(running, terminate=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        for log in logs:
            log.close()


def _environment(rank: int, processes: int, port: int, arguments: Sequence[str]) -> dict[str, str]:
    from ramctl.runfolder import TYPED_ARGUMENTS

    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        TYPED_ARGUMENTS: shlex.join(arguments),
    }


def _start(
    running: list[subprocess.Popen[bytes]],
    logs: list[IO[bytes]],
    arguments: Sequence[str],
    environment: dict[str, str],
) -> None:
    """Start the next process; the first one on the terminal, the others with a log each."""
    command = [sys.executable, "-m", "ramctl", *arguments]
    log: IO[bytes] | None = None
    try:
        if running:
            log = tempfile.TemporaryFile()  # noqa: SIM115 - closed when all processes have ended
            logs.append(log)
        running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    except OSError as error:
        raise RamctlError(
            f"Process {len(running)} could not be started: {error}. "
            "Free memory or disk, or ask for fewer with --num-processes."
        ) from error


def _wait(running: list[subprocess.Popen[bytes]], logs: list[IO[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in running]
        if all(code == 0 for code in codes):
            return 0
        if any(codes):
            failed = _failures(running)
            _end(running, terminate=True)
            return _tell(failed, logs)
        time.sleep(_POLL_SECONDS)


def _failures(running: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Rank → exit code of the processes that failed by themselves, in the order in which they were seen to.

    The first process is given time to fail as well: it usually does for the same reason, says it better, and has a
    report to write. If it fails because another one has ended, that one is waited for.
    """
    failed: dict[int, int] = {}
    deadline = time.monotonic() + _FIRST_WORD_SECONDS
    while True:
        codes = [process.poll() for process in running]
        new = {rank: code for rank, code in enumerate(codes) if code and rank not in failed}
        # Of those seen at once, a killed one comes first: it has failed because of nobody.
        failed |= sorted(new.items(), key=lambda item: item[1] > 0)
        known = any(code != PARTNER_ENDED for code in failed.values())
        if None not in codes or (known and codes[0] is not None) or time.monotonic() > deadline:
            return failed
        time.sleep(_POLL_SECONDS)


def _tell(failed: dict[int, int], logs: list[IO[bytes]]) -> int:
    """Say what the first process has not said itself; the exit code of the run."""
    if failed.get(0, 0) > 0 and failed[0] != PARTNER_ENDED:
        return failed[0]
    causes = [rank for rank, code in failed.items() if code != PARTNER_ENDED]
    if not causes and 0 in failed:  # it has said so; the others know no more
        return 1
    rank = causes[0] if causes else next(iter(failed))
    code = failed[rank]
    if code < 0:
        sys.stderr.write(f"Process {rank} was killed by {signal.Signals(-code).name}.\n")
        return 1
    told = logs[rank - 1]
    told.seek(0)
    words = told.read().decode(errors="replace")[-2000:]
    sys.stderr.write(f"Process {rank} failed:\n{words}" if words else f"Process {rank} failed without a message.\n")
    return 1 if code == PARTNER_ENDED else code


def _end(running: list[subprocess.Popen[bytes]], *, terminate: bool) -> None:
    """Let every process end, asked politely first."""
    for process in running:
        if terminate and process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            if not terminate:
                _end(running, terminate=True)
                return
            process.kill()
            process.wait()
