"""Is the prompt's quoted text written in the picture? Flow-GRPO's OCR reward, read by RapidOCR on the CPU.

The rule (Flow-GRPO, arXiv 2505.05470, r = max(1 - N_e / N_ref, 0), as its code and DiffusionNFT's compute
it): all recognised lines joined without a separator, ASCII spaces removed and lower-cased on both sides; the
distance is 0 when the target occurs in the recognised text, else their Levenshtein distance, at most the
target's length.

The engine differs from the paper's (PaddleOCR with PP-OCRv3/v4): the PP-OCRv6 models inside the ``rapidocr``
wheel, which need no download and read 64x64 pictures.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ramctl.errors import DataError, MissingDependencyError, ScorerError, UsageError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, SelfTest

RULE = "flow-grpo-ocr-1"
INSTALL = "pip install 'rapidocr>=3.10,<4' onnxruntime rapidfuzz"

#: Named, so that another release of the package cannot change the reward unnoticed.
DETECTOR_FILE = "PP-OCRv6_det_small.onnx"
RECOGNISER_FILE = "PP-OCRv6_rec_small.onnx"

#: Least width in pixels (at height 48) to which a line is padded before it is recognised; longer ones stay
#: whole. The engine's own 320 doubles the recogniser's time on short words and reads none of them better, and
#: 96 misreads some (benchmarks/ocr_speed.py).
LINE_WIDTH = 160

#: The detector enlarges the shorter side to ``detector_side``: a strip of 1x500 would become 160,000 wide.
MAX_ASPECT = 10

_SMALLEST_SIDE = 32
_MOST_THREADS = 8


def target_text(prompt: Prompt) -> str:
    """The text to read: ``metadata["target"]``, else what is between the first two straight double quotes.

    Raises:
        DataError: neither is there, or the metadata's target is not a string.
    """
    if "target" in prompt.metadata:
        target = prompt.metadata["target"]
        if not isinstance(target, str):
            raise DataError(f'Prompt {prompt.text!r}: its "target" must be a string, got {target!r}.')
        return target
    parts = prompt.text.split('"')
    if len(parts) < 3:
        raise DataError(
            f"Prompt {prompt.text!r} names no text to read: put it between straight double quotes "
            f'("…") or add the key "target" to its line.'
        )
    return parts[1]


def normalise(text: str) -> str:
    """Text as the rule compares it: without ASCII spaces, in lower case; nothing else is folded."""
    return text.replace(" ", "").lower()


def capped_distance(recognised: str, target: str) -> int:
    """The rule's distance of normalised texts: 0 when the target occurs, else edits, at most its length."""
    from rapidfuzz.distance import Levenshtein

    return 0 if target in recognised else min(Levenshtein.distance(recognised, target), len(target))


