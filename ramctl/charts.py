"""Line charts as SVG for a page that opens offline: system fonts, colours that follow light and dark mode.

Colours are written as CSS variables (``--s1`` … ``--s8`` for series, ``--ink`` and ``--rule`` for axes),
which the page defines. Nothing of matplotlib's global state is used or changed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, float]
Style = Literal["line", "points"]

#: Series beyond the eighth take the colours from the start again.
COLORS = 8
#: From this many points on, the curve drawn is a running mean, the values themselves a faint line behind it.
SMOOTH_FROM = 40

# Placeholders that survive matplotlib's colour parser and are replaced by CSS variables afterwards.
_INK, _RULE = "#b00001", "#b00002"
_VARIABLES = {_INK: "var(--ink)", _RULE: "var(--rule)"}
_GROUP_ID = re.compile(r' id="(?:figure|axes|patch|text|line2d|LineCollection|matplotlib\.axis|[xy]tick)_\d+"')


@dataclass(frozen=True)
class Series:
    """One curve: ``points`` are (step, value) in ascending steps, ``color`` counts from 0."""

    label: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    style: Style = "line"

    @property
    def css(self) -> str:
        """The CSS variable of this series' colour."""
        return f"--s{self.color % COLORS + 1}"

    def ends(self) -> tuple[float, float]:
        """Means of the first and of the last values: 5 of them, fewer for a short series, one for points."""
        values = [value for _, value in self.points]
        count = 1 if self.style == "points" else max(1, min(5, len(values) // 4))
        return sum(values[:count]) / count, sum(values[-count:]) / count


@dataclass(frozen=True)
class Panel:
    """One chart. ``note`` tells the reader what to look for, ``log`` asks for a logarithmic axis.

    The change of a ``watched`` quantity is given in per cent. A ``wide`` panel takes a row of the page;
    ``width`` and ``height`` are those of the drawing in inches.
    """

    title: str
    series: Sequence[Series]
    note: str = ""
    wide: bool = False
    log: bool = False
    watched: bool = False
    width: float = 3.6
    height: float = 1.75

    def describe(self) -> str:
        """The chart in words, for those who do not see it."""
        parts = []
        for series in self.series:
            first, last = series.ends()
            parts.append(f"{series.label} from {number(first)} to {number(last)}")
        return f"{self.title} by training step: {'; '.join(parts)}."


def number(value: float) -> str:
    """A number for people: three significant digits, a plain decimal where that is readable."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        return f"{value:.2e}"
    decimals = max(0, 2 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}"


def points_of(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """The finite values of ``key`` by step, in order; of a step logged twice (after a resume) the last."""
    found: dict[float, float] = {}
    for index, row in enumerate(rows):
        value = row.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value):
            found[float(row.get("step", index))] = float(value)
    return sorted(found.items())


def spans_decades(points: Sequence[tuple[float, float]]) -> bool:
    """Whether positive values spread so far that only a logarithmic axis shows them."""
    values = [value for _, value in points]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 30


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred running mean over about a twentieth of the points, cut off at both ends."""
    reach = max(2, len(points) // 40)
    result = []
    for index, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, index - reach) : index + reach + 1]]
        result.append((step, sum(window) / len(window)))
    return result


def svg(panel: Panel, mark: tuple[float, str] | None = None) -> str:
    """The panel as an ``<svg>`` element; ``mark`` is a step to point out and its label."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": panel.title,
        # A label with a dollar sign is text, not a formula.
        "text.parse_math": False,
        "font.size": 8.5,
        "font.family": ["DejaVu Sans"],
        "path.simplify_threshold": 0.5,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(panel.width, panel.height), layout="constrained")
        axes = figure.add_subplot()
        for index, series in enumerate(panel.series):
            _draw(axes, series, order=index)
        if mark is not None:
            _point_out(axes, *mark)
        _dress(axes, panel)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _embed(out.getvalue(), panel.describe())


def _draw(axes: Any, series: Series, order: int) -> None:
    color = f"#a0000{series.color % COLORS + 1}"
    steps, values = zip(*series.points, strict=True)
    if series.style == "points":
        axes.plot(steps, values, color=color, linewidth=1.0, linestyle=(0, (3, 2)), zorder=20 + order)
        axes.plot(steps, values, color=color, marker="o", markersize=4.5, linestyle="none", zorder=21 + order)
    elif len(steps) < SMOOTH_FROM:
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=4, zorder=10 + order)
    else:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3, zorder=3 + order)
        steps, values = zip(*smooth(series.points), strict=True)
        axes.plot(steps, values, color=color, linewidth=1.6, zorder=10 + order)


def _point_out(axes: Any, step: float, label: str) -> None:
    axes.axvline(step, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
    axes.annotate(
        label,
        (step, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=_INK,
        annotation_clip=False,
    )


def _dress(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5 if panel.wide else 4))
    axes.xaxis.set_major_locator(MaxNLocator(10 if panel.wide else 5, integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02, y=0.08)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_RULE)
    axes.tick_params(colors=_INK, length=0, which="both")
    axes.set_xlabel("step", color=_INK)


def _embed(document: str, description: str) -> str:
    """Matplotlib's file as an element of a page: no prologue, fixed size, colours or ids of its own."""
    from html import escape

    body = document[document.index("<svg") :]
    # Its style element would apply to the whole page.
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', body)
    head = f'<svg class="chart" role="img" aria-label="{escape(description)}" {box.group(0) if box else ""}>'
    body = head + body[body.index(">") + 1 :]
    body = body.replace("xlink:href", "href")
    body = _GROUP_ID.sub("", body)
    body = re.sub(r"#a0000(\d)", r"var(--s\1)", body)
    for placeholder, variable in _VARIABLES.items():
        body = body.replace(placeholder, variable)
    return re.sub(r"(font(?:-family)?: [^;\"']*)'DejaVu Sans'[^;\"]*", r"\1inherit", body)
