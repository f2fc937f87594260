"""The GenEval scorer: a detector finds objects, the rules judge them against the prompt's metadata."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from ramctl.errors import DataError, OutOfMemoryError, UsageError, did_you_mean
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
    select,
)


@dataclass(frozen=True)
class KnownPicture:
    """A picture whose answer is known: ``image`` uint8 [H, W, 3], the prompt it is held against, the strict
    answer. With ``decides`` false the self-test reports a wrong answer without failing for it."""

    image: Images
    prompt: Prompt
    strict: bool
    decides: bool = True


@runtime_checkable
class Detector(Protocol):
    """What finds the objects. ``version`` names whatever its detections depend on (weights, thresholds,
    precision).

    Heavy imports and weights wait for ``load``; ``detect`` names the colour of every object it reports, unless the
    detector is a :class:`ColorNaming` one.
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


@runtime_checkable
class ColorNaming(Protocol):
    """A detector for which naming a colour is work: it is asked only about the objects whose colour the prompt
    is about."""

    def name_colors(self, objects: Sequence[tuple[Images, Detection]]) -> list[str | None]:
        """The colours of objects of ``detect``, each beside its picture uint8 [H, W, 3]; None: no known colour."""


#: Detectors by name, as "module:class"; imported only when chosen.
_DETECTORS: Mapping[str, str] = {
    "tinyworld": "ramctl.tinyworld.detector:TinyworldDetector",
    "mask2former": "ramctl.scorers.geneval.mask2former:Mask2FormerDetector",
}


def make_detector(name: str, options: Mapping[str, Any] | None = None) -> Detector:
    """The detector of this name, not loaded yet; ``options`` are its constructor's keyword arguments.

    Raises:
        UsageError: there is no such detector (the known ones are listed), or it has no such option.
    """
    if name not in _DETECTORS:
        raise UsageError(
            f"The geneval scorer has no detector {name!r}; known: {', '.join(_DETECTORS)}."
            f"{did_you_mean(name, _DETECTORS)}"
        )
    module, _, class_name = _DETECTORS[name].partition(":")
    cls = getattr(importlib.import_module(module), class_name)
    known = list(inspect.signature(cls).parameters)
    for option in options or {}:
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it takes none"
            raise UsageError(f"The detector {name!r} has no option {option!r}; {has}.")
    detector: Detector = cls(**(options or {}))
    return detector


