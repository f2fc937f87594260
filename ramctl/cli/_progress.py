"""How a training run looks while it goes: bars on a terminal, one line a step elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ramctl.cli._output import console, say

_PHASES = {
    "sample": "sampling",
    "sweep": "reference and old velocities",
    "train": "training",
    "evaluate": "held-out evaluation",
}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TrainingProgress:
    """An observer of :mod:`ramctl.training`; use as a context manager."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[info]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._steps: TaskID | None = None
        self._phase: TaskID | None = None
        self._began = time.monotonic()
        self._first_step = 0
        #: where the run is, once it has begun.
        self.folder: Path | None = None

    def __enter__(self) -> TrainingProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """A line above the bars."""
        say(text)

    def started(self, step: int, steps: int, folder: Path) -> None:
        """The loop begins."""
        say(f"Training in {folder}: steps {step + 1} to {steps}" if step < steps else f"{folder} is complete")
        self.folder = folder
        self._first_step, self._began = step, time.monotonic()
        self._steps = self._bars.add_task("step", total=steps, completed=step, info="")
        self._phase = self._bars.add_task("", total=1, info="")

    def phase(self, name: str, done: int, total: int) -> None:
        """Move the lower bar."""
        if self._phase is not None:
            self._bars.update(
                self._phase,
                description=_PHASES.get(name, name),
                completed=done,
                total=max(1, total),
                info="pictures",
            )

    def step(self, metrics: dict[str, float], steps: int) -> None:
        """Move the upper bar; without a terminal, print a line."""
        number = int(metrics["step"])
        strict = f"  strict {metrics['reward/strict']:.3f}" if "reward/strict" in metrics else ""
        speed = f"{metrics['images_per_second']:.1f} images/s"
        info = f"reward {metrics['reward/mean']:.3f}{strict}  drift {metrics['drift']:.3g}  {speed}"
        if self._steps is not None:
            self._bars.update(self._steps, completed=number, info=info)
        if not console.is_terminal:
            per_step = (time.monotonic() - self._began) / max(1, number - self._first_step)
            say(f"step {number}/{steps}  {info}  ETA {_clock(per_step * (steps - number))}")

    def evaluated(self, row: dict[str, float]) -> None:
        """One line per held-out evaluation."""
        strict = f", strict {row['eval/strict']:.3f}" if "eval/strict" in row else ""
        say(f"held-out after step {int(row['step'])}: reward {row['eval/mean']:.3f}{strict}")