def limit_aspect(image: Images) -> Images:
    """The picture, padded with its median colour until the longer side is at most ten times the shorter."""
    height, width = image.shape[:2]
    least = -(-max(height, width) // MAX_ASPECT)
    if min(height, width) >= least:
        return image
    rows, columns = max(height, least), max(width, least)
    padded = np.empty((rows, columns, 3), dtype=np.uint8)
    padded[:] = np.median(image.reshape(-1, 3), axis=0).astype(np.uint8)
    top, left = (rows - height) // 2, (columns - width) // 2
    padded[top : top + height, left : left + width] = image
    return padded


@cache
def _model_files() -> tuple[Path, Path]:
    """The detector's and the recogniser's files inside the installed package.

    Raises:
        MissingDependencyError: the package or a file in it is absent.
    """
    found = importlib.util.find_spec("rapidocr")
    if found is None or found.origin is None:
        raise MissingDependencyError(f"The scorer 'ocr' needs the package rapidocr, which is not installed: {INSTALL}")
    files = tuple(Path(found.origin).parent / "models" / name for name in (DETECTOR_FILE, RECOGNISER_FILE))
    for file in files:
        if not file.is_file():
            raise MissingDependencyError(
                f"The scorer 'ocr' needs {file}, which is not there: {INSTALL} --force-reinstall"
            )
    return files[0], files[1]


@cache
def _fingerprint(file: Path) -> str:
    return f"{file.stem}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"


class _Reader:
    """One OCR engine; not to be shared by threads."""

    def __init__(self, detector_side: int) -> None:
        from rapidocr import RapidOCR

        detector, recogniser = _model_files()
        # Everything is set here: flags given with a call stay with the engine for all later calls.
        self._engine: Any = RapidOCR(
            params={
                "Global.log_level": "critical",
                # The classifier turns short words upside down; generated text stands upright.
                "Global.use_cls": False,
                "Global.text_score": 0.0,
                "Det.model_path": str(detector),
                "Det.limit_side_len": detector_side,
                "Rec.model_path": str(recogniser),
                "Rec.rec_img_shape": [3, 48, LINE_WIDTH],
                # Sessions with several threads each spin against one another; we run one engine per thread.
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, image: Images) -> list[str]:
        """The lines in a picture ``uint8 [H, W, 3]`` RGB, in the detector's order (down, then right)."""
        bgr = np.ascontiguousarray(limit_aspect(image)[:, :, ::-1])
        found = self._engine(bgr)
        # Without a line the engine returns objects of other kinds, some without these fields.
        lines: Sequence[str] = getattr(found, "txts", None) or ()
        confidences: Sequence[float] = getattr(found, "scores", None) or ()
        return [line for line, confidence in zip(lines, confidences, strict=True) if confidence > 0]


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
        threads: engines working side by side, each on one core; None: one per core at hand, at most 8.

    Raises:
        UsageError: an option out of its range.
    """

    name = "ocr"

    def __init__(self, detector_side: int = 320, threads: int | None = None) -> None:
        super().__init__()
        if detector_side < _SMALLEST_SIDE:
            raise UsageError(f"Scorer 'ocr': detector_side is {detector_side}, it must be {_SMALLEST_SIDE} or more.")
        if threads is not None and threads < 1:
            raise UsageError(f"Scorer 'ocr': threads is {threads}, it must be 1 or more (leave it out to choose).")
        self.detector_side = detector_side
        self.threads = threads if threads is not None else min(_cores(), _MOST_THREADS)
        self._readers = threading.local()
        self._workers: ThreadPoolExecutor | None = None

    @property
    def version(self) -> str:
        """Rule, engine, model files with the start of their SHA-256, and the sizes that change what is read.

        Raises:
            MissingDependencyError: the engine is not installed.
        """
        models = "/".join(_fingerprint(file) for file in _model_files())
        engine = f"rapidocr-{importlib.metadata.version('rapidocr')}"
        return f"{self.name}/{RULE}/{engine}/{models}/side-{self.detector_side}/line-{LINE_WIDTH}"

    def load(self) -> None:
        """Start the first engine and let it read a word: broken weights show here, not picture by picture.

        Raises:
            MissingDependencyError: a package or model file is absent.
            ScorerError: the engine does not start.
        """
        try:
            import onnxruntime  # noqa: F401
            import rapidfuzz  # noqa: F401
            import rapidocr  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError(
                f"The scorer 'ocr' needs a package that is missing ({error}): {INSTALL}"
            ) from None
        _model_files()
        self._workers = ThreadPoolExecutor(max_workers=self.threads, thread_name_prefix="ocr")
        try:
            self._workers.submit(self._read, _warm_up_picture()).result()
        except Exception as error:
            self._workers.shutdown()
            self._workers = None
            raise ScorerError(
                f"The OCR engine does not start ({_reason(error)}): {INSTALL} --force-reinstall"
            ) from error

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that name no text to read.

        Raises:
            DataError: a prompt has neither a pair of straight double quotes nor a ``target``.
        """
        super().check_prompts(prompts)
        for prompt in prompts:
            target_text(prompt)

    def score_batch(self, images: Images, prompts: Sequence[Prompt]) -> list[ImageScore | str]:
        """Score pictures side by side on the engines' threads; the results do not depend on their number."""
        if self._workers is None:
            raise RuntimeError("score_batch was called before load")
        jobs: list[Future[ImageScore | str]] = [
            self._workers.submit(self._score_or_reason, image, prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        try:
            return [job.result() for job in jobs]
        finally:
            for job in jobs:  # after an interrupt nothing must go on reading
                job.cancel()

    def score_image(self, image: Images, prompt: Prompt) -> ImageScore:
        """Read one picture ``uint8 [H, W, 3]`` and compare it with the prompt's target.

        Raises:
            DataError: the prompt names no target, or one of spaces only; a picture without pixels.
        """
        if not image.size:
            raise DataError("the picture has no pixels")
        target = target_text(prompt)
        wanted = normalise(target)
        if not wanted:
            raise DataError(f"the target {target!r} holds nothing to read")
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
        reader: _Reader | None = getattr(self._readers, "reader", None)
        if reader is None:
            reader = self._readers.reader = _Reader(self.detector_side)
        return reader.read(image)

    def _score_or_reason(self, image: Images, prompt: Prompt) -> ImageScore | str:
        try:
            return self.score_image(image, prompt)
        except MemoryError:
            raise
        except Exception as error:  # one bad picture never kills a batch; its reason is kept
            return _reason(error)


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