class GenEvalScorer(Scorer):
    """Whether a picture shows the objects, counts, colours and positions its prompt asks for.

    ``value`` is Flow-GRPO's partial reward, ``strict`` its exact-count answer. Details: ``official``
    (GenEval's own answer), ``objects`` (detections above the threshold) and ``extra_objects`` (those nobody
    asked for, which GenEval forgives outside counting: when they rise with the reward, it is being hacked).

    Args:
        detector: a known name ("tinyworld", "mask2former") or an object with the methods of :class:`Detector`.
        partial: "clamped" keeps every term of the reward in [0, 1]; "flow_grpo" computes it exactly as the
            Flow-GRPO reward server does, down to -14 for sixteen objects instead of one.
        channel_order, device, dtype, batch_size, weights: the detector's own options; None: its default.

    Raises:
        UsageError: an unknown detector or partial mode, or an option the detector does not have.
    """

    name: ClassVar[str] = "geneval"
    requires: ClassVar[tuple[str, ...]] = ("tag", "include")

    def __init__(
        self,
        detector: str | Detector = "tinyworld",
        partial: Partial = "clamped",
        *,
        channel_order: Literal["rgb", "swapped"] | None = None,
        device: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        batch_size: int | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        given = {
            "channel_order": channel_order,
            "device": device,
            "dtype": dtype,
            "batch_size": batch_size,
            "weights": weights,
        }
        options = {key: value for key, value in given.items() if value is not None}
        if partial not in PARTIALS:
            raise UsageError(
                f"The geneval scorer has no partial mode {partial!r}; known: {', '.join(PARTIALS)}."
                f"{did_you_mean(str(partial), PARTIALS)}"
            )
        if isinstance(detector, str):
            self.detector = make_detector(detector, options)
        elif options:
            raise UsageError(f"The geneval scorer got a detector ready made; set its {', '.join(options)} there.")
        else:
            self.detector = detector
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
        """Detect the objects of the whole batch, then judge picture by picture.

        Raises:
            OutOfMemoryError: the GPU's memory does not hold half a batch of the detector either; no picture's fault.
        """
        tasks = [self._task_or_reason(prompt) for prompt in prompts]
        usable = {index: task for index, task in enumerate(tasks) if isinstance(task, Task)}
        results: list[ImageScore | str] = ["" if isinstance(task, Task) else task for task in tasks]
        if usable:
            found = self._detect(images[list(usable)], list(usable.values()))
            for (index, task), detections in zip(usable.items(), found, strict=True):
                results[index] = detections if isinstance(detections, str) else self._judge(detections, task)
        return results

    def self_test(self) -> SelfTest:
        """Judge the detector's own pictures with known answers, right ones and wrong ones."""
        self.ensure_loaded()
        examples = self.detector.examples()
        wrong: list[str] = []
        doubtful: list[str] = []
        for example in examples:
            result = self.score_batch(example.image[None], [example.prompt])[0]
            said = result if isinstance(result, str) else bool(result.strict)
            if said is not example.strict:
                answer = f"{example.prompt.text!r}: expected {example.strict}, got {said}"
                (wrong if example.decides else doubtful).append(answer)
        right = len(examples) - len(wrong) - len(doubtful)
        summary = f"{right} of {len(examples)} known pictures judged right by the detector {self.detector.name!r}"
        notes = [*wrong[:3], *(f"{answer} (not counted)" for answer in doubtful[:3])]
        return SelfTest(bool(examples) and not wrong, "; ".join([summary, *notes]))

    def _task(self, prompt: Prompt, where: str) -> Task:
        return parse_task(prompt.metadata, where, class_names=self.detector.class_names, colors=self.detector.colors)

    def _task_or_reason(self, prompt: Prompt) -> Task | str:
        try:
            return self._task(prompt, f"Prompt {prompt.text!r}")
        except DataError as error:
            return str(error)

    def _detect(self, images: Images, tasks: Sequence[Task]) -> list[list[Detection] | str]:
        try:
            return list(self._look(images, tasks))
        except (KeyboardInterrupt, MemoryError, OutOfMemoryError):
            raise
        except Exception:  # which picture it was is found out below
            return [self._detect_alone(image, task) for image, task in zip(images, tasks, strict=True)]

    def _detect_alone(self, image: Images, task: Task) -> list[Detection] | str:
        try:
            return self._look(np.asarray(image)[None], [task])[0]
        except (KeyboardInterrupt, MemoryError, OutOfMemoryError):
            raise
        except Exception as error:  # one bad image never kills a batch; its reason is kept
            return f"{type(error).__name__}: {error}"

    def _look(self, images: Images, tasks: Sequence[Task]) -> list[list[Detection]]:
        """The objects of each picture, with the colours its task is about."""
        found = self.detector.detect(images)
        if isinstance(self.detector, ColorNaming):
            places = [
                (picture, index) for picture, task in enumerate(tasks) for index in _colors_wanted(found[picture], task)
            ]
            colors = self.detector.name_colors([(images[picture], found[picture][index]) for picture, index in places])
            for (picture, index), color in zip(places, colors, strict=True):
                found[picture][index] = replace(found[picture][index], color=color)
        return found

    def _judge(self, detections: Sequence[Detection], task: Task) -> ImageScore:
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
                "detections": [
                    {"class_name": d.class_name, "score": d.score, "box": list(d.box), "color": d.color}
                    for d in detections
                ],
                "reasons": list(verdict.reasons),
            },
        )


def _colors_wanted(detections: Sequence[Detection], task: Task) -> list[int]:
    """Which detections' colours the rules look at: of a class with a colour clause, as many of the best as it
    asks for."""
    counts: dict[str, int] = {}
    for clause in task.include:
        if clause.color is not None:
            counts[clause.class_name] = max(counts.get(clause.class_name, 0), clause.count)
    ranked = select(detections, task.threshold)
    wanted = {id(d) for name, count in counts.items() for d in ranked.get(name, [])[:count]}
    return [index for index, detection in enumerate(detections) if id(detection) in wanted]
