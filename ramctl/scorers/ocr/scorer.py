"""The OCR scorer: Flow-GRPO's rule over the lines an engine reads, on threads of their own."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np

from ramctl.errors import DataError, MissingDependencyError, ScorerError, UsageError, did_you_mean
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, SelfTest
from ramctl.scorers.ocr.engine import Engine, Reader, is_installed
from ramctl.scorers.ocr.paddle import Model, PaddleEngine
from ramctl.scorers.ocr.rapid import RapidEngine
from ramctl.scorers.ocr.rule import RULE, capped_distance, normalise, readable_target
from ramctl.watched_threads import HangingError, Overdue, WatchedThreads, allow

ENGINES = ("rapidocr", "paddleocr")

_SMALLEST_SIDE = 32
#: Seconds for starting an engine, where ``timeout`` is less: models may lie on a slow disk.
_START_TIMEOUT = 300.0


class OcrScorer(Scorer):
    """Flow-GRPO's OCR reward: ``value`` = 1 - distance / target length in [0, 1]; ``strict`` = value is 1.

    Details: ``distance`` (edits, capped at the target's length) and ``extra_characters`` (how many more
    characters were read than the target has: the rule does not punish them, so a policy may fill pictures
    with writing).
    Record: ``text`` (the lines as read, joined by spaces) and ``target``.

    Args:
        detector_side: pictures whose shorter side is smaller are enlarged to this many pixels before text is
            sought. 192 reads words in 64x64 pictures as well as 320 and takes little more than half the time;
            320 is safer for small type in larger pictures.
        threads: engines working side by side, each on one core; None: one per core at hand, at most 8 (on a GPU: 1).
        engine: "rapidocr" reads with the PP-OCRv6 models in its wheel, on the CPU; "paddleocr" is the paper's
            family (``pip install 'ramctl[paddle]'``).
        timeout: seconds for reading one picture, the time it waits for its turn and the start of an engine not
            counted; 0: no limit. A picture that takes longer is failed, its thread is left behind and another one
            with a new engine takes the next. Reading takes 0.02 to 0.4 s.
        device: where paddleocr runs: "auto" (this process's GPU if paddlepaddle can use it), "cpu", "cuda", "cuda:N".
        detection_model, recognition_model: PaddleOCR's names of other models than the default pair.
        detection_dir, recognition_dir: folders with models in PaddleOCR's layout, instead of its cache.

    Raises:
        UsageError: an option out of its range, or one of paddleocr's without it.
    """

    name = "ocr"

    def __init__(
        self,
        detector_side: int = 320,
        threads: int | None = None,
        engine: Literal["rapidocr", "paddleocr"] = "rapidocr",
        device: str = "auto",
        detection_model: str | None = None,
        recognition_model: str | None = None,
        detection_dir: str | None = None,
        recognition_dir: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        super().__init__()
        if detector_side < _SMALLEST_SIDE:
            raise UsageError(f"Scorer 'ocr': detector_side is {detector_side}, it must be {_SMALLEST_SIDE} or more.")
        if threads is not None and threads < 1:
            raise UsageError(f"Scorer 'ocr': threads is {threads}, it must be 1 or more (leave it out to choose).")
        if not timeout >= 0:
            raise UsageError(f"Scorer 'ocr': timeout is {timeout}, it must be seconds above 0, or 0 for no limit.")
        models = {
            "detection_model": detection_model,
            "recognition_model": recognition_model,
            "detection_dir": detection_dir,
            "recognition_dir": recognition_dir,
        }
        self.detector_side = detector_side
        self.threads = threads
        self.timeout = timeout
        self.engine = _make_engine(engine, detector_side, device, models)
        self._engine_name = engine
        self._seconds = timeout or math.inf
        self._readers = threading.local()
        self._workers: WatchedThreads | None = None

    @property
    def version(self) -> str:
        """Rule, engine, model files with the start of their SHA-256, and the sizes that change what is read.

        Raises:
            MissingDependencyError: the engine or a model is absent.
        """
        return f"{self.name}/{RULE}/{self.engine.version}"

    def missing(self) -> list[str]:
        """What is absent, one line each with the command that gets it; imports nothing."""
        if not is_installed("rapidfuzz"):
            return [
                f"The scorer 'ocr' needs rapidfuzz, not installed here: {self.engine.install}",
                *self.engine.missing(),
            ]
        return self.engine.missing()

    def load(self) -> None:
        """Start the first engine and let it read a word: broken weights show here, not picture by picture.

        Raises:
            MissingDependencyError: a package or model file is absent.
            UsageError: the engine's models or its device do not fit the options.
            ScorerError: the engine does not start.
        """
        missing = self.missing()
        if missing:
            raise MissingDependencyError("\n".join(missing))
        try:
            import rapidfuzz  # noqa: F401

            self.engine.load()
        except ImportError as error:
            raise MissingDependencyError(
                f"The scorer 'ocr' needs a package that does not import ({error}): {self.engine.install}"
            ) from None
        count = self.threads or min(_cores(), self.engine.most_readers())
        workers = WatchedThreads(count, self._seconds, "ocr")
        try:
            read = workers.run([partial(self._read, _warm_up_picture())])[0]
        except Exception as error:
            workers.close()
            raise ScorerError(
                f"The OCR engine does not start ({_reason(error)}): {self.engine.install} --force-reinstall"
            ) from error
        if isinstance(read, Overdue):
            raise ScorerError(f"The OCR engine does not start: {self._too_long(read)}.")
        self._workers = workers

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that name no text to read.

        Raises:
            DataError: a prompt (its number is named) has neither a pair of straight double quotes nor a ``target``,
                or one of nothing but spaces.
        """
        super().check_prompts(prompts)
        for number, prompt in enumerate(prompts, start=1):
            readable_target(prompt, f"Prompt {number} ({prompt.text!r})")

    def score_batch(self, images: Images, prompts: Sequence[Prompt]) -> list[ImageScore | str]:
        """Score pictures side by side on the engines' threads; the results do not depend on their number.

        Raises:
            ScorerError: the engine hangs, in as many pictures in a row as there are threads (3 at least).
        """
        if self._workers is None:
            raise RuntimeError("score_batch was called before load")
        jobs = [partial(self._score_or_reason, *pair) for pair in zip(images, prompts, strict=True)]
        try:
            results = self._workers.run(jobs)
        except HangingError as error:
            raise ScorerError(
                f"The OCR engine {self._engine_name} hangs: pictures not read within {self.timeout:g} s, {error}. "
                f"Start again, with a larger timeout of the scorer 'ocr' if this machine is that slow."
            ) from None
        return [self._too_long(result) if isinstance(result, Overdue) else result for result in results]

    def score_image(self, image: Images, prompt: Prompt) -> ImageScore:
        """Read one picture ``uint8 [H, W, 3]`` and compare it with the prompt's target.

        Raises:
            DataError: the prompt names no target, or one of spaces only; a picture without pixels.
        """
        if not image.size:
            raise DataError("the picture has no pixels")
        target, wanted = readable_target(prompt)
        lines = self._read(image)
        recognised = normalise("".join(lines))
        distance = capped_distance(recognised, wanted)
        return ImageScore(
            value=1.0 - distance / len(wanted),
            strict=float(distance == 0),
            details={
                "distance": float(distance),
                "extra_characters": float(max(0, len(recognised) - len(wanted))),
            },
            record={"text": " ".join(lines), "target": target},
        )

    def self_test(self) -> SelfTest:
        """Read drawn signs: right words score 1, a misspelled one 0.75 as it stands, a blank one 0."""
        from ramctl.tinyworld.grammar import sign_prompt
        from ramctl.tinyworld.renderer import render_sign

        rng = np.random.default_rng(0)
        cases = [(word, word) for word in ("sun", "moon", "kite", "frog")] + [("lamq", "lamp"), ("", "tree")]
        blank = np.full((64, 64, 3), 90, dtype=np.uint8)
        pictures = np.stack([render_sign(shown, rng) if shown else blank for shown, _ in cases])
        scores = self.score(pictures, [sign_prompt(target) for _, target in cases])
        expected = [1.0 if shown == target else 0.75 if shown else 0.0 for shown, target in cases]
        wrong = [
            f"{target!r} drawn as {shown!r} read as {record.get('text')!r}, value {value:.2f} not {right:.2f}"
            for (shown, target), right, value, record in zip(cases, expected, scores.value, scores.records, strict=True)
            if normalise(str(record.get("text"))) != shown or value != right
        ]
        return SelfTest(
            passed=not wrong,
            summary="; ".join(wrong) or f"read {len(cases)} of {len(cases)} drawn signs as they stand",
        )

    def _read(self, image: Images) -> list[str]:
        reader: Reader | None = getattr(self._readers, "reader", None)
        if reader is None:
            allow(max(self._seconds, _START_TIMEOUT))
            reader = self._readers.reader = self.engine.make_reader()
            allow(self._seconds)
        return reader.read(image)

    def _too_long(self, overdue: Overdue) -> str:
        return f"{self._engine_name} did not finish within {overdue.seconds:g} s (timeout)"

    def _score_or_reason(self, image: Images, prompt: Prompt) -> ImageScore | str:
        try:
            return self.score_image(image, prompt)
        except MemoryError:
            raise
        except Exception as error:  # one bad picture never kills a batch; its reason is kept
            return _reason(error)


def _make_engine(name: str, detector_side: int, device: str, models: dict[str, str | None]) -> Engine:
    """The engine of this name, not loaded yet.

    Raises:
        UsageError: no such engine, or options that another one has.
    """
    if name not in ENGINES:
        raise UsageError(
            f"Scorer 'ocr': engine is {name!r}; it must be {' or '.join(ENGINES)}.{did_you_mean(name, ENGINES)}"
        )
    if name == "paddleocr":
        detection, recognition = (
            Model(part, models[f"{part}_model"], models[f"{part}_dir"]) for part in ("detection", "recognition")
        )
        return PaddleEngine(detector_side, device, detection, recognition)
    given = [key for key, value in models.items() if value is not None]
    if given:
        raise UsageError(f"Scorer 'ocr': {given[0]} is for the engine paddleocr: engine = \"paddleocr\".")
    if device not in ("auto", "cpu"):
        raise UsageError(f"Scorer 'ocr': device is {device!r}, but rapidocr reads on the CPU: engine = \"paddleocr\".")
    return RapidEngine(detector_side)


def _reason(error: Exception) -> str:
    """One line for an exception; the engine's own carry whole tracebacks as their text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def _cores() -> int:
    """Cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _warm_up_picture() -> Images:
    """A word on a white ground, so that both models run."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (96, 48), "white")
    ImageDraw.Draw(picture).text((12, 10), "word", fill="black", font=ImageFont.load_default(24))
    return np.asarray(picture, dtype=np.uint8)
