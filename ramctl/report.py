"""``report.html``: one page that tells what a run did, opens offline and is written anew as the run goes on.

:func:`write_report` is a function from data to a file: it reads no run folder and no configuration.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ramctl.charts import Panel, Row, Series, number, points_of, spans_decades, svg
from ramctl.errors import DataError, RunFolderError

if TYPE_CHECKING:
    import jinja2

Status = Literal["running", "finished", "stopped", "failed"]

#: Pictures up to this many pixels a side are enlarged pixel by pixel.
PIXEL_ART_SIDE = 128
#: Up to LOSSLESS_SIDE a picture is a PNG as it is; beyond, a JPEG of at most MAX_SIDE.
LOSSLESS_SIDE, MAX_SIDE = 256, 512
#: More prompts than this are left out of the page, which says so.
MAX_PROMPTS = 24
#: A change of a watched quantity by more than this share of its start is set off.
NOTABLE_CHANGE = 0.3

# Charts in which the best checkpoint is pointed out.
_MARKED = ("Training and held-out prompts", "Strictly correct pictures")
_STATUS_WORDS = {"running": "running", "finished": "finished", "stopped": "stopped early", "failed": "failed"}


class ConfigRow(NamedTuple):
    """One resolved setting: dotted key, value, and where the value came from (``default``, ``preset``, …)."""

    key: str
    value: object
    source: str


@dataclass(frozen=True)
class Grid:
    """Pictures of the fixed prompts at one step.

    label: "before", "after" or "best"; prompts: N texts; images: uint8 [N, H, W, 3]; scores: N or None.
    """

    label: str
    step: int
    prompts: Sequence[str]
    images: NDArray[np.uint8]
    scores: Sequence[float] | None = None


@dataclass(frozen=True)
class Comparison:
    """A headline number on held-out prompts.

    ``low`` and ``high`` bound the paired difference after − before (bootstrap, 95 %); ``count`` prompts
    were compared.
    """

    name: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything the page shows. What is empty is left out of the page.

    metrics: one row per training step, with ``step`` and names such as ``reward/mean``, ``drift``,
        ``reward_by_tag/position``, ``images/edges``; evaluations: rows with ``step`` and ``eval/…``. What is
        not finite is skipped.
    comparisons: when empty, the first and the last evaluation are compared, without an interval.
    reason: why the run stopped early; seconds: wall-clock time of training; best_step: the best checkpoint's.
    commands: label → the exact command line.
    """

    title: str
    preset: str = ""
    status: Status = "running"
    reason: str = ""
    step: int = 0
    total_steps: int = 0
    started: datetime | None = None
    seconds: float | None = None
    best_step: int | None = None
    metrics: Sequence[Row] = ()
    evaluations: Sequence[Row] = ()
    comparisons: Sequence[Comparison] = ()
    grids: Sequence[Grid] = ()
    config: Sequence[ConfigRow] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the page to ``path``, whole or not at all (a temporary sibling, then a rename).

    Raises:
        DataError: a grid whose prompts, images and scores do not belong together.
        RunFolderError: the folder cannot be written.
    """
    page = render_report(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(page, encoding="utf-8")
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunFolderError(f"The report {path} cannot be written: {error.strerror}.") from None


def render_report(report: Report) -> str:
    """The page as text: HTML with every picture and chart inside, no script and no address to load from.

    Raises:
        DataError: a grid whose prompts, images and scores do not belong together.
    """
    from markupsafe import Markup

    mark = None if report.best_step is None else (float(report.best_step), "best checkpoint")
    charts = [
        (
            heading,
            text,
            [_chart(panel, mark if panel.title in _MARKED else None, Markup) for panel in panels],
        )
        for heading, text, panels in _sections(report)
        if panels
    ]
    return page_template("report.html.j2").render(
        report=report,
        status=_STATUS_WORDS[report.status],
        facts=_facts(report),
        headlines=[_headline(comparison) for comparison in report.comparisons or _from_evaluations(report)],
        charts=charts,
        cards=_cards(report.grids),
        columns=len(report.grids),
        left_out=max(0, len(_prompts(report.grids)) - MAX_PROMPTS),
        config=_config_sections(report.config),
    )


def page_template(name: str) -> jinja2.Template:
    """A page of ``ramctl/templates``: what goes into it is escaped, and a name that it lacks is an error."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    return environment.get_template(name)


def _facts(report: Report) -> list[tuple[str, str]]:
    facts = [("Preset", report.preset)] if report.preset else []
    if report.total_steps:
        facts.append(("Step", f"{report.step:,} of {report.total_steps:,}"))
    if report.best_step is not None:
        facts.append(("Best checkpoint", f"step {report.best_step:,}"))
    if report.started is not None:
        facts.append(("Started", report.started.strftime("%Y-%m-%d %H:%M").strip()))
    if report.seconds is not None:
        facts.append(("Training time", duration(report.seconds)))
    speeds = [value for _, value in points_of(report.metrics, "images_per_second")]
    if speeds:
        facts.append(("Speed", f"{number(float(np.median(speeds)))} images/s"))
    return facts


