"""How good does the picture look? DeQA-Score Mix3 (arXiv 2501.11561): an image quality model that reads no prompt.

A vision-language model of 8 billion parameters (mPLUG-Owl2) is asked how it would rate the picture's quality; the
number is the expectation of 5, 4, 3, 2, 1 under its probabilities of "excellent", "good", "fair", "poor" and "bad".

The model's published code runs in a child process of this scorer (``runner.py``), in an environment of its own
(``environment.py``): it needs transformers 4.36.1. Pictures go there as raw pixels over a pipe. A child that dies or
hangs is started again a bounded number of times; pictures it could not score are failed with the reason.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ramctl.errors import MissingDependencyError, OutOfMemoryError, RamctlError, ScorerError, UsageError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, SelfTest
from ramctl.scorers.deqa import environment
from ramctl.scorers.deqa.process import Child, ChildError
from ramctl.scorers.devices import check_network_options

RULE = "deqa-mix3-1"
ENTRY = "deqa"
RUNNER = Path(__file__).with_name("runner.py")

#: What DeQA's code is known to run with (``environment.py`` installs it).
KNOWN_TRANSFORMERS = "4.36.1"

#: How often a scorer starts its child again in its life; for one batch, once.
MOST_RESTARTS = 5

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_MODEL_CLASS = "AutoModelForCausalLM"


def model_files(folder: Path) -> list[str]:
    """The files of a model folder that its numbers depend on: configuration, code and weights, by name.

    Raises:
        MissingDependencyError: one that the configuration or the weights' index names is not there.
        ScorerError: the configuration cannot be read or names no code.
    """
    config = _json(folder / _CONFIG)
    reference = config.get("auto_map", {}).get(_MODEL_CLASS, "")
    if "." not in reference or "--" in reference:
        raise ScorerError(
            f"{folder / _CONFIG} names no code of its own ({_MODEL_CLASS} in auto_map is {reference!r}), so it is not "
            f"DeQA-Score's: ramctl download-weights {ENTRY} --verify"
        )
    weights = ["model.safetensors"]
    if (folder / _INDEX).is_file():
        weights = [_INDEX, *sorted(set(_json(folder / _INDEX).get("weight_map", {}).values()))]
    needed = [_CONFIG, reference.split(".")[0] + ".py", *weights]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise MissingDependencyError(
            f"{folder} lacks {len(missing)} of the files that DeQA-Score needs ({', '.join(missing[:3])}): "
            f"ramctl download-weights {ENTRY}"
        )
    return sorted({*needed, *(path.name for path in folder.glob("*.py"))})


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScorerError(f"{file} cannot be read ({error}): ramctl download-weights {ENTRY} --verify") from None
    if not isinstance(content, dict):
        raise ScorerError(f"{file} is not an object: ramctl download-weights {ENTRY} --verify")
    return content


class _Refused(Exception):
    """The child answered that it cannot; it still runs."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(str(reply.get("error", "no reason")))
        self.kind = str(reply.get("kind", "error"))
        self.transformers = reply.get("transformers")


