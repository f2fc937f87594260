"""``evaluation.html``: an evaluation's numbers and the pictures behind them, for people; opens offline.

Shown pictures are inside the page, reduced; each links to its file in the folder.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramctl.charts import number
from ramctl.engine.metrics import paired_interval
from ramctl.errors import DataError
from ramctl.evaluation_folder import SCORES
from ramctl.evaluation_results import Compared, Evaluated, Interval
from ramctl.images import load_image
from ramctl.report import PIXEL_ART_SIDE, data_uri, page_template, signed
from ramctl.scorers.base import Floats
from ramctl.scoring import write_whole

#: Pictures shown from each end of a prompt kind, and pairs from each end of a comparison.
SHOWN = 3
#: Large pictures are reduced to this many pixels a side.
THUMBNAIL_SIDE = 320
_FAILURES, _FACTS, _FACT_LENGTH = 10, 4, 140

_WORDS = {
    "mean": "mean value",
    "strict": "strictly correct",
    "strict_macro": "strictly correct, mean of the kinds",
    "official": "official score",
    "official_macro": "official score, mean of the kinds",
}
_HEADLINES = ("official_macro", "strict", "mean")


def write_page(path: Path, evaluated: Evaluated, compared: Compared | None) -> None:
    """Write the page of an evaluation whose ``scores.json`` lies beside it; with ``compared``, the comparison as well.

    Raises:
        RamctlError: it cannot be written.
        DataError: a picture to be shown cannot be read.
    """
    content = json.loads((evaluated.folder / SCORES).read_text(encoding="utf-8"))
    write_whole(path, render_page(evaluated, compared, content))


def render_page(evaluated: Evaluated, compared: Compared | None, content: Mapping[str, Any]) -> str:
    """The page as text; ``content`` is that of ``scores.json``."""
    failures = evaluated.scored.failures()
    return page_template("evaluation.html.j2").render(
        label=evaluated.label,
        other=None if compared is None else compared.other.label,
        facts=_facts(content),
        notes=evaluated.notes(),
        headlines=list(_headlines(evaluated, compared)),
        scorers=[_Section(name, evaluated, compared).content() for name in evaluated.summaries],
        failures=[(name, file.name, reason) for name, file, reason in failures[:_FAILURES]],
        more_failures=max(0, len(failures) - _FAILURES),
        protocol=list(_rows(content["protocol"])),
        made_with=[(name, made["version"], _options(made)) for name, made in content["scorers"].items()],
        versions=content["versions"],
    )


def _facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    protocol = content["protocol"]
    each = protocol["images_per_prompt"]
    pictures = f"{protocol['prompts'] * each:,}" + (f" ({each} per prompt)" if each > 1 else "")
    facts = [
        ("Prompts", f"{protocol['prompts']:,} of {Path(protocol['prompt_file']).name}"),
        ("Pictures", f"{pictures}, {protocol['resolution']} px"),
        (
            "Sampling",
            f"{protocol['sampling_steps']} {protocol['sampler']} steps, guidance {protocol['guidance_scale']:g}",
        ),
        ("Seed", str(protocol["seed"])),
        ("Weights", f"{protocol['weights']}, {protocol['precision']}"),
        ("Made", f"{datetime.fromisoformat(content['created']):%Y-%m-%d %H:%M} UTC"),
    ]
    return facts + ([("Negative prompt", protocol["negative_prompt"])] if protocol["negative_prompt"] else [])


def _headlines(evaluated: Evaluated, compared: Compared | None) -> Iterator[dict[str, str]]:
    """One scorer: its main numbers. Several: the one number of each that says most."""
    found = evaluated.scorer_intervals()
    theirs = {} if compared is None else compared.other.scorer_intervals()
    single = len(evaluated.summaries) == 1
    for name in evaluated.summaries:
        keys = [key for key in _HEADLINES if f"{name}/{key}" in found]
        for key in keys if single else keys[:1]:
            column = f"{name}/{key}"
            middle, low, high = found[column]
            detail = f"95 % interval {number(low)} to {number(high)}"
            change = None if compared is None else compared.scorer_differences.get(column)
            if change is not None:
                detail = f"{signed(change[0])} · 95 % interval {signed(change[1])} to {signed(change[2])}"
            yield {
                "name": _WORDS[key] if single else f"{name}, {_WORDS[key]}",
                "before": number(theirs[column][0]) if change is not None and column in theirs else "",
                "after": number(middle),
                "detail": detail,
            }


@dataclass(frozen=True)
class _Section:
    """One scorer's part of the page."""

    name: str
    evaluated: Evaluated
    compared: Compared | None

    def content(self) -> dict[str, Any]:
        columns = self._columns(self.evaluated)
        unit = all(np.nanmin(c) >= 0 and np.nanmax(c) <= 1 for c in columns.values())
        return {
            "name": self.name,
            "columns": [_WORDS[key] for key in columns],
            "main": _WORDS[self._main(columns)],
            "rows": list(self._table(columns, bars=unit)),
            "kinds": list(self._kinds()),
            "changes": self._changes(),
        }

    def _columns(self, evaluated: Evaluated) -> dict[str, Floats]:
        """mean, strict, official → [pictures], those there are."""
        prefix = f"{self.name}/"
        found = {key.removeprefix(prefix): c for key, c in evaluated.scorer_columns().items() if key.startswith(prefix)}
        return {key: column for key, column in found.items() if np.isfinite(column).any()}

    @staticmethod
    def _main(columns: Mapping[str, Floats]) -> str:
        return next(key for key in ("official", "strict", "mean") if key in columns)

    def _table(self, columns: Mapping[str, Floats], *, bars: bool) -> Iterator[dict[str, Any]]:
        """A row per prompt kind, then all and the mean of the kinds."""
        evaluated, summary = self.evaluated, self.evaluated.summaries[self.name]
        main = self._main(columns)
        by_tag = {key: evaluated.tag_intervals(column) for key, column in columns.items()}
        whole = evaluated.scorer_intervals()
        theirs = {} if self.compared is None else self._columns(self.compared.other)
        if evaluated.has_kinds:
            for tag, part in summary.by_tag.items():
                cells = [_cell(by_tag[key].get(tag), bar=bars and key == main) for key in columns]
                yield {
                    "kind": _plain(tag).capitalize(),
                    "images": part.images,
                    "failed": part.failed,
                    "cells": cells,
                    "total": False,
                    "change": self._change_of(tag, columns[main], theirs.get(main)),
                }
        for label, suffix in (("All", ""), ("Mean of the kinds", "_macro")):
            if not any(f"{self.name}/{key}{suffix}" in whole for key in columns):
                continue
            found = [whole.get(f"{self.name}/{key}{suffix}") for key in columns]
            change = (
                None if self.compared is None else self.compared.scorer_differences.get(f"{self.name}/{main}{suffix}")
            )
            yield {
                "kind": label,
                "images": "" if suffix else summary.images,
                "failed": "" if suffix else summary.failed,
                "cells": [_cell(each, bar=bars and key == main) for key, each in zip(columns, found, strict=True)],
                "total": True,
                "change": _change(change),
            }

    def _change_of(self, tag: str, ours: Floats, theirs: Floats | None) -> dict[str, str]:
        if self.compared is None or theirs is None:
            return _change(None)
        rows = np.array(self.evaluated.tags) == tag
        pair = self.compared.other.per_prompt(theirs)[rows], self.evaluated.per_prompt(ours)[rows]
        return _change(paired_interval(*pair) if np.isfinite(pair[1] - pair[0]).any() else None)

    def _kinds(self) -> Iterator[dict[str, Any]]:
        """Per prompt kind its worst and best pictures."""
        values = self.evaluated.scored.scores[self.name].value
        tags = np.repeat(self.evaluated.tags, self.evaluated.images_per_prompt)
        for tag in dict.fromkeys(self.evaluated.tags):
            rows = np.flatnonzero((tags == tag) & np.isfinite(values))
            if not len(rows):
                continue
            rising = rows[np.argsort(values[rows], kind="stable")]
            best = self._first(rising[::-1], SHOWN)
            below = [row for row in rising if values[row] < values[best].max() and row not in best]
            worst = self._first(below, SHOWN)
            alike = bool((values[rows] == values[rows[0]]).all())
            yield {
                "kind": _plain(tag).capitalize() if self.evaluated.has_kinds else "",
                "alike": number(float(values[rows[0]])) if alike else "",
                "groups": [
                    ("Worst", [self._card(i) for i in worst]),
                    ("Some" if alike else "Best", [self._card(i) for i in best]),
                ],
            }

    def _first(self, rows: Sequence[int] | NDArray[np.intp], count: int) -> list[int]:
        """The first pictures of these; each of another prompt, where there are prompts enough for both ends."""
        by_prompt: dict[int, int] = {}
        for row in rows:
            by_prompt.setdefault(int(row) // self.evaluated.images_per_prompt, int(row))
        candidates = by_prompt.values() if len(by_prompt) >= 2 * count else rows
        return [int(row) for row in candidates][:count]

    def _changes(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """The pairs that changed most, for the better and for the worse."""
        if self.compared is None or self.name not in self.compared.other.scored.scores:
            return []
        ours, theirs = (e.scored.scores[self.name].value for e in (self.evaluated, self.compared.other))
        change = ours - theirs
        rising = [int(row) for row in np.argsort(change, kind="stable") if np.isfinite(change[row])]
        better = self._first([row for row in rising[::-1] if change[row] > 0], SHOWN)
        worse = self._first([row for row in rising if change[row] < 0], SHOWN)
        groups = (("Gained most", better), ("Lost most", worse))
        return [(title, [self._card(row, pair=True) for row in rows]) for title, rows in groups if rows]

    def _card(self, row: int, *, pair: bool = False) -> dict[str, Any]:
        shown = [self.evaluated]
        if pair and self.compared is not None:
            shown.insert(0, self.compared.other)
        return {
            "prompt": self.evaluated.scored.rows[row].prompt.text,
            "pictures": [self._picture(evaluated, row, with_label=pair) for evaluated in shown],
        }

    def _picture(self, evaluated: Evaluated, row: int, *, with_label: bool) -> dict[str, Any]:
        file = evaluated.scored.rows[row].path
        try:
            image = load_image(file)
        except DataError as error:
            raise DataError(f"The page cannot show a picture: {error}") from None
        scores = evaluated.scored.scores[self.name]
        return {
            "source": data_uri(image, THUMBNAIL_SIDE),
            "link": Path(os.path.relpath(file, self.evaluated.folder)).as_posix(),
            "label": evaluated.label if with_label else file.stem,
            "score": number(float(scores.value[row])),
            "width": image.shape[1],
            "height": image.shape[0],
            "pixels": max(image.shape[:2]) <= PIXEL_ART_SIDE,
            "facts": describe_record(scores.records[row]),
        }


def describe_record(record: Mapping[str, Any]) -> list[str]:
    """A scorer's record of a picture as a few short lines: why it scored as it did."""
    lines: list[str] = []
    for key, value in record.items():
        if value in (None, "", [], {}):
            continue
        if key == "reasons":
            lines.extend(str(reason) for reason in value)
        elif key == "detections":
            lines.append(f"found {_found(value)}")
        elif isinstance(value, float):
            lines.append(f"{_plain(key)}: {number(value)}")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"{_plain(key)}: {text}")
    return [line if len(line) <= _FACT_LENGTH else line[: _FACT_LENGTH - 1] + "…" for line in lines[:_FACTS]]


def _found(detections: Sequence[Mapping[str, Any]]) -> str:
    """``red circle ×2, star``, most confident first."""
    sure = sorted(detections, key=lambda each: -float(each.get("score", 0)))
    names = Counter(" ".join(filter(None, (each.get("color"), each.get("class_name")))) for each in sure)
    return ", ".join(name if count == 1 else f"{name} ×{count}" for name, count in names.items())


def _cell(found: Interval | None, *, bar: bool) -> dict[str, Any]:
    if found is None:
        return {"value": "", "range": "", "bar": None}
    middle, low, high = found
    share = [round(100 * each, 2) for each in (middle, low, high)] if bar else None
    return {"value": number(middle), "range": f"{number(low)} to {number(high)}", "bar": share}


def _change(found: Interval | None) -> dict[str, str]:
    if found is None:
        return {"value": "", "range": "", "css": ""}
    middle, low, high = found
    sure = "good" if low > 0 else "bad" if high < 0 else ""
    return {"value": signed(middle), "range": f"{signed(low)} to {signed(high)}", "css": sure}


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _rows(protocol: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in protocol.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{key} ")
        elif value != "":
            yield prefix + key, str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _options(made: Mapping[str, Any]) -> str:
    parts = [f"{key}={value}" for key, value in made["options"].items()]
    parts += [f"{key} {made[key]:g}" for key in ("weight", "scale") if made[key] != 1]
    return ", ".join(parts)
