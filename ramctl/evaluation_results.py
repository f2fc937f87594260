"""What an evaluation found: means with bootstrap intervals, and comparisons on the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramctl.config import RewardTerm
from ramctl.engine.metrics import Column, interval, paired_interval
from ramctl.evaluation_intervals import macro_interval, paired_macro_interval
from ramctl.scorers import composite
from ramctl.scorers.base import Floats, Scores
from ramctl.scoring import ScoredImages, Summary, mean, number, result_items, summary_json

#: (mean, low, high): 95 % bootstrap over prompts.
Interval = tuple[float, float, float]
Intervals = Mapping[str, Interval]


@dataclass(frozen=True)
class Evaluated:
    """One source's results.

    ``scored`` holds all pictures in order, picture i of prompt p in row p·images_per_prompt + i; ``total`` is the
    weighted reward over the scorers, ``summaries`` each scorer's own. ``kept`` pictures had been drawn before,
    ``changed`` ones were not as they had been drawn and were drawn anew, ``kept_scores`` had been computed before.
    Without ``has_total`` the scorers are metrics of their own and their sum means nothing.
    """

    label: str
    folder: Path
    scored: ScoredImages
    total: Scores
    summary: Summary
    summaries: Mapping[str, Summary]
    images_per_prompt: int
    kept: int
    changed: Sequence[str] = ()
    kept_scores: int = 0
    hashes: Mapping[str, str] = field(default_factory=dict)
    has_total: bool = True

    @cached_property
    def tags(self) -> list[str]:
        """The kind of each prompt."""
        return [row.prompt.tag for row in self.scored.rows[:: self.images_per_prompt]]

    def grouped(self, values: Floats) -> Floats:
        """[pictures] as [prompts, images_per_prompt]."""
        return values.reshape(-1, self.images_per_prompt)

    def per_prompt(self, values: Floats) -> Column:
        """The mean of each prompt's pictures, [prompts]; NaN where all failed."""
        groups = self.grouped(values).astype(np.float64)
        finite = np.isfinite(groups)
        sums, counts = np.where(finite, groups, 0).sum(1), finite.sum(1)
        means: Column = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)
        return means

    def columns(self) -> dict[str, Floats]:
        """The headline numbers: ``value``, and ``strict`` and ``official`` where a scorer has them."""
        if not self.has_total:
            return {}
        official = next((s.details["official"] for s in self.scored.scores.values() if "official" in s.details), None)
        found = {"value": self.total.value, "strict": self.total.strict, "official": official}
        return {name: column for name, column in found.items() if column is not None}

    def scorer_columns(self) -> dict[str, Floats]:
        """Each scorer's numbers: ``<scorer>/mean``, ``<scorer>/strict``, ``<scorer>/official``."""
        columns = {}
        for name, scores in self.scored.scores.items():
            found = {"mean": scores.value, "strict": scores.strict, "official": scores.details.get("official")}
            columns.update({f"{name}/{key}": column for key, column in found.items() if column is not None})
        return columns

    def intervals(self) -> dict[str, Interval]:
        """Of the headline columns, and ``strict_macro`` and ``official_macro``; empty ones are left out."""
        return self._intervals(self.columns())

    def scorer_intervals(self) -> dict[str, Interval]:
        """The same of each scorer's columns."""
        return self._intervals(self.scorer_columns())

    def _intervals(self, columns: Mapping[str, Floats]) -> dict[str, Interval]:
        means = {name: self.per_prompt(column) for name, column in columns.items()}
        found = {name: interval(column) for name, column in means.items() if np.isfinite(column).any()}
        for name, column in _shares(columns).items():
            if name in found and self.has_kinds:
                found[f"{name}_macro"] = macro_interval(self.grouped(column), self.tags)
        return found

    @property
    def has_kinds(self) -> bool:
        """Whether the prompts are of several kinds."""
        return len(set(self.tags)) > 1

    def tag_intervals(self, column: Floats) -> dict[str, Interval]:
        """Prompt kind → interval of a column over the prompts of that kind."""
        means, tags = self.per_prompt(column), np.array(self.tags)
        return {
            tag: interval(means[tags == tag])
            for tag in dict.fromkeys(self.tags)
            if np.isfinite(means[tags == tag]).any()
        }

    def notes(self) -> list[str]:
        """What a reader of the numbers must know."""
        notes = []
        if self.changed:
            shown = ", ".join(self.changed[:3]) + (", …" if len(self.changed) > 3 else "")
            notes.append(f"{len(self.changed)} pictures were not as they had been drawn, and were drawn again: {shown}")
        return [*notes, *self.scored.notes()]