class DeqaScorer(Scorer):
    """DeQA-Score: ``value`` = score / 5, in [0.2, 1]; detail ``score`` in [1, 5]. The prompt plays no part.

    Args:
        python: interpreter of DeQA's environment. Empty: ``RAMCTL_DEQA_PYTHON``, else the environment that
            ``python -m ramctl.scorers.deqa.environment`` makes beside the weights.
        device: ``auto`` (this process's GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``. The model takes about
            16 GB there in half precision.
        dtype: precision of the network: ``float16`` (as published), ``bfloat16`` or ``float32``. The version names it.
        batch_size: pictures a time. Where the GPU's memory does not hold them, half as many are tried once.
        start_timeout: seconds for loading the model.
        timeout: seconds for a batch.

    Raises:
        UsageError: an option out of its range.
    """

    name = "deqa"
    value_range = (0.2, 1.0)

    def __init__(
        self,
        python: str = "",
        device: str = "auto",
        dtype: str = "float16",
        batch_size: int = 8,
        start_timeout: float = 900.0,
        timeout: float = 300.0,
    ) -> None:
        super().__init__()
        check_network_options(self.name, dtype, batch_size)
        if not (start_timeout > 0 and timeout > 0):
            raise UsageError(f"Scorer {self.name!r}: start_timeout and timeout must be positive numbers of seconds.")
        self.python = python
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.start_timeout = start_timeout
        self.timeout = timeout
        self._size = batch_size
        self._halved = False
        self._crashes = 0
        self._child: Child | None = None
        self._python = ""
        self._start_request: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        """Rule, configuration, code and weights by their SHA-256, precision.

        Raises:
            MissingDependencyError: the model is not there.
        """
        from ramctl.weights import fingerprint, weight_folder

        try:
            names = model_files(weight_folder(ENTRY))
        except ScorerError as error:  # a damaged configuration: what `load` says with more words
            raise MissingDependencyError(str(error)) from None
        parts = "".join(f"{name}:{fingerprint(ENTRY, name)}\n" for name in names)
        return f"{self.name}/{RULE}/model-{hashlib.sha256(parts.encode()).hexdigest()[:12]}/{self.dtype}"

    def missing(self) -> list[str]:
        """The model and the environment that are absent, each with the command that gets it."""
        lines = super().missing()
        try:
            environment.find_python(self.python)
        except MissingDependencyError as error:
            lines.append(str(error))
        return lines

    def load(self) -> None:
        """Start the child and let it load the model.

        Raises:
            MissingDependencyError: the model or its environment is not there (the command that gets it is named).
            ScorerError: it does not load; with the child's reason.
            OutOfMemoryError: the GPU has no room for it.
            UsageError: no such device.
        """
        from ramctl.scorers.devices import scorer_device
        from ramctl.weights import weight_folder

        folder = weight_folder(ENTRY).absolute()
        model_files(folder)
        self._python = str(environment.find_python(self.python))
        self._start_request = {
            "do": "load",
            "folder": str(folder),
            "device": str(scorer_device(self.device)),
            "dtype": self.dtype,
        }
        try:
            self._start()
        except _Refused as error:
            raise self._explained(error) from None
        except ChildError as error:
            raise ScorerError(f"DeQA does not start with {self._python}: {error}.") from None

    def close(self) -> None:
        """End the child; the next batch starts another. At the end of this process it ends by itself."""
        with self._lock:
            self._end()

    def score_batch(self, images: Images, prompts: Sequence[Prompt]) -> list[ImageScore | str]:
        """Score N pictures.

        Raises:
            OutOfMemoryError: the GPU's memory does not hold half a batch either.
        """
        results: list[ImageScore | str] = []
        with self._lock:
            while len(results) < len(images):
                part = images[len(results) : len(results) + self._size]
                try:
                    results += self._score_part(part)
                except _Refused as error:
                    if error.kind == "out-of-memory":
                        self._halve(len(part))
                    else:
                        results += [f"DeQA: {error}"] * len(part)
        return results

    def self_test(self) -> SelfTest:
        """Score a drawn landscape as it is, under heavy noise and in coarse blocks: it must look best as it is."""
        clean, noisy, blocky = _landscapes()
        scores = self.score(np.stack([clean, noisy, blocky]), [Prompt("a landscape")] * 3)
        if scores.failed.any():
            return SelfTest(passed=False, summary=f"a drawn picture failed: {next(filter(None, scores.errors))}")
        a, b, c = (float(score) for score in scores.details["score"])
        return SelfTest(
            passed=a > b and a > c,
            summary=f"a drawn landscape scores {a:.2f} as it is, {b:.2f} under noise, {c:.2f} in coarse blocks",
        )

    # --- the child; the lock is held, except in `load`

    def _start(self) -> None:
        # Isolated (-I): neither PYTHONPATH nor this package's folder may lend the child a module.
        self._child = Child([self._python, "-I", str(RUNNER)], "DeQA's process")
        try:
            self._ask(self._start_request, timeout=self.start_timeout)
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def _ensure_running(self) -> None:
        if self._child is not None and self._child.alive:
            return
        self._end()
        if self._crashes > MOST_RESTARTS:
            raise ChildError(f"DeQA's process broke {self._crashes} times and is not started again")
        try:
            self._start()
        except _Refused as error:
            raise ChildError(f"DeQA's process was started again and did not load the model: {error}") from None

    def _ask(self, request: Mapping[str, Any], payload: memoryview | bytes = b"", *, timeout: float) -> dict[str, Any]:
        if self._child is None:
            raise RuntimeError("DeQA's process was asked before it was started")
        reply = self._child.ask(request, payload, timeout)
        if reply.get("ok") is not True:
            raise _Refused(reply)
        return reply

    def _score_part(self, images: Images) -> list[ImageScore | str]:
        """Scores of a batch, or the reason for each of its pictures when it breaks the child twice."""
        if not self._python:
            raise RuntimeError("score_batch was called before load")
        request = {"do": "score", "shape": list(images.shape)}
        pixels = np.ascontiguousarray(images).data.cast("B")
        reason = ""
        for _ in range(2):
            try:
                self._ensure_running()
                return _image_scores(self._ask(request, pixels, timeout=self.timeout), len(images))
            except ChildError as error:
                reason = str(error)
                self._crashes += 1
        return [f"DeQA: {reason}"] * len(images)

    def _halve(self, pictures: int) -> None:
        if self._halved or pictures == 1:
            raise OutOfMemoryError(
                f"The GPU's memory does not hold the scorer {self.name!r} at {pictures} images a time: give it a "
                f'smaller batch_size, or with device = "cuda:N" another GPU.'
            )
        self._halved = True
        self._size = pictures // 2

    def _explained(self, error: _Refused) -> RamctlError:
        """Why the model did not load, for people."""
        if error.kind == "missing":
            return MissingDependencyError(
                f"DeQA's environment ({self._python}) lacks a package ({error}). Make it anew: {environment.COMMAND}"
            )
        if error.kind == "out-of-memory":
            return OutOfMemoryError(
                f"{self._start_request['device']} has no room for DeQA's model (about 16 GB in half precision): give "
                f'the scorer {self.name!r} another GPU with device = "cuda:N".'
            )
        hint = ""
        if error.transformers not in (None, KNOWN_TRANSFORMERS):
            hint = (
                f" {self._python} has transformers {error.transformers}; DeQA's code is known to work with "
                f"{KNOWN_TRANSFORMERS}: {environment.COMMAND}"
            )
        return ScorerError(f"DeQA does not load its model: {error}.{hint}")


