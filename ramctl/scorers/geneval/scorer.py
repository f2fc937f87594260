"""The GenEval scorer: a detector finds objects, the rules judge them against the prompt's metadata."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from ramctl.errors import DataError, UsageError, did_you_mean
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, SelfTest
from ramctl.scorers.geneval.rules import (
    COUNTING_THRESHOLD,
    MAX_PER_CLASS,
    PARTIALS,
    RULES_VERSION,
    SCORE_THRESHOLD,
    Detection,
    Partial,
    Task,
    extra_objects,
    judge,
    parse_task,
)


@dataclass(frozen=True)
class KnownPicture:
    """A picture whose answer is known: ``image`` uint8 [H, W, 3], the prompt it is held against, the strict
    answer."""

    image: Images
    prompt: Prompt
    strict: bool


@runtime_checkable
class Detector(Protocol):
    """What finds the objects. ``version`` names whatever its detections depend on (weights, thresholds,
    precision).

    Heavy imports and weights wait for ``load``; ``detect`` names the colour of every object it reports.
    """

    @property
    def name(self) -> str:
        """The word users choose it by."""

    @property
    def version(self) -> str:
        """Goes into the scorer's version."""

    @property
    def class_names(self) -> Sequence[str]:
        """The classes it can find; prompts asking for others are refused."""

    @property
    def colors(self) -> Sequence[str]:
        """The colour words it can say."""

    def load(self) -> None:
        """Import packages and read weights."""

    def detect(self, images: Images) -> list[list[Detection]]:
        """The objects of each picture; images uint8 [N, H, W, 3] RGB."""

    def examples(self) -> Sequence[KnownPicture]:
        """Pictures with known answers for the self-test, right and wrong ones."""


#: Detectors by name, as "module:class"; imported only when chosen.
_DETECTORS: Mapping[str, str] = {"tinyworld": "ramctl.tinyworld.detector:TinyworldDetector"}


def make_detector(name: str) -> Detector:
    """The detector of this name, not loaded yet.

    Raises:
        UsageError: there is no such detector (the known ones are listed).
    """
    if name not in _DETECTORS:
        raise UsageError(
            f"The geneval scorer has no detector {name!r}; known: {', '.join(_DETECTORS)}."
            f"{did_you_mean(name, _DETECTORS)}"
        )
    module, _, cls = _DETECTORS[name].partition(":")
    detector: Detector = getattr(importlib.import_module(module), cls)()
    return detector


class GenEvalScorer(Scorer):
    """Whether a picture shows the objects, counts, colours and positions its prompt asks for.

    ``value`` is Flow-GRPO's partial reward, ``strict`` its exact-count answer. Details: ``official``
    (GenEval's own answer), ``objects`` (detections above the threshold) and ``extra_objects`` (those nobody
    asked for, which GenEval forgives outside counting: when they rise with the reward, it is being hacked).

    Args:
        detector: a known name ("tinyworld") or an object with the methods of :class:`Detector`.
        partial: "clamped" keeps every term of the reward in [0, 1]; "flow_grpo" computes it exactly as the
            Flow-GRPO reward server does, down to -14 for sixteen objects instead of one.

    Raises:
        UsageError: an unknown detector or partial mode.
    """

    name: ClassVar[str] = "geneval"
    requires: ClassVar[tuple[str, ...]] = ("tag", "include")

    def __init__(self, detector: str | Detector = "tinyworld", partial: Partial = "clamped") -> None:
        super().__init__()
        if partial not in PARTIALS:
            raise UsageError(
                f"The geneval scorer has no partial mode {partial!r}; known: {', '.join(PARTIALS)}."
                f"{did_you_mean(str(partial), PARTIALS)}"
            )
        self.detector = make_detector(detector) if isinstance(detector, str) else detector
        self.partial: Partial = partial
        if partial == "flow_grpo":
            # One object asked for and the cap's sixteen found is the worst case.
            self.value_range = (1.0 - (MAX_PER_CLASS - 1), 1.0)  # type: ignore[misc]  # hangs on an option here

    @property
    def version(self) -> str:
        """Rules, partial mode, thresholds and the detector with its own version."""
        return (
            f"geneval rules={RULES_VERSION} partial={self.partial} "
            f"thresholds={SCORE_THRESHOLD}/{COUNTING_THRESHOLD} cap={MAX_PER_CLASS} nms=off "
            f"detector={self.detector.name}-{self.detector.version}"
        )

    def load(self) -> None:
        """Load the detector."""
        self.detector.load()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts without metadata, or whose metadata this detector cannot judge.

        Raises:
            DataError: names the prompt's number and text, the clause and what is wrong with it.
        """
        super().check_prompts(prompts)
        for number, prompt in enumerate(prompts, start=1):
            self._task(prompt, f"Prompt {number} ({prompt.text!r})")

    def score_batch(self, images: Images, prompts: Sequence[Prompt]) -> list[ImageScore | str]:
        """Detect the objects of the whole batch, then judge picture by picture."""
        return [
            detections if isinstance(detections, str) else self._judge(detections, prompt)
            for detections, prompt in zip(self._detect(images), prompts, strict=True)
        ]

    def self_test(self) -> SelfTest:
        """Judge the detector's own pictures with known answers, right ones and wrong ones."""
        self.ensure_loaded()
        examples = self.detector.examples()
        wrong = []
        for example in examples:
            result = self.score_batch(example.image[None], [example.prompt])[0]
            said = result if isinstance(result, str) else bool(result.strict)
            if said is not example.strict:
                wrong.append(f"{example.prompt.text!r}: expected {example.strict}, got {said}")
        right = len(examples) - len(wrong)
        summary = f"{right} of {len(examples)} known pictures judged right by the detector {self.detector.name!r}"
        return SelfTest(bool(examples) and not wrong, "; ".join([summary, *wrong[:3]]))

    def _task(self, prompt: Prompt, where: str) -> Task:
        return parse_task(prompt.metadata, where, class_names=self.detector.class_names, colors=self.detector.colors)

    def _detect(self, images: Images) -> list[list[Detection] | str]:
        try:
            return list(self.detector.detect(images))
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception:  # which picture it was is found out below
            return [self._detect_alone(image) for image in images]

    def _detect_alone(self, image: Images) -> list[Detection] | str:
        try:
            return self.detector.detect(np.asarray(image)[None])[0]
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:  # one bad image never kills a batch; its reason is kept
            return f"{type(error).__name__}: {error}"

    def _judge(self, detections: Sequence[Detection], prompt: Prompt) -> ImageScore | str:
        try:
            task = self._task(prompt, f"Prompt {prompt.text!r}")
        except DataError as error:
            return str(error)
        verdict = judge(detections, task, partial=self.partial)
        counted = [d for d in detections if d.score > task.threshold]
        return ImageScore(
            value=verdict.partial,
            strict=float(verdict.strict),
            details={
                "official": float(verdict.official),
                "objects": float(len(counted)),
                "extra_objects": float(extra_objects(detections, task)),
            },
            record={
                "detections": [{**asdict(d), "box": list(d.box)} for d in detections],
                "reasons": list(verdict.reasons),
            },
        )
