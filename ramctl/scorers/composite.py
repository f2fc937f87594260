"""Several scorers as one reward: Σ weight · (output − offset) / scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ramctl.errors import ConfigError, ScorerError, did_you_mean
from ramctl.prompts import Prompt
from ramctl.scorers.base import Floats, Images, Scorer, Scores

#: What every scorer has: its own idea of a training reward.
VALUE = "value"
#: Its yes-or-no answer, where it has one.
STRICT = "strict"
_GREY = np.full((1, 224, 224, 3), 127, dtype=np.uint8)


class Weighting(Protocol):
    """How one scorer enters a reward: weight · (output − offset) / scale."""

    @property
    def weight(self) -> float:
        """Factor in the sum."""
        ...

    @property
    def scale(self) -> float:
        """What the output is divided by."""
        ...

    @property
    def output(self) -> str:
        """``"value"``, ``"strict"`` or the name of a detail."""
        ...

    @property
    def offset(self) -> float:
        """What is subtracted from the output first."""
        ...


@dataclass(frozen=True)
class Term:
    """One scorer of a reward and how it enters the sum; see :class:`Weighting`."""

    scorer: Scorer
    weight: float = 1.0
    scale: float = 1.0
    output: str = VALUE
    offset: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the scorer's value goes into the sum as it is."""
        return (self.output, self.offset, self.weight, self.scale) == (VALUE, 0, 1, 1)


def outputs(scores: Scores) -> list[str]:
    """What :func:`output_column` can find in these scores."""
    return [VALUE, *([] if scores.strict is None else [STRICT]), *scores.details]


def output_column(scores: Scores, output: str) -> Floats:
    """An output of N scores by its name, float32 [N]; NaN where the scorer did not report it."""
    column = {VALUE: scores.value, STRICT: scores.strict}.get(output, scores.details.get(output))
    return np.full(len(scores), np.nan, dtype=np.float32) if column is None else column


def check_output(scorer: Scorer, output: str, prompt: Prompt) -> None:
    """Refuse the name of an output that the scorer does not report, judging by a grey picture.

    Nothing is said where the scorer cannot score that picture. ``"value"`` costs nothing: every scorer has it.

    Raises:
        ConfigError: names the outputs that it has.
    """
    if output == VALUE:
        return
    scores = scorer.score(_GREY, [prompt])
    offered = outputs(scores)
    if output not in offered and not scores.failed[0]:
        raise ConfigError(
            f"reward.scorers.{scorer.name}.output is {output!r}, which this scorer does not report."
            f"{did_you_mean(output, offered)} Its outputs are {', '.join(offered)}."
        )


def combine(parts: Sequence[tuple[str, Weighting, Scores]]) -> Scores:
    """The weighted sum over (scorer's name, term, scores of the same N pictures), without details and records.

    A picture that a scorer failed on, or for which an output is missing or not finite, is failed. ``strict`` is that of
    the first scorer that has one: of another one only where that failed on all, which leaves nothing to take it for.
    """
    value: Floats = np.zeros(len(parts[0][2]), dtype=np.float32)
    errors: list[str | None] = [None] * len(value)
    for name, term, part in parts:
        column = output_column(part, term.output)
        value = value + np.float32(term.weight / term.scale) * (column - np.float32(term.offset))
        lacking = f"the scorer {name!r} gave no {term.output!r} (outputs: {', '.join(outputs(part))})"
        useless = part.failed | ~np.isfinite(column)
        found = [own or (lacking if bad else None) for own, bad in zip(part.errors, useless, strict=True)]
        errors = [before or now for before, now in zip(errors, found, strict=True)]
    failed = np.array([error is not None for error in errors], dtype=bool)
    strict = next((part.strict for _, _, part in parts if part.strict is not None), None)
    return Scores(
        value=np.where(failed, np.float32(np.nan), value),
        strict=None if strict is None else np.where(failed, np.float32(np.nan), strict),
        details={},
        records=[{} for _ in errors],
        failed=failed,
        errors=errors,
    )


class Reward:
    """A weighted sum of scorers (:func:`combine`), with each one's own outputs kept beside the sum."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = list(terms)
        #: One of the prompts seen, for trying out what a scorer reports.
        self._prompt: Prompt | None = None

    @property
    def names(self) -> list[str]:
        """The scorers' names, in order."""
        return [term.scorer.name for term in self.terms]

    @property
    def versions(self) -> dict[str, str]:
        """Scorer name → version string."""
        return {term.scorer.name: term.scorer.version for term in self.terms}

    def load(self) -> None:
        """Load every scorer, in the calling thread: which GPU is the current one is a matter of threads.

        Raises:
            ConfigError: a scorer does not report the output that is rewarded (seen after :meth:`check_prompts` only).
        """
        for term in self.terms:
            term.scorer.ensure_loaded()
            if self._prompt is not None:
                check_output(term.scorer, term.output, self._prompt)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Let every scorer refuse prompts it cannot use, before anything is drawn."""
        for term in self.terms:
            term.scorer.check_prompts(prompts)
        self._prompt = next(iter(prompts), self._prompt)

    def self_test(self) -> None:
        """Run every scorer on its pictures with known answers.

        Raises:
            ScorerError: one gives a wrong answer; nothing is trained on a broken reward.
        """
        for term in self.terms:
            outcome = term.scorer.self_test()
            if not outcome.passed:
                raise ScorerError(f"Scorer {term.scorer.name!r} fails its self-test: {outcome.summary}")

    def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score N images uint8 [N, H, W, 3] for N prompts; see :class:`Scores`.

        The details are the scorer's own; of several scorers each has its details, its value and its strict answer
        there as ``<scorer>/<name>``. One alone has its ``value`` there where the reward is not that value as it is.
        """
        parts = [term.scorer.score(images, prompts) for term in self.terms]
        several = len(self.terms) > 1
        details: dict[str, Floats] = {}
        for term, part in zip(self.terms, parts, strict=True):
            prefix = f"{term.scorer.name}/" if several else ""
            details.update({prefix + name: column for name, column in part.details.items()})
            if several or not term.is_plain:
                details[prefix + VALUE] = part.value
            if several and part.strict is not None:
                details[prefix + STRICT] = part.strict
        records: list[Mapping[str, object]] = [
            {term.scorer.name: part.records[i] for term, part in zip(self.terms, parts, strict=True)}
            for i in range(len(images))
        ]
        total = combine([(term.scorer.name, term, part) for term, part in zip(self.terms, parts, strict=True)])
        return replace(total, details=details, records=records)
