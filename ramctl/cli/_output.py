"""Where output goes: ``RESULT key=value`` lines to standard output, the rest to standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral, Real

from rich.console import Console

#: For people: standard error, colours only on a terminal and never with NO_COLOR.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(text: str, style: str | None = None) -> None:
    """One message on standard error. Lines are not broken, so that paths in a log stay whole."""
    console.print(text, style=style, soft_wrap=True)


def write(text: str) -> None:
    """Text that is itself what was asked for (a file's content), on standard output."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def result(key: str, value: object) -> None:
    """``RESULT key=value`` on standard output, for scripts: floats with six significant digits, one line."""
    write(f"RESULT {key}={_text(value)}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard error: drawn on a terminal, plain aligned lines in a file or a pipe."""
    cells = [[_text(cell) for cell in row] for row in rows]
    if console.is_terminal:
        from rich.markup import escape
        from rich.table import Table

        drawn = Table(*columns, title=title, title_justify="left", header_style="bold")
        for row in cells:
            drawn.add_row(*map(escape, row))
        console.print(drawn, markup=True)
        return
    say(title)
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    for row in [list(columns), *cells]:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        say("  " + "  ".join(padded).rstrip())


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{float(value):.6g}"
    return " ".join(str(value).splitlines())
