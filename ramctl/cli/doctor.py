"""``ramctl doctor``: can this machine run it, and what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ramctl.cli._output import console, result, say

if TYPE_CHECKING:
    from ramctl.doctor_check import Check

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}


def register(app: typer.Typer) -> None:
    """Add ``doctor`` to the command line."""
    app.command("doctor")(doctor)


def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Load every scorer's weights, gigabytes in all, and try it.")
    ] = False,
) -> None:
    """Check machine, packages, embedded model, scorers and presets; exit code 1 if something fails."""
    from ramctl.doctor import all_checks, passed, run_checks

    checks = all_checks(deep=deep)
    width = max(len(name) for name, _ in checks)
    found = []
    with console.status("looking…") if console.is_terminal else _Silent():
        for check in run_checks(checks):
            found.append(check)
            _show(check, width)
    for check in found:
        result(f"doctor.{check.name.replace(' ', '.')}", check.status)
    fine = passed(found)
    result("doctor", "ok" if fine else "failed")
    if not fine:
        raise typer.Exit(1)


def _show(check: Check, width: int) -> None:
    mark, colour = _MARKS[check.status]
    say(f"{mark} {check.name:<{width}}  {check.detail}", style=None if check.status == "ok" else colour)
    if check.remedy:
        say(f"  {'':<{width}}  → {check.remedy}")


class _Silent:
    """No spinner where nobody watches."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None
