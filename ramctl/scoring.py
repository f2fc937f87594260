"""Scoring pictures on disk, whoever made them: the library behind ``ramctl score``. Nothing here needs torch.

A picture that cannot be scored keeps its place with its reason; means are over the others, and the number of failures
stands beside them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ramctl.errors import RamctlError, ScorerError, UsageError, did_you_mean
from ramctl.images import ImageRow, read_image_folder
from ramctl.prompts import Prompt
from ramctl.scorers.base import Floats, Scorer, Scores
from ramctl.scorers.folder import score_rows
from ramctl.scorers.registry import available, create

#: phase, pictures done, pictures in all.
Progress = Callable[[str, int, int], None]

#: From this many pictures on, one and the same value for all of them is worth a word.
_SUSPICIOUS_FROM = 8


@dataclass(frozen=True)
class TagSummary:
    """Means over the pictures of one prompt kind: ``images`` of them, ``failed`` left out; NaN where none is left."""

    images: int
    failed: int
    mean: float
    strict: float | None


@dataclass(frozen=True)
class Summary:
    """What one scorer says of a set of pictures: means over those that could be scored.

    ``mean`` and ``std`` are of the value, ``strict`` is the share of right pictures where the scorer has a yes-or-no
    answer, ``details`` are the means of its further numbers.
    """

    images: int
    failed: int
    mean: float
    std: float
    strict: float | None
    details: Mapping[str, float]
    by_tag: Mapping[str, TagSummary]


@dataclass(frozen=True)
class ScoredImages:
    """N pictures with each scorer's :class:`Scores` in the same order, and the scorers' versions."""

    rows: Sequence[ImageRow]
    scores: Mapping[str, Scores]
    versions: Mapping[str, str]

    def summaries(self) -> dict[str, Summary]:
        """Scorer name → summary."""
        prompts = [row.prompt for row in self.rows]
        return {name: summarise(scores, prompts) for name, scores in self.scores.items()}

    def failures(self) -> list[tuple[str, Path, str]]:
        """(scorer, file, reason) of every picture that could not be scored."""
        return [
            (name, row.path, reason)
            for name, scores in self.scores.items()
            for row, reason in zip(self.rows, scores.errors, strict=True)
            if reason is not None
        ]

    def notes(self) -> list[str]:
        """What a reader of the numbers must know: the scorers that gave all pictures one and the same value."""
        notes = []
        for name, scores in self.scores.items():
            good = scores.value[~scores.failed]
            if len(good) >= _SUSPICIOUS_FROM and (good == good[0]).all():
                notes.append(
                    f"{name} gave all {len(good)} pictures the same value, {good[0]:g}: it measures nothing here"
                )
        return notes

    def without_result(self) -> list[str]:
        """The scorers that could score no picture at all."""
        return [name for name, scores in self.scores.items() if scores.failed.all()]


def split_names(texts: Sequence[str]) -> list[str]:
    """``["geneval,ocr", "jpeg-compressibility"]`` as names.

    Raises:
        UsageError: a scorer that does not exist, one given twice, or none at all.
    """
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"No scorer given. The scorers are {', '.join(available())}.")
    for name in names:
        if name not in available():
            raise UsageError(
                f"There is no scorer {name!r}.{did_you_mean(name, available())} "
                f"The scorers are {', '.join(available())}."
            )
        if names.count(name) > 1:
            raise UsageError(f"Scorer {name!r} is given twice; once is enough.")
    return names


def parse_options(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """``["geneval.partial=flow_grpo"]`` as scorer → option → text.

    Raises:
        UsageError: another form.
    """
    options: dict[str, dict[str, str]] = {}
    for text in texts:
        target, equals, value = text.partition("=")
        scorer, dot, key = target.partition(".")
        if not (equals and dot and scorer and key):
            raise UsageError(f"Option {text!r} must have the form SCORER.KEY=VALUE, e.g. geneval.partial=flow_grpo.")
        options.setdefault(scorer, {})[key] = value
    return options


def make_scorers(names: Sequence[str], options: Mapping[str, Mapping[str, object]] | None = None) -> list[Scorer]:
    """The scorers, not loaded yet.

    Raises:
        UsageError: a scorer or option that does not exist, a value an option cannot take, options for a scorer that is
            not among ``names``.
    """
    check_used(options or {}, names)
    return [create(name, (options or {}).get(name)) for name in names]


def check_used(options: Mapping[str, object], names: Sequence[str]) -> None:
    """Refuse options of scorers that are not used.

    Raises:
        UsageError: names the scorer and those used.
    """
    for name in options:
        if name not in names:
            raise UsageError(
                f"There are options for the scorer {name!r}, which is not used here."
                f"{did_you_mean(name, names)} Used: {', '.join(names)}."
            )


def run_self_tests(scorers: Sequence[Scorer]) -> dict[str, str]:
    """Each scorer's summary of its self-test.

    Raises:
        ScorerError: one gives a wrong answer; its numbers would be worth nothing.
    """
    summaries = {}
    for scorer in scorers:
        outcome = scorer.self_test()
        if not outcome.passed:
            raise ScorerError(f"Scorer {scorer.name!r} fails its self-test: {outcome.summary}")
        summaries[scorer.name] = outcome.summary
    return summaries


def score_images(
    rows: Sequence[ImageRow],
    scorers: Sequence[Scorer],
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> ScoredImages:
    """Score pictures with each scorer.

    Raises:
        DataError: a prompt lacks what a scorer needs (checked for all before the first picture is read).
    """
    prompts = [row.prompt for row in rows]
    for scorer in scorers:
        scorer.check_prompts(prompts)
    scores = {}
    for scorer in scorers:
        done = 0

        def advance(count: int, name: str = scorer.name) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(name, done, len(rows))

        scores[scorer.name] = score_rows(scorer, rows, batch_size, advance)
    return ScoredImages(rows, scores, {scorer.name: scorer.version for scorer in scorers})


def score_folder(
    folder: str | Path,
    scorers: Sequence[Scorer],
    *,
    self_test: bool = True,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> ScoredImages:
    """Score a folder of pictures, flat or in GenEval's layout (:mod:`ramctl.images`).

    Raises:
        DataError: the folder or its list cannot be used, or a prompt lacks what a scorer needs.
        ScorerError: a scorer fails its self-test.
        MissingDependencyError: a scorer's package or weights are absent.
    """
    rows = read_image_folder(folder)
    prompts = [row.prompt for row in rows]
    for scorer in scorers:
        scorer.check_prompts(prompts)
    if self_test:
        run_self_tests(scorers)
    return score_images(rows, scorers, batch_size=batch_size, progress=progress)


def summarise(scores: Scores, prompts: Sequence[Prompt]) -> Summary:
    """The means of N scores, over all and per prompt kind (in order of first appearance)."""
    tags = np.array([prompt.tag for prompt in prompts])
    good = scores.value[~scores.failed]
    return Summary(
        images=len(scores),
        failed=int(scores.failed.sum()),
        mean=mean(scores.value),
        std=float(good.std(dtype=np.float64)) if len(good) else math.nan,
        strict=None if scores.strict is None else mean(scores.strict),
        details={name: mean(column) for name, column in scores.details.items()},
        by_tag={
            str(tag): TagSummary(
                images=int((tags == tag).sum()),
                failed=int(scores.failed[tags == tag].sum()),
                mean=mean(scores.value[tags == tag]),
                strict=None if scores.strict is None else mean(scores.strict[tags == tag]),
            )
            for tag in dict.fromkeys(tags)
        },
    )


def mean(values: Floats) -> float:
    """Mean of the finite values in float64, NaN when there is none."""
    good = values[np.isfinite(values)]
    return float(good.mean(dtype=np.float64)) if len(good) else math.nan


def result_items(name: str, summary: Summary) -> Iterator[tuple[str, float | int]]:
    """The stable key → value pairs of a summary: ``geneval/mean``, ``/strict``, ``/tag/<tag>``, ``/failed`` …

    ``<name>/tag/<tag>`` is the mean value of that prompt kind, ``<name>/tag_strict/<tag>`` its share of right pictures.
    """
    yield f"{name}/images", summary.images
    yield f"{name}/failed", summary.failed
    yield f"{name}/mean", summary.mean
    yield f"{name}/std", summary.std
    if summary.strict is not None:
        yield f"{name}/strict", summary.strict
    for detail, value in summary.details.items():
        yield f"{name}/{detail}", value
    for tag, part in summary.by_tag.items():
        yield f"{name}/tag/{tag}", part.mean
        if part.strict is not None:
            yield f"{name}/tag_strict/{tag}", part.strict


def tag_table(summaries: Mapping[str, Summary]) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of a table with one row per scorer and prompt kind, and one per scorer over all."""
    rows: list[list[object]] = []
    for name, summary in summaries.items():
        for tag, part in summary.by_tag.items():
            rows.append([name, tag, part.images, part.failed, _cell(part.mean), _cell(part.strict)])
        if list(summary.by_tag) != ["all"]:
            rows.append([name, "all", summary.images, summary.failed, _cell(summary.mean), _cell(summary.strict)])
    return ["scorer", "tag", "images", "failed", "mean", "strict"], rows


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def summary_json(summary: Summary) -> dict[str, Any]:
    """A summary as a JSON object; what could not be computed is null."""
    return {
        "images": summary.images,
        "failed": summary.failed,
        "mean": number(summary.mean),
        "std": number(summary.std),
        "strict": number(summary.strict),
        "details": {name: number(value) for name, value in summary.details.items()},
        "by_tag": {
            tag: {
                "images": part.images,
                "failed": part.failed,
                "mean": number(part.mean),
                "strict": number(part.strict),
            }
            for tag, part in summary.by_tag.items()
        },
    }