@dataclass(frozen=True)
class Compared:
    """Another source on the same prompts and noise.

    ``differences``: headline column → (mean of source − other, low, high), 95 % bootstrap over prompts;
    ``scorer_differences`` those of each scorer's columns.
    """

    other: Evaluated
    differences: Intervals
    scorer_differences: Intervals = field(default_factory=dict)


def compare(source: Evaluated, other: Evaluated) -> Compared:
    """source − other on the same prompts and noise, with paired bootstrap intervals over prompts."""
    return Compared(
        other,
        _differences(source, other, source.columns(), other.columns()),
        _differences(source, other, source.scorer_columns(), other.scorer_columns()),
    )


def _differences(
    source: Evaluated, other: Evaluated, ours: Mapping[str, Floats], theirs: Mapping[str, Floats]
) -> dict[str, Interval]:
    found = {}
    common = {name: column for name, column in ours.items() if name in theirs}
    for name, column in common.items():
        before, after = other.per_prompt(theirs[name]), source.per_prompt(column)
        if np.isfinite(after - before).any():
            found[name] = paired_interval(before, after)
    for name, column in _shares(common).items():
        if name in found and source.has_kinds:
            pair = other.grouped(theirs[name]), source.grouped(column)
            found[f"{name}_macro"] = paired_macro_interval(*pair, source.tags)
    return found


