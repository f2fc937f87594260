"""Several scorers as one reward: Σ weight · value / scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ramctl.errors import ScorerError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Floats, Images, Scorer, Scores


@dataclass(frozen=True)
class Term:
    """One scorer of a reward with its weight and the value it is divided by."""

    scorer: Scorer
    weight: float = 1.0
    scale: float = 1.0


class Reward:
    """A weighted sum of scorers, with each one's own outputs kept beside the sum.

    A picture that any scorer fails on is failed. ``strict`` is that of the first scorer that has one.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = list(terms)

    @property
    def names(self) -> list[str]:
        """The scorers' names, in order."""
        return [term.scorer.name for term in self.terms]

    @property
    def versions(self) -> dict[str, str]:
        """Scorer name → version string."""
        return {term.scorer.name: term.scorer.version for term in self.terms}

    def load(self) -> None:
        """Load every scorer, in the calling thread: which GPU is the current one is a matter of threads."""
        for term in self.terms:
            term.scorer.ensure_loaded()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Let every scorer refuse prompts it cannot use, before anything is drawn."""
        for term in self.terms:
            term.scorer.check_prompts(prompts)

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
        """Score N images uint8 [N, H, W, 3] for N prompts; see :class:`Scores`."""
        parts = [term.scorer.score(images, prompts) for term in self.terms]
        value: Floats = np.zeros(len(images), dtype=np.float32)
        details: dict[str, Floats] = {}
        for term, part in zip(self.terms, parts, strict=True):
            value = value + np.float32(term.weight / term.scale) * part.value
            prefix = f"{term.scorer.name}/" if len(self.terms) > 1 else ""
            details.update({prefix + name: column for name, column in part.details.items()})
            if prefix:
                details[f"{prefix}value"] = part.value
        records: list[Mapping[str, object]] = [
            {term.scorer.name: part.records[i] for term, part in zip(self.terms, parts, strict=True)}
            for i in range(len(images))
        ]
        return Scores(
            value=value,
            strict=next((part.strict for part in parts if part.strict is not None), None),
            details=details,
            records=records,
            failed=np.logical_or.reduce([part.failed for part in parts]),
            errors=[next((e for e in column if e), None) for column in zip(*(p.errors for p in parts), strict=True)],
        )
