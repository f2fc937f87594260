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
from collections.abc import Sequence
from typing import IO

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

    The first process owns the terminal. The others' messages are kept aside and shown only if the first one had nothing
    to say itself, so that a mistake of the user's is reported once. When one process fails the rest are ended.
    """
    from ramctl.runfolder import TYPED_ARGUMENTS

    typed = shlex.join(arguments)
    port = _free_port()
    running: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes]] = []
    for rank in range(processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            TYPED_ARGUMENTS: typed,
        }
        command = [sys.executable, "-m", "ramctl", *arguments]
        if rank == 0:
            running.append(subprocess.Popen(command, env=environment))
            continue
        log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed when all processes have ended
        logs.append(log)
        running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        return _wait(running, logs)
    except _Terminated:
        _end(running, terminate=True)
        previous = signal.SIG_IGN  # still the same SIGTERM, for all that this process has left to do
        return 130
    except KeyboardInterrupt:  # a terminal has sent it to the children, too; `kill` has not
        _end(running, terminate=False)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
        for log in logs:
            log.close()


def _wait(running: list[subprocess.Popen[bytes]], logs: list[IO[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in running]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                # It usually fails for the same reason, says it better, and has a report to write.
                running[0].wait(_FIRST_WORD_SECONDS)
            first_spoke = running[0].poll() not in (None, 0)
            _end(running, terminate=True)
            code = running[failed[0]].returncode
            if code < 0:
                sys.stderr.write(f"Process {failed[0]} was killed by {signal.Signals(-code).name}.\n")
            elif not first_spoke:
                told = logs[failed[0] - 1]
                told.seek(0)
                sys.stderr.write(f"Process {failed[0]} failed:\n" + told.read().decode(errors="replace")[-2000:])
            code = running[0].returncode if first_spoke else code
            return code if code > 0 else 1
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_SECONDS)


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
