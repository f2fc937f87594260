"""What an evaluation found: means with bootstrap intervals, and comparisons on the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ramctl.config import RewardTerm
from ramctl.engine.metrics import Column, interval, paired_interval
from ramctl.scorers.base import Floats, Scores
from ramctl.scoring import ScoredImages, Summary, number, result_items, summary_json


@dataclass(frozen=True)
class Evaluated:
    """One source's results.

    ``scored`` holds all pictures in order, picture i of prompt p in row p·images_per_prompt + i; ``total`` is the
    weighted reward over the scorers, ``summaries`` each scorer's own. ``kept`` pictures had been drawn before.
    """

    label: str
    folder: Path
    scored: ScoredImages
    total: Scores
    summary: Summary
    summaries: Mapping[str, Summary]
    images_per_prompt: int
    kept: int

    def per_prompt(self, values: Floats) -> Column:
        """The mean of each prompt's pictures, [prompts]; NaN where all failed."""
        groups = values.reshape(-1, self.images_per_prompt).astype(np.float64)
        finite = np.isfinite(groups)
        sums, counts = np.where(finite, groups, 0).sum(1), finite.sum(1)
        means: Column = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)
        return means

    def columns(self) -> dict[str, Floats]:
        """What intervals are given for: the ``value`` and, where there is one, the ``strict`` answer."""
        columns = {"value": self.total.value}
        if self.total.strict is not None:
            columns["strict"] = self.total.strict
        return columns

    def intervals(self) -> dict[str, tuple[float, float, float]]:
        """Column → (mean, low, high): 95 % bootstrap over prompts; empty columns are left out."""
        means = {name: self.per_prompt(column) for name, column in self.columns().items()}
        return {name: interval(column) for name, column in means.items() if np.isfinite(column).any()}


@dataclass(frozen=True)
class Compared:
    """``differences``: column → (mean of source − other, low, high), 95 % bootstrap over prompts, same noise."""

    other: Evaluated
    differences: Mapping[str, tuple[float, float, float]]


def compare(source: Evaluated, other: Evaluated) -> Compared:
    """source − other on the same prompts and noise, with paired bootstrap intervals over prompts."""
    theirs = other.columns()
    differences = {}
    for name, column in source.columns().items():
        if name not in theirs:
            continue
        before, after = other.per_prompt(theirs[name]), source.per_prompt(column)
        if np.isfinite(after - before).any():
            differences[name] = paired_interval(before, after)
    return Compared(other, differences)


def combine(scores: Mapping[str, Scores], terms: Mapping[str, RewardTerm]) -> Scores:
    """The training reward of pictures scored one scorer at a time: Σ weight · value / scale, strict of the first.

    A picture that any scorer failed on is failed.
    """
    parts = list(scores.values())
    value: Floats = np.zeros(len(parts[0]), dtype=np.float32)
    for name, part in scores.items():
        value = value + np.float32(terms[name].weight / terms[name].scale) * part.value
    return Scores(
        value=value,
        strict=next((part.strict for part in parts if part.strict is not None), None),
        details={},
        records=[{} for _ in value],
        failed=np.logical_or.reduce([part.failed for part in parts]),
        errors=[next((e for e in each if e), None) for each in zip(*(p.errors for p in parts), strict=True)],
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive shares as one."""
    if len(parts) == 1:
        return parts[0]
    names = list(dict.fromkeys(name for part in parts for name in part.details))

    def column(part: Scores, values: Floats | None) -> Floats:
        return np.full(len(part), np.nan, np.float32) if values is None else values

    return Scores(
        value=np.concatenate([part.value for part in parts]),
        strict=np.concatenate([column(part, part.strict) for part in parts])
        if any(part.strict is not None for part in parts)
        else None,
        details={n: np.concatenate([column(p, p.details.get(n)) for p in parts]) for n in names},
        records=[record for part in parts for record in part.records],
        failed=np.concatenate([part.failed for part in parts]),
        errors=[error for part in parts for error in part.errors],
    )


def results_json(evaluated: Evaluated) -> dict[str, Any]:
    """The results as a JSON object: the weighted reward with intervals, and each scorer's own."""
    intervals = {
        name: {"mean": number(mean), "low": number(low), "high": number(high)}
        for name, (mean, low, high) in evaluated.intervals().items()
    }
    return {
        **summary_json(evaluated.summary),
        "intervals": {"level": 0.95, "over": "prompts", **intervals},
        "scorers": {name: summary_json(summary) for name, summary in evaluated.summaries.items()},
    }


def result_lines(evaluated: Evaluated, compared: Compared | None) -> Iterator[tuple[str, float | int | str]]:
    """The stable key → value pairs of an evaluation.

    ``value`` and ``strict`` with ``_low`` and ``_high``; each scorer's as :func:`ramctl.scoring.result_items` names
    them; ``compare/…`` for the other source: ``compare/strict`` is its own, ``compare/strict_difference`` is source −
    other.
    """
    yield "images", evaluated.summary.images
    yield "failed", evaluated.summary.failed
    for name, (mean, low, high) in evaluated.intervals().items():
        yield name, mean
        yield f"{name}_low", low
        yield f"{name}_high", high
    for scorer, summary in evaluated.summaries.items():
        yield from result_items(scorer, summary)
    if compared is None:
        return
    yield "compare", compared.other.label
    yield "compare/folder", str(compared.other.folder)
    for name, (mean, _, _) in compared.other.intervals().items():
        yield f"compare/{name}", mean
    for name, (mean, low, high) in compared.differences.items():
        yield f"compare/{name}_difference", mean
        yield f"compare/{name}_difference_low", low
        yield f"compare/{name}_difference_high", high


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
    for column, (mean, low, high) in compared.differences.items():
        rows.append([column, "all", "", "", f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"])
    return ["scorer", "tag", evaluated.label, compared.other.label, "difference"], rows
