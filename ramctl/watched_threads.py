"""Threads for work that may hang: a job that takes too long is given up and its thread left behind.

A thread cannot be ended from outside, and the interpreter waits for an executor's threads when it exits, so that one
stuck in an engine would keep the process alive for ever. These are daemons, and who waits for them can have a clock.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

R = TypeVar("R")

#: Jobs given up in a row after which nothing more is begun, however few threads there are: one may be a bad picture.
_LEAST_IN_A_ROW = 3
#: Threads left behind and still stuck, at most: each keeps an engine (about 100 MB) and maybe a core.
_MOST_STUCK = 16
#: A wait that was longer than asked for by more seconds than this: the process was stopped (Ctrl+Z, a suspended job).
_OVERSLEPT = 1.0
_LONGEST_WAIT = 3600.0
#: Seconds for which the interpreter's exit waits for threads in the middle of a job: native code that comes back
#: while Python is being taken down may abort the process.
_EXIT_GRACE = 2.0

_here = threading.local()


class HangingError(Exception):
    """Job after job is given up; the message says how many."""


@dataclass(frozen=True)
class Overdue:
    """In place of a job's result: it was given up after ``seconds``."""

    seconds: float


@dataclass(eq=False)
class _Worker:
    """A thread, its job at hand and when that is given up (seconds of ``time.monotonic``)."""

    thread: threading.Thread | None = None
    future: Future[Any] | None = None
    seconds: float = math.inf
    deadline: float = math.inf
    left_behind: bool = False

    def allow(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds


@dataclass(eq=False)
class _Shared:
    """What the threads hold on to, so that the object that owns them can be collected.

    ``changed`` guards the rest and the workers. ``idle`` counts the threads that wait for a job, those just started
    included.
    """

    seconds: float
    name: str
    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[tuple[Future[Any], Callable[[], Any]]] = field(default_factory=deque)
    workers: list[_Worker] = field(default_factory=list)
    stuck: list[_Worker] = field(default_factory=list)
    idle: int = 0
    in_a_row: int = 0
    closed: bool = False

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class WatchedThreads:
    """Up to ``count`` threads that run jobs side by side, each for at most ``seconds`` (infinity: no limit).

    Threads are started as jobs need them. The time for which a job waits for its turn does not count. A thread whose
    job is given up ends when the job does, if ever, and another takes its place.

    Args:
        name: of the threads, for whoever looks at a process.
    """

    def __init__(self, count: int, seconds: float, name: str) -> None:
        self._count = count
        self._shared = _Shared(seconds, name)
        # Threads end with their owner; at the interpreter's exit _close_all does more.
        weakref.finalize(self, self._shared.close).atexit = False
        _open.add(self)

    def run(self, jobs: Sequence[Callable[[], R]]) -> list[R | Overdue]:
        """The jobs' results in their order; if jobs raise, the exception of the first of them.

        Raises:
            HangingError: as many jobs in a row were given up as there are threads (3 at least), or 16 threads are
                stuck.
        """
        futures = [self.submit(job) for job in jobs]
        try:
            return [self._result(future) for future in futures]
        finally:
            for future in futures:  # after an interrupt nothing more must be begun
                future.cancel()

    def close(self, grace: float = 0.0) -> None:
        """Let the threads end and wait for them up to ``grace`` seconds; those left behind are not waited for."""
        self._shared.close()
        until = time.monotonic() + grace
        for worker in list(self._shared.workers):
            if worker.thread is not None:
                worker.thread.join(max(0.0, until - time.monotonic()))

    def submit(self, job: Callable[[], R]) -> Future[R]:
        """Begin a job when its turn comes, unless it is cancelled first. Only :meth:`run` gives up what takes long."""
        future: Future[R] = Future()
        with self._shared.changed:
            self._shared.waiting.append((future, job))
            self._staff()
            self._shared.changed.notify()
        return future

    def _staff(self) -> None:
        """Start a thread if a job is waiting that no idle one will take; called with the lock held."""
        shared = self._shared
        if len(shared.waiting) <= shared.idle or len(shared.workers) >= self._count:
            return
        worker = _Worker()
        worker.thread = threading.Thread(target=_serve, args=(shared, worker), name=shared.name, daemon=True)
        worker.thread.start()
        shared.workers.append(worker)
        shared.idle += 1

    def _result(self, future: Future[Any]) -> Any:
        while not future.done():
            patience = self._patience()
            began = time.monotonic()
            wait((future,), patience)
            waited = time.monotonic() - began
            self._give_up_overdue(stopped_for=waited if waited > patience + _OVERSLEPT else 0.0)
        return future.result()

    def _patience(self) -> float:
        """Seconds until a job may be overdue; one that is begun meanwhile has all of its time before it."""
        with self._shared.changed:
            deadline = min((worker.deadline for worker in self._shared.workers), default=math.inf)
        return min(_LONGEST_WAIT, self._shared.seconds, max(0.0, deadline - time.monotonic()))

    def _give_up_overdue(self, stopped_for: float) -> None:
        """Leave the threads behind whose time is over; none was spent working while the process was stopped.

        Raises:
            HangingError: too many were left behind.
        """
        shared = self._shared
        with shared.changed:
            for worker in shared.workers:
                worker.deadline += stopped_for
            now = time.monotonic()
            for worker in [worker for worker in shared.workers if worker.deadline <= now]:
                assert worker.future is not None
                worker.left_behind = True
                shared.workers.remove(worker)
                shared.stuck.append(worker)
                shared.in_a_row += 1
                worker.future.set_result(Overdue(worker.seconds))
                self._staff()
            shared.stuck = [worker for worker in shared.stuck if worker.thread is not None and worker.thread.is_alive()]
            in_a_row, stuck = shared.in_a_row, len(shared.stuck)
        if in_a_row >= max(_LEAST_IN_A_ROW, self._count):
            raise HangingError(f"{in_a_row} in a row")
        if stuck >= _MOST_STUCK:
            raise HangingError(f"{stuck} of them still stuck")


def allow(seconds: float) -> None:
    """Give the job that the calling thread works on ``seconds`` from now; without effect in any other thread."""
    worker: _Worker | None = getattr(_here, "worker", None)
    if worker is not None:
        worker.allow(seconds)


def _serve(shared: _Shared, worker: _Worker) -> None:
    """What a thread does until its owner is gone or its job was given up."""
    _here.worker = worker
    while _serve_one(shared, worker):
        pass


def _serve_one(shared: _Shared, worker: _Worker) -> bool:
    """Wait for a job and do it; False: it was the last. A function, so that an idle thread keeps no picture alive."""
    with shared.changed:
        shared.changed.wait_for(lambda: shared.waiting or shared.closed)
        if not shared.waiting:
            return False
        future, job = shared.waiting.popleft()
        if not future.set_running_or_notify_cancel():
            return True
        shared.idle -= 1
        worker.future = future
        worker.allow(shared.seconds)
    result: Any = None
    error: BaseException | None = None
    try:
        result = job()
    except BaseException as caught:  # an interrupt too belongs to whoever waits for the result
        error = caught
    with shared.changed:
        if worker.left_behind:
            return False
        worker.future, worker.deadline = None, math.inf
        shared.idle += 1
        shared.in_a_row = 0
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
            error = None  # its traceback holds this frame
    return True


_open: weakref.WeakSet[WatchedThreads] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for threads in list(_open):
        threads.close(_EXIT_GRACE)
