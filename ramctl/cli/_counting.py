"""How far counted work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ramctl.cli._output import console, say

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def counting(unit: str = "pictures") -> Iterator[Callable[[str, int, int], None]]:
    """A function (phase, done, total) to call as the work goes on; one bar, or one series of lines, per phase."""
    if not console.is_terminal:
        yield _Lines(unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield show


class _Lines:
    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._told: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        began = self._began.setdefault(phase, now)
        if done < total and now - self._told.get(phase, began) < _SECONDS_BETWEEN_LINES:
            return
        self._told[phase] = now
        say(f"{phase}: {done} of {total} {self._unit}")
