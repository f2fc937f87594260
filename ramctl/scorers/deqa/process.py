"""A child process that answers requests over its pipes: timeouts, its standard error kept, no pickle.

POSIX only: the waits use ``poll`` on the pipes.
"""

from __future__ import annotations

import collections
import json
import os
import select
import struct
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

#: Lines of standard error kept for messages.
KEPT_LINES = 40

_LONGEST_HEADER = 1 << 20
_CHUNK = 1 << 20
_GRACE_SECONDS = 5.0


class ChildError(Exception):
    """The child died, hung or talks another language; its message says which. It is not usable any more."""


class Child:
    """One running child and the pipes to it.

    Args:
        command: what to run; it must answer each request with one header (see ``runner.py`` for the form).
        environment: of the child; None: this process's.
        name: of the child, for messages.

    Raises:
        ChildError: it cannot be started.
    """

    def __init__(self, command: Sequence[str], name: str, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        try:
            # In a session of its own, so that Ctrl+C reaches it through the closed pipe and not in mid-batch.
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=None if environment is None else dict(environment),
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise ChildError(f"{name} does not start: {error}") from None
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._requests = self._process.stdin.fileno()
        self._replies = self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self._errors: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._listener = threading.Thread(
            target=_keep_lines, args=(os.dup(self._process.stderr.fileno()), self._errors), daemon=True
        )
        self._listener.start()
        # Also at the end of this process, so that no child is left behind.
        self._finalizer = weakref.finalize(self, _stop, self._process)

    @property
    def errors(self) -> list[str]:
        """The last lines of its standard error."""
        return list(self._errors)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def ask(
        self, header: Mapping[str, Any], payload: bytes | memoryview = b"", timeout: float = 60.0
    ) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Args:
            header: JSON-able. payload: bytes sent after it. timeout: seconds for both ways.

        Raises:
            ChildError: it died, did not answer in time, or answered something else; it has been ended.
        """
        deadline = time.monotonic() + timeout
        data = json.dumps(header, allow_nan=False).encode()
        try:
            self._write(struct.pack(">I", len(data)) + data, deadline)
            self._write(payload, deadline)
            (length,) = struct.unpack(">I", self._read(4, deadline))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            reply = json.loads(self._read(length, deadline))
            if not isinstance(reply, dict):
                raise ValueError("a reply that is not an object")
        except TimeoutError:
            self.close(grace=0)
            raise ChildError(f"{self.name} did not answer within {timeout:g} s") from None
        except (EOFError, OSError):
            raise ChildError(self._obituary()) from None
        except ValueError as error:
            self.close(grace=0)
            raise ChildError(f"{self.name} sent something that is not a reply ({error})") from None
        except BaseException:  # an interrupt leaves half a message in a pipe
            self.close(grace=0)
            raise
        return reply

    def close(self, grace: float = _GRACE_SECONDS) -> None:
        """End it: close its input, wait ``grace`` seconds, kill it."""
        if self._finalizer.detach() is not None:
            _stop(self._process, grace)
        self._listener.join(timeout=1)

    def _write(self, data: bytes | memoryview, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait(self._requests, select.POLLOUT, deadline)
            view = view[os.write(self._requests, view[:_CHUNK]) :]

    def _read(self, size: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        while size:
            _wait(self._replies, select.POLLIN, deadline)
            part = os.read(self._replies, min(size, _CHUNK))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _obituary(self) -> str:
        """How it ended, with the last line it wrote."""
        self.close(grace=1)
        code = self._process.returncode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        last = self._errors[-1] if self._errors else "it wrote no message"
        return f"{self.name} {how}: {last}"


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Until a pipe is ready; at its other end's hang-up too, which the following read or write reports."""
    poll = select.poll()
    poll.register(descriptor, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError


def _keep_lines(descriptor: int, lines: collections.deque[str]) -> None:
    """Drain standard error, so that the child never waits for it, and keep its last lines."""
    with os.fdopen(descriptor, "r", encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.strip():
                lines.append(line.strip()[:500])


def _stop(process: subprocess.Popen[bytes], grace: float = _GRACE_SECONDS) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(timeout=grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