def _shares(columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """The columns of right-or-wrong answers: the ones that benchmarks average over prompt kinds."""
    return {name: column for name, column in columns.items() if name.rpartition("/")[2] in ("strict", "official")}


def combine(scores: Mapping[str, Scores], terms: Mapping[str, RewardTerm]) -> Scores:
    """The training reward of pictures scored one scorer at a time, as :func:`ramctl.scorers.composite.combine`."""
    return composite.combine([(name, terms[name], part) for name, part in scores.items()])


def taken(scores: Scores, rows: NDArray[np.intp]) -> Scores:
    """The scores of these pictures, in this order."""
    return Scores(
        value=scores.value[rows],
        strict=None if scores.strict is None else scores.strict[rows],
        details={name: column[rows] for name, column in scores.details.items()},
        records=[scores.records[i] for i in rows],
        failed=scores.failed[rows],
        errors=[scores.errors[i] for i in rows],
    )


def results_json(evaluated: Evaluated) -> dict[str, Any]:
    """The results as a JSON object: the weighted reward with intervals, and each scorer's own, per prompt kind, too."""
    by_scorer = evaluated.scorer_intervals()
    scorers = {}
    for name, summary in evaluated.summaries.items():
        columns = {
            key.partition("/")[2]: c for key, c in evaluated.scorer_columns().items() if key.startswith(f"{name}/")
        }
        own = {key.partition("/")[2]: i for key, i in by_scorer.items() if key.startswith(f"{name}/")}
        by_tag = {key: intervals_json(evaluated.tag_intervals(column)) for key, column in columns.items()}
        scorers[name] = {**summary_json(summary), "intervals": intervals_json(own), "intervals_by_tag": by_tag}
    total = summary_json(evaluated.summary)
    if not evaluated.has_total:
        total = {key: total[key] for key in ("images", "failed")}
    return {
        **total,
        "intervals": {"level": 0.95, "over": "prompts", **intervals_json(evaluated.intervals())},
        "scorers": scorers,
    }


def intervals_json(intervals: Intervals) -> dict[str, dict[str, float | None]]:
    """Name → ``mean``, ``low``, ``high``."""
    return {
        name: {"mean": number(middle), "low": number(low), "high": number(high)}
        for name, (middle, low, high) in intervals.items()
    }


def result_lines(evaluated: Evaluated, compared: Compared | None) -> Iterator[tuple[str, float | int | str]]:
    """The stable key → value pairs of an evaluation.

    ``value``, ``strict``, ``official`` and, where there are prompt kinds, ``strict_macro`` and ``official_macro`` (the
    mean of the kinds' means, GenEval's own number), each with ``_low`` and ``_high``; each scorer's as
    :func:`ramctl.scoring.result_items` names them, and its macro means; ``compare/…`` for the other source:
    ``compare/strict`` is its own, ``compare/strict_difference`` is source − other. Of several scorers each has its own
    bounds and differences, ``<scorer>/mean_low`` and ``compare/<scorer>/mean_difference``; of one they are the first.
    """
    yield "images", evaluated.summary.images
    yield "failed", evaluated.summary.failed
    for name, (middle, low, high) in evaluated.intervals().items():
        yield name, middle
        yield f"{name}_low", low
        yield f"{name}_high", high
    by_scorer = evaluated.scorer_intervals()
    several = len(evaluated.summaries) > 1
    for scorer, summary in evaluated.summaries.items():
        said = dict(result_items(scorer, summary))
        yield from said.items()
        for key, (middle, low, high) in by_scorer.items():
            if key.startswith(f"{scorer}/"):
                if key not in said:
                    yield key, middle
                if several:
                    yield f"{key}_low", low
                    yield f"{key}_high", high
        for tag, middle in official_by_tag(evaluated, scorer).items():
            yield f"{scorer}/tag_official/{tag}", middle
    if compared is not None:
        yield from _comparison_lines(compared)


def _comparison_lines(compared: Compared) -> Iterator[tuple[str, float | int | str]]:
    yield "compare", compared.other.label
    yield "compare/folder", str(compared.other.folder)
    parts = [(compared.other.intervals(), compared.differences)]
    if len(compared.other.summaries) > 1:
        parts.append((compared.other.scorer_intervals(), compared.scorer_differences))
    for own, differences in parts:
        for name, (middle, _, _) in own.items():
            yield f"compare/{name}", middle
        for name, (middle, low, high) in differences.items():
            yield f"compare/{name}_difference", middle
            yield f"compare/{name}_difference_low", low
            yield f"compare/{name}_difference_high", high


def official_by_tag(evaluated: Evaluated, scorer: str) -> dict[str, float]:
    """Prompt kind → mean of the scorer's official answer; empty where it has none."""
    scores = evaluated.scored.scores[scorer]
    if "official" not in scores.details:
        return {}
    tags = np.repeat(evaluated.tags, evaluated.images_per_prompt)
    return {tag: mean(scores.details["official"][tags == tag]) for tag in dict.fromkeys(evaluated.tags)}


def results_table(evaluated: Evaluated) -> tuple[list[str], list[list[object]]]:
    """Columns and rows: per scorer and prompt kind the means, the last with 95 % intervals; then all, then macro."""
    columns = ["scorer", "tag", "images", "failed", "mean"]
    every = evaluated.scorer_columns()
    shares = [key for key in ("strict", "official") if any(name.endswith(f"/{key}") for name in every)]
    rows: list[list[object]] = []
    by_scorer = evaluated.scorer_intervals()
    for name, summary in evaluated.summaries.items():
        keys = ("mean", *shares)
        by_tag = {k: evaluated.tag_intervals(every[f"{name}/{k}"]) if f"{name}/{k}" in every else {} for k in keys}
        for tag, part in summary.by_tag.items():
            rows.append([name, tag, part.images, part.failed, *(_cell(by_tag[key].get(tag)) for key in keys)])
        if evaluated.has_kinds or "all" not in summary.by_tag:
            cells = [_cell(by_scorer.get(f"{name}/{key}")) for key in keys]
            rows.append([name, "all", summary.images, summary.failed, *cells])
        if any(f"{name}/{key}_macro" in by_scorer for key in shares):
            cells = [_cell(by_scorer.get(f"{name}/{key}_macro")) for key in shares]
            rows.append([name, "macro", "", "", "", *cells])
    return [*columns, *shares], rows


def _cell(found: Interval | None) -> str:
    return "" if found is None else f"{found[0]:.4f} ({found[1]:.3f} to {found[2]:.3f})"


def comparison_table(evaluated: Evaluated, compared: Compared) -> tuple[list[str], list[list[object]]]:
    """Columns and rows: both sources' means per scorer and prompt kind (the strict share where there is one)."""
    rows: list[list[object]] = []
    for name, summary in evaluated.summaries.items():
        other = compared.other.summaries[name]
        for tag, part in summary.by_tag.items():
            mine, theirs = part.strict, other.by_tag[tag].strict
            if mine is None or theirs is None:
                mine, theirs = part.mean, other.by_tag[tag].mean
            rows.append([name, tag, f"{mine:.4f}", f"{theirs:.4f}", f"{mine - theirs:+.4f}"])
    found = compared.differences if len(evaluated.summaries) == 1 else compared.scorer_differences
    for column, (middle, low, high) in found.items():
        rows.append([column, "all", "", "", f"{middle:+.4f} ({low:+.4f} to {high:+.4f})"])
    return ["scorer", "tag", evaluated.label, compared.other.label, "difference"], rows