def duration(seconds: float) -> str:
    """``45 s``, ``6 min 54 s``, ``3 h 12 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


_EVALUATION_NAMES = {
    "eval/strict": "Held-out prompts, strictly correct",
    "eval/official": "Held-out prompts, official score",
    "eval/value": "Held-out reward",
}


def _from_evaluations(report: Report) -> list[Comparison]:
    found = []
    for key, name in _EVALUATION_NAMES.items():
        points = points_of(report.evaluations, key)
        if len(points) > 1:
            found.append(Comparison(name, before=points[0][1], after=points[-1][1]))
    return found


def _headline(comparison: Comparison) -> dict[str, str]:
    detail = [f"{signed(comparison.after - comparison.before)}"]
    if comparison.low is not None and comparison.high is not None:
        detail.append(f"95 % interval {signed(comparison.low)} to {signed(comparison.high)}")
    if comparison.count:
        detail.append(f"{comparison.count:,} prompts")
    return {
        "name": comparison.name,
        "before": number(comparison.before),
        "after": number(comparison.after),
        "detail": " · ".join(detail),
    }


def signed(value: float) -> str:
    """A difference for people: ``+0.123``, ``−1.20``."""
    return ("+" if value >= 0 else "−") + number(abs(value))


def _sections(report: Report) -> list[tuple[str, str, list[Panel]]]:
    rows = report.metrics
    watch = _watch_panels(rows)
    text = (
        "A reward can rise because pictures get better or because the model found a gap in the rule. "
        "Extra objects, lost edges or colours, and runaway drift are the usual signs; the pictures decide."
    )
    return [
        ("Reward", "", _reward_panels(rows, report.evaluations)),
        ("Training", "", _training_panels(rows)),
        ("What the reward does not see", text if watch else "", watch),
    ]


def _series(
    rows: Sequence[Row], *wanted: tuple[str, str, int], style: Literal["line", "points"] = "line"
) -> list[Series]:
    found = [(label, points_of(rows, key), color) for key, label, color in wanted]
    return [Series(label, points, color, style) for label, points, color in found if points]


def _reward_panels(rows: Sequence[Row], evaluations: Sequence[Row]) -> list[Panel]:
    reward = [
        *_series(rows, ("reward/mean", "training reward", 0)),
        *_series(evaluations, ("eval/value", "held-out reward", 0), style="points"),
    ]
    strict = [
        *_series(rows, ("reward/strict", "training, strictly correct", 1)),
        *_series(evaluations, ("eval/strict", "held-out, strictly correct", 1), style="points"),
        *_series(evaluations, ("eval/official", "held-out, official score", 2), style="points"),
    ]
    # Shares of correct pictures belong on the reward's axis only when the reward is a share as well.
    together = all(-0.05 <= value <= 1.05 for series in reward for _, value in series.points)
    panels = (
        [Panel(_MARKED[0], [*reward, *strict], wide=True, width=9.6, height=3.0)]
        if together
        else [
            Panel(_MARKED[0], reward, wide=True, width=9.6, height=3.0),
            Panel(_MARKED[1], strict, wide=True, width=9.6, height=2.3),
        ]
    )
    tags = sorted({key for row in rows for key in row if key.startswith("reward_by_tag/")})
    wanted = [(key, key.partition("/")[2].replace("_", " "), color) for color, key in enumerate(tags)]
    panels.append(Panel("Reward by prompt kind", _series(rows, *wanted), wide=True, width=9.6, height=2.3))
    return [panel for panel in panels if panel.series]


def _training_panels(rows: Sequence[Row]) -> list[Panel]:
    def one(title: str, key: str, note: str, log: bool = False) -> Panel:
        series = _series(rows, (key, title.lower(), 0))
        return Panel(title, series, note, log=log and bool(series) and spans_decades(series[0].points))

    panels = [
        one("Drift", "drift", "Distance from the reference model: it should level off.", log=True),
        one("Loss", "loss", "Distance to a moving target: it need not fall.", log=True),
        one("Gradient norm", "grad_norm", "Before clipping.", log=True),
        one(
            "Groups without signal",
            "advantage/flat_groups",
            "Share of prompts whose pictures all scored alike: they teach nothing.",
        ),
        one("Target norm", "target_norm", "Size of the regression target."),
        Panel(
            "Seconds per step",
            _series(
                rows,
                ("seconds/sample", "sampling", 0),
                ("seconds/score", "waiting for scores", 1),
                ("seconds/train", "training", 2),
            ),
        ),
    ]
    return [panel for panel in panels if panel.series]


_WATCH_NOTES = {
    "score/extra_objects": "Objects nobody asked for, per picture.",
    "images/edges": "Share of pixels on an edge: backgrounds wiped or overfilled.",
    "images/saturation": "Mean colour saturation.",
    "images/entropy": "Bits of colour variety per picture.",
}
_WATCH_TITLES = {
    "images/edges": "Edges",
    "images/saturation": "Saturation",
    "images/entropy": "Colour entropy",
}


def _watch_panels(rows: Sequence[Row]) -> list[Panel]:
    others = sorted({key for row in rows for key in row if key.startswith(("score/", "images/"))})
    keys = [*_WATCH_NOTES, *(key for key in others if key not in _WATCH_NOTES)]
    panels = []
    for key in keys:
        title = _WATCH_TITLES.get(key, key.partition("/")[2].replace("_", " ").capitalize())
        series = _series(rows, (key, title.lower(), 3))
        panels.append(Panel(title, series, _WATCH_NOTES.get(key, ""), watched=True))
    panels = [panel for panel in panels if panel.series]
    # Four go side by side on the page; a narrower drawing keeps their type as large as that of three.
    return [replace(panel, width=2.7) for panel in panels] if len(panels) == 4 else panels


def _chart(panel: Panel, mark: tuple[float, str] | None, markup: Any) -> dict[str, Any]:
    first, last = panel.series[0].ends()
    change = (last - first) / abs(first) if first else 0.0
    percent = f"{'+' if change >= 0 else '−'}{abs(100 * change):.0f} %"
    single = len(panel.series) == 1 and len(panel.series[0].points) > 1
    return {
        "title": panel.title,
        "wide": panel.wide,
        "note": panel.note + (" Logarithmic axis." if panel.log else ""),
        "summary": f"{number(first)} → {number(last)}" if single else "",
        "change": percent if single and panel.watched and first else "",
        "notable": panel.watched and abs(change) > NOTABLE_CHANGE,
        "legend": [
            {"label": s.label, "css": s.css, "style": s.style, "last": number(s.ends()[1])} for s in panel.series
        ]
        if len(panel.series) > 1
        else [],
        # The one place where text goes into the page unescaped: charts escape their labels themselves.
        "svg": markup(svg(panel, mark)),
    }


def _prompts(grids: Sequence[Grid]) -> list[str]:
    return list(dict.fromkeys(prompt for grid in grids for prompt in grid.prompts))


def _cards(grids: Sequence[Grid]) -> list[dict[str, Any]]:
    """One card per prompt: its picture in every grid, side by side."""
    for grid in grids:
        if grid.images.dtype != np.uint8 or grid.images.ndim != 4 or grid.images.shape[3] != 3:
            raise DataError(
                f"Report grid {grid.label!r}: images must be uint8 [N, H, W, 3], "
                f"got {grid.images.dtype} {grid.images.shape}."
            )
        lengths = {
            len(grid.prompts),
            len(grid.images),
            len(grid.images if grid.scores is None else grid.scores),
        }
        if len(lengths) > 1:
            raise DataError(
                f"Report grid {grid.label!r}: {len(grid.prompts)} prompts for {len(grid.images)} images"
                + ("." if grid.scores is None else f" and {len(grid.scores)} scores.")
            )
    return [
        {"prompt": prompt, "pictures": [_picture(grid, prompt) for grid in grids if prompt in grid.prompts]}
        for prompt in _prompts(grids)[:MAX_PROMPTS]
    ]


def _picture(grid: Grid, prompt: str) -> dict[str, Any]:
    index = list(grid.prompts).index(prompt)
    image = grid.images[index]
    score = None if grid.scores is None else float(grid.scores[index])
    return {
        "source": data_uri(image),
        "label": grid.label,
        "step": grid.step,
        "score": number(score) if score is not None and math.isfinite(score) else "",
        "width": image.shape[1],
        "height": image.shape[0],
        "pixels": max(image.shape[:2]) <= PIXEL_ART_SIDE,
        "alt": f"{grid.label} (step {grid.step}): {prompt}",
    }


def data_uri(image: NDArray[np.uint8], max_side: int = MAX_SIDE) -> str:
    """A picture uint8 [H, W, 3] as a data URI: a PNG, for large pictures a JPEG of at most ``max_side``."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    if max(image.shape[:2]) > LOSSLESS_SIDE:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=90)
        kind = "jpeg"
    else:
        picture.save(buffer, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _config_sections(rows: Sequence[ConfigRow]) -> list[tuple[str, list[dict[str, str]]]]:
    sections: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        section, _, key = row.key.rpartition(".")
        value = row.value
        if value is None or isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, (list, tuple)):
            text = ", ".join(str(item) for item in value)
        else:
            text = str(value)
        sections.setdefault(section, []).append({"key": key, "value": text, "source": row.source})
    return list(sections.items())
