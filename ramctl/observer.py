"""Who is told how a run goes: the command line draws progress bars from it, other processes stay silent."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Observer(Protocol):
    """What a training run tells while it goes."""

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress inside a step or an evaluation."""
        ...

    def started(self, step: int, steps: int, folder: Path) -> None:
        """The loop begins after ``step`` finished steps."""
        ...

    def step(self, metrics: dict[str, float], steps: int) -> None:
        """A step is finished."""
        ...

    def evaluated(self, row: dict[str, float]) -> None:
        """A held-out evaluation is finished."""
        ...


class SilentObserver:
    """Tells nobody; used by every process but the main one."""

    def note(self, text: str) -> None:
        """Nothing."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Nothing."""

    def started(self, step: int, steps: int, folder: Path) -> None:
        """Nothing."""

    def step(self, metrics: dict[str, float], steps: int) -> None:
        """Nothing."""

    def evaluated(self, row: dict[str, float]) -> None:
        """Nothing."""