def folder_json(scored: ScoredImages) -> str:
    """All summaries with the scorers' versions as one JSON text."""
    report = {
        name: {"version": scored.versions[name], **summary_json(summary)}
        for name, summary in scored.summaries().items()
    }
    return json.dumps({"scorers": report}, indent=2, ensure_ascii=False)


def image_rows(scored: ScoredImages, *, relative_to: Path | None = None) -> list[dict[str, Any]]:
    """One JSON object per picture: ``file``, ``prompt``, ``tag`` and ``scores``.

    ``scores`` holds per scorer ``value``, ``strict``, ``details``, ``record`` and ``error``.
    """
    rows = []
    for i, row in enumerate(scored.rows):
        path = row.path if relative_to is None else row.path.relative_to(relative_to)
        scores = {name: _one(part, i) for name, part in scored.scores.items()}
        rows.append({"file": str(path), "prompt": row.prompt.text, "tag": row.prompt.tag, "scores": scores})
    return rows


def _one(scores: Scores, i: int) -> dict[str, Any]:
    return {
        "value": number(float(scores.value[i])),
        "strict": None if scores.strict is None else number(float(scores.strict[i])),
        "details": {name: number(float(column[i])) for name, column in scores.details.items()},
        "record": dict(scores.records[i]),
        "error": scores.errors[i],
    }


def number(value: float | None) -> float | None:
    """The value for JSON, which has no NaN and no infinity; nine digits tell every float32 from its neighbours."""
    return float(f"{value:.9g}") if value is not None and math.isfinite(value) else None


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, replacing the file whole.

    Raises:
        RamctlError: the file cannot be written.
    """
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in rows))


def check_output(path: Path) -> None:
    """Make the folder of a file to be written, so that a mistake shows before the work.

    Raises:
        RamctlError: the file cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path if path.exists() else path.parent, os.W_OK) and not path.is_dir()
    except OSError:
        writable = False
    if not writable:
        raise RamctlError(f"{path} cannot be written; choose another file with --output.")


def write_whole(path: Path, text: str) -> None:
    """Replace a text file in one step, making its folder.

    Raises:
        RamctlError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RamctlError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):  # what went wrong above is what the user needs to hear
            temporary.unlink()


def _plain(value: object) -> object:
    """NumPy's numbers and arrays in a scorer's record."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a scorer's record holds a {type(value).__name__}, which JSON cannot")
