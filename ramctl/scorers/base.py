"""The one interface of rewards and metrics.

In: images ``uint8 [N, H, W, 3]`` RGB (exactly what is saved as PNG) and one :class:`~ramctl.prompts.Prompt` per image.
Out: :class:`Scores`. An image a scorer cannot handle is marked failed with its reason and a NaN value; it never
becomes a zero and never stops the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ramctl.errors import DataError, MissingDependencyError, RamctlError
from ramctl.prompts import Prompt

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ImageScore:
    """What a scorer says of one image.

    ``value`` is the training reward, ``strict`` 1.0/0.0 where the task has a yes-or-no answer, ``details`` further
    named numbers (logged as means), ``record`` JSON-able facts for people (recognised text, detections).
    """

    value: float
    strict: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Scores of N images.

    value: float32 [N], the training reward, NaN where failed.
    strict: float32 [N] in {0, 1} (NaN where failed), or None when the scorer has no yes-or-no answer.
    details: further float32 [N] arrays by name, NaN where failed.
    records: N JSON-able mappings.
    failed: bool [N]; errors: the reason of each failed image, None for the others.
    """

    value: Floats
    strict: Floats | None
    details: Mapping[str, Floats]
    records: Sequence[Mapping[str, Any]]
    failed: NDArray[np.bool_]
    errors: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.value)

    @classmethod
    def collect(cls, results: Sequence[ImageScore | str]) -> Scores:
        """Scores from one :class:`ImageScore` per image, or the reason (a string) why there is none.

        A result whose ``value`` is not finite counts as failed.
        """
        checked: list[ImageScore | str] = [
            result
            if isinstance(result, str) or math.isfinite(result.value)
            else f"the scorer returned a non-finite value ({result.value})"
            for result in results
        ]
        good = [result for result in checked if isinstance(result, ImageScore)]
        names = list(dict.fromkeys(name for result in good for name in result.details))
        nan = float("nan")

        def column(pick: Any) -> Floats:
            return np.array([nan if isinstance(r, str) else pick(r) for r in checked], dtype=np.float32)

        has_strict = any(result.strict is not None for result in good)
        return cls(
            value=column(lambda r: r.value),
            strict=column(lambda r: nan if r.strict is None else r.strict) if has_strict else None,
            details={name: column(lambda r, name=name: r.details.get(name, nan)) for name in names},
            records=[{} if isinstance(r, str) else r.record for r in checked],
            failed=np.array([isinstance(r, str) for r in checked], dtype=bool),
            errors=[r if isinstance(r, str) else None for r in checked],
        )

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of consecutive batches as one; where some lack a column, it is NaN there."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.collect([])
        names = list(dict.fromkeys(name for part in parts for name in part.details))

        def column(part: Scores, values: Floats | None) -> Floats:
            return np.full(len(part), np.nan, np.float32) if values is None else values

        return cls(
            value=np.concatenate([part.value for part in parts]),
            strict=np.concatenate([column(part, part.strict) for part in parts])
            if any(part.strict is not None for part in parts)
            else None,
            details={n: np.concatenate([column(p, p.details.get(n)) for p in parts]) for n in names},
            records=[record for part in parts for record in part.records],
            failed=np.concatenate([part.failed for part in parts]),
            errors=[error for part in parts for error in part.errors],
        )


@dataclass(frozen=True)
class SelfTest:
    """The outcome of a scorer's check on bundled pictures with known answers."""

    passed: bool
    summary: str


class Scorer(ABC):
    """A reward or a metric.

    Subclasses set ``name`` and ``requires``, define ``version`` and ``score_image`` (or override ``score_batch``), and
    import their heavy packages inside ``load``, which raises
    :class:`~ramctl.errors.MissingDependencyError` with the exact command that gets what is missing.
    """

    name: ClassVar[str]
    #: metadata keys every prompt must carry.
    requires: ClassVar[tuple[str, ...]] = ()
    #: (lowest, highest) value, for axes and tables; infinities where unbounded.
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self) -> None:
        self._loaded = False

    @property
    @abstractmethod
    def version(self) -> str:
        """Names everything the numbers depend on: rule version, engine, weights, thresholds. Stored with results."""

    @abstractmethod
    def self_test(self) -> SelfTest:
        """Score bundled (or drawn) pictures with known answers; never raises for a wrong answer."""

    def missing(self) -> list[str]:
        """What is absent, one line each with the command that gets it; cheap, loads nothing."""
        try:
            _ = self.version
        except MissingDependencyError as error:
            return [str(error)]
        return []

    def load(self) -> None:  # noqa: B027 - optional to override
        """Import packages and read weights; called once before the first batch."""

    def score_image(self, image: Images, prompt: Prompt) -> ImageScore:
        """Score one image ``uint8 [H, W, 3]``; an exception marks this image failed."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score_image nor score_batch")

    def score_batch(self, images: Images, prompts: Sequence[Prompt]) -> list[ImageScore | str]:
        """Score a checked batch; the default takes the images one by one and turns exceptions into reasons."""
        results: list[ImageScore | str] = []
        for image, prompt in zip(images, prompts, strict=True):
            try:
                results.append(self.score_image(image, prompt))
            except (KeyboardInterrupt, MemoryError):
                raise
            except Exception as error:  # one bad image never kills a batch; its reason is kept
                results.append(f"{type(error).__name__}: {error}")
        return results

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts this scorer cannot use, before any image is made.

        Raises:
            DataError: a prompt lacks one of ``requires`` (its number and the key are named).
        """
        for number, prompt in enumerate(prompts, start=1):
            missing = [key for key in self.requires if key not in prompt.metadata]
            if missing:
                raise DataError(
                    f"Prompt {number} ({prompt.text!r}) has no {' and no '.join(repr(key) for key in missing)}, "
                    f"which the scorer {self.name!r} needs in every line of the prompt file."
                )

    def ensure_loaded(self) -> None:
        """Call :meth:`load` once."""
        if not self._loaded:
            self.load()
            self._loaded = True

    def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Score N images.

        Args:
            images: uint8 [N, H, W, 3], RGB.
            prompts: N prompts.

        Raises:
            DataError: images of another shape or dtype (nothing is guessed), or lengths that differ.
        """
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            shape = getattr(images, "shape", None)
            raise DataError(
                f"Scorer {self.name!r} takes images as uint8 [N, H, W, 3] in RGB, got "
                f"{getattr(images, 'dtype', type(images).__name__)} {tuple(shape) if shape is not None else ''}."
            )
        if len(images) != len(prompts):
            raise DataError(f"Scorer {self.name!r} got {len(images)} images and {len(prompts)} prompts.")
        self.ensure_loaded()
        if not len(images):
            return Scores.collect([])
        if not images.size:
            return Scores.collect(["the picture has no pixels"] * len(images))
        results = self.score_batch(images, prompts)
        if len(results) != len(images):
            raise RamctlError(f"Scorer {self.name!r} returned {len(results)} results for {len(images)} images.")
        return Scores.collect(results)