def _image_scores(reply: Mapping[str, Any], count: int) -> list[ImageScore | str]:
    scores = reply.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        raise ChildError(f"DeQA's process sent {scores!r:.80} in place of {count} scores")
    return [
        "DeQA: the model's answer is not a finite number"
        if score is None
        else ImageScore(value=float(score) / 5, details={"score": float(score)})
        for score in scores
    ]


def _landscapes() -> tuple[Images, Images, Images]:
    """A drawn landscape uint8 [448, 448, 3]: as it is, under heavy noise, in blocks of 28 pixels."""
    from PIL import Image, ImageDraw, ImageFilter

    rows = np.linspace(0, 1, 448)[:, None, None]
    sky = (1 - rows) * np.array([70, 130, 200]) + rows * np.array([225, 235, 245])
    picture = Image.fromarray(np.broadcast_to(sky, (448, 448, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((330, 40, 390, 100), fill=(255, 240, 200))
    pen.polygon([(0, 300), (120, 150), (230, 300)], fill=(96, 108, 128))
    pen.polygon([(150, 300), (300, 110), (448, 300)], fill=(120, 128, 142))
    pen.polygon([(262, 158), (300, 110), (336, 158), (300, 175)], fill=(245, 248, 250))
    pen.rectangle((0, 300, 448, 448), fill=(92, 140, 70))
    for left in (40, 110, 350):
        pen.rectangle((left + 17, 330, left + 27, 370), fill=(90, 62, 40))
        pen.polygon([(left, 340), (left + 22, 240), (left + 44, 340)], fill=(38, 92, 52))
    clean = np.asarray(picture.filter(ImageFilter.SMOOTH), dtype=np.uint8)
    noise = np.random.default_rng(0).normal(0, 70, clean.shape)
    noisy = np.clip(clean + noise, 0, 255).astype(np.uint8)
    blocky = clean[::28, ::28].repeat(28, axis=0).repeat(28, axis=1)
    return clean, noisy, blocky
