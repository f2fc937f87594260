"""Threads for work that may hang: what they begin, give up and leave behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from ramctl import watched_threads
from ramctl.watched_threads import HangingError, Overdue, WatchedThreads


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "ours"}


def soon(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + 5
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def test_threads_are_begun_as_jobs_need_them_and_used_again() -> None:
    threads = WatchedThreads(8, 10, "ours")
    before = our_threads()
    for _ in range(20):
        assert threads.run([lambda: 1]) == [1]
    assert len(our_threads() - before) == 1
    together = threading.Barrier(3, timeout=10)
    threads.run([together.wait] * 3)
    assert len(our_threads() - before) == 3


def test_threads_end_with_their_owner() -> None:
    before = our_threads()
    threads = WatchedThreads(2, 10, "ours")
    threads.run([lambda: None] * 2)
    assert our_threads() - before
    del threads
    gc.collect()
    assert soon(lambda: not our_threads() - before)


def test_an_idle_thread_keeps_no_job_alive() -> None:
    class Picture:
        """Only an object of a class of ours can be watched."""

    threads = WatchedThreads(1, 10, "ours")
    picture = Picture()
    watched = weakref.ref(picture)
    threads.run([partial(id, picture)])
    del picture
    assert soon(lambda: watched() is None)


def test_what_is_given_up_ends_when_it_can_and_says_nothing() -> None:
    before = our_threads()
    threads = WatchedThreads(1, 0.05, "ours")
    released = threading.Event()
    assert threads.run([partial(released.wait, 10), lambda: True]) == [Overdue(0.05), True]
    assert len(our_threads() - before) == 2
    released.set()
    assert soon(lambda: len(our_threads() - before) == 1)
    assert threads.run([lambda: 7]) == [7]


def test_too_many_stuck_threads_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_threads, "_MOST_STUCK", 2)
    threads = WatchedThreads(1, 0.05, "ours")
    released = threading.Event()
    stuck = partial(released.wait, 10)
    threads.run([stuck, lambda: True])
    released.set()  # this one comes back and counts no more
    assert soon(lambda: not any(worker.thread.is_alive() for worker in threads._shared.stuck if worker.thread))
    released.clear()
    threads.run([stuck, lambda: True])
    with pytest.raises(HangingError, match="2 of them still stuck"):
        threads.run([stuck, lambda: True])
    released.set()


def test_the_first_exception_is_raised_and_nothing_more_is_begun() -> None:
    begun: list[int] = []

    def job(number: int) -> None:
        begun.append(number)
        time.sleep(0.02)
        raise ValueError(str(number))

    with pytest.raises(ValueError, match="0"):
        WatchedThreads(1, 10, "ours").run([partial(job, number) for number in range(20)])
    time.sleep(0.1)
    assert len(begun) < 5


def test_a_process_that_was_stopped_gives_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl+Z and fg every reading would be overdue, and all of them in a row."""
    stopped_for = 0.0
    really_wait = watched_threads.wait

    def wait(futures: Any, timeout: float) -> None:
        nonlocal stopped_for
        if not stopped_for:
            time.sleep(0.05)
            stopped_for = 1000.0
        else:
            really_wait(futures, timeout)

    monkeypatch.setattr(watched_threads, "wait", wait)
    monkeypatch.setattr(watched_threads, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + stopped_for))

    def job() -> str:
        time.sleep(0.15)
        return "done"

    assert WatchedThreads(1, 10, "ours").run([job]) == ["done"]
    assert stopped_for


def test_a_job_can_be_begun_and_left() -> None:
    threads = WatchedThreads(1, 10, "ours")
    released = threading.Event()
    first, second, third = (threads.submit(job) for job in (partial(released.wait, 10), lambda: 2, lambda: 3))
    assert second.cancel()
    released.set()
    assert first.result() is True
    assert third.result() == 3


def test_closed_threads_do_not_begin_what_was_cancelled() -> None:
    threads = WatchedThreads(1, 10, "ours")
    released = threading.Event()
    begun: list[int] = []
    first = threads.submit(partial(released.wait, 10))
    later = [threads.submit(partial(begun.append, number)) for number in range(3)]
    for future in later:
        future.cancel()
    threads.close()
    released.set()
    assert first.result() is True
    assert soon(lambda: not any(w.thread and w.thread.is_alive() for w in threads._shared.workers))
    assert begun == []
