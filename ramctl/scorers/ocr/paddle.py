"""PaddleOCR 3: the paper's family of engines, as the extra ``ramctl[paddle]``.

The paper read with PaddleOCR 2.9.1 and its English models (en_PP-OCRv3_det, en_PP-OCRv4_rec). PaddleOCR 3 has no
English detector of that generation; the default here is its multilingual twin with the same English recogniser.

Models are only read from folders: the ones given, else what ``ramctl download-weights`` has fetched, else PaddleOCR's
own cache. Nothing is downloaded behind the user's back, and without a network nothing waits for one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import shlex
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ramctl.errors import MissingDependencyError, UsageError
from ramctl.scorers.base import Images
from ramctl.scorers.devices import scorer_device
from ramctl.scorers.ocr.engine import fingerprint, is_installed, to_bgr
from ramctl.weights import Entry, entry_folder, entry_of_repository, local_repository, weight_folder
from ramctl.weights.store import command_for

INSTALL = "pip install 'ramctl[paddle]'"
DETECTION_MODEL = "PP-OCRv3_mobile_det"
RECOGNITION_MODEL = "en_PP-OCRv4_mobile_rec"

_MOST_READERS = 8
_SETTINGS = "inference.yml"
_WEIGHTS = ("inference.pdiparams", "inference.onnx")
_GRAPHS = ("inference.json", "inference.pdmodel")


@dataclass(frozen=True)
class Model:
    """One of the two networks: a folder in PaddleOCR's layout (``inference.yml`` beside Paddle or ONNX weights).

    Args:
        part: "detection" or "recognition", as in the options ``detection_dir`` and ``recognition_dir``.
        asked_name: PaddleOCR's name for the model; None: the folder's own, or the default without a folder.
        asked_folder: where it lies; None: the store's copy, else PaddleOCR's cache.
    """

    part: str
    asked_name: str | None
    asked_folder: str | None

    @property
    def folder(self) -> Path:
        """The folder given, else the store's where it is complete, else the model's place in PaddleOCR's cache."""
        if self.asked_folder is not None:
            return Path(self.asked_folder).expanduser()
        return local_repository(self._repository) or model_cache() / self._name_or_default

    @property
    def weights(self) -> Path | None:
        """The weight file; None while the folder is not complete. Paddle's comes before ONNX."""
        folder = self.folder
        if not (folder / _SETTINGS).is_file():
            return None
        paddle, onnx = (folder / name for name in _WEIGHTS)
        if paddle.is_file() and any((folder / name).is_file() for name in _GRAPHS):
            return paddle
        return onnx if onnx.is_file() else None

    @property
    def is_onnx(self) -> bool:
        """Whether the weights are for ONNX Runtime."""
        return self.weights is not None and self.weights.suffix == ".onnx"

    @cached_property
    def name(self) -> str:
        """PaddleOCR's name for the model, as the folder says it.

        Raises:
            UsageError: the folder holds another model than the one asked for, or names none.
        """
        import yaml

        file = self.folder / _SETTINGS
        try:
            name = yaml.safe_load(file.read_text(encoding="utf-8"))["Global"]["model_name"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            raise UsageError(f"Scorer 'ocr': {file} names no model (Global.model_name) or cannot be read.") from None
        if self.asked_name not in (None, name):
            raise UsageError(
                f"Scorer 'ocr': {self.folder} holds the model {name}, but {self.part}_model is {self.asked_name!r}."
            )
        return str(name)

    @property
    def version(self) -> str:
        """Name and the start of the weights' SHA-256."""
        weights = self.weights
        assert weights is not None
        return f"{self.name}-{fingerprint(weights)}"

    @property
    def missing(self) -> str | None:
        """What is absent and how to get it; None when the folder is complete."""
        if self.weights is not None:
            return None
        if self.asked_folder is not None:
            wanted = f"{_SETTINGS} and {' with '.join((_GRAPHS[0], _WEIGHTS[0]))} or {_WEIGHTS[1]}"
            return f"The scorer 'ocr' finds no model in {self.folder} ({self.part}_dir): it needs {wanted}."
        entry = entry_of_repository(self._repository)
        if entry is not None and (problem := _begun(entry)):
            return f"The scorer 'ocr' needs PaddleOCR's model {self._name_or_default}, but {problem}"
        # A model that the manifest does not know is one that the user chose.
        command = f"hf download {self._repository} --local-dir {shlex.quote(str(self.folder))}"
        return (
            f"The scorer 'ocr' needs PaddleOCR's model {self._name_or_default}, which is not here: "
            f"{command if entry is None else command_for(entry.name)}"
        )

    def verify(self) -> None:
        """Compare the store's copy, where that is the one in use, with the hashes of its download.

        Raises:
            MissingDependencyError: a file is another one.
        """
        entry = entry_of_repository(self._repository)
        if entry is not None and self.folder == entry_folder(entry.name):
            weight_folder(entry.name)

    @property
    def _name_or_default(self) -> str:
        return self.asked_name or (DETECTION_MODEL if self.part == "detection" else RECOGNITION_MODEL)

    @property
    def _repository(self) -> str:
        return f"PaddlePaddle/{self._name_or_default}"


def _begun(entry: Entry) -> str:
    """What is wrong with an entry of the store that is there in part, or damaged; "" when nothing of it is there."""
    if not any(entry_folder(entry.name).glob("[!.]*")):
        return ""
    try:
        weight_folder(entry.name, verify=False)
    except MissingDependencyError as error:
        return str(error)
    return ""


def model_cache() -> Path:
    """Where PaddleOCR keeps the models it fetched."""
    home = os.environ.get("PADDLE_PDX_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".paddlex") / "official_models"


class PaddleReader:
    """One PaddleOCR pipeline; not to be shared by threads (its predictors are not safe in two at once)."""

    def __init__(self, detection: Model, recognition: Model, detector_side: int, device: str) -> None:
        with _quiet():
            from paddleocr import PaddleOCR

            onnx = {
                "engine": "onnxruntime",
                "engine_config": {"intra_op_num_threads": 1, "inter_op_num_threads": 1},
            }
            # oneDNN crashes on the CPU with paddlepaddle 3.3 (PaddlePaddle issue 77340).
            paddle = {"enable_mkldnn": False, "cpu_threads": 1}
            self._engine: Any = PaddleOCR(
                text_detection_model_name=detection.name,
                text_detection_model_dir=str(detection.folder),
                text_recognition_model_name=recognition.name,
                text_recognition_model_dir=str(recognition.folder),
                # Generated text stands upright on a flat picture; these three only turn and bend it.
                use_doc_orientation_classify=False,
                use_doc_unwarping=False,
                use_textline_orientation=False,
                text_det_limit_type="min",
                text_det_limit_side_len=detector_side,
                # PaddleOCR 2.9.1's values, as in the paper: 3.x overrules the model's own settings with its pipeline's.
                text_det_thresh=0.3,
                text_det_box_thresh=0.6,
                text_det_unclip_ratio=1.5,
                text_rec_score_thresh=0.0,
                device=device,
                **(onnx if detection.is_onnx else paddle),
            )

    def read(self, image: Images) -> list[str]:
        """The lines in a picture ``uint8 [H, W, 3]`` RGB, in the detector's order (down, then right)."""
        pages = self._engine.predict(to_bgr(image))
        return [
            line
            for page in pages
            for line, confidence in zip(page["rec_texts"], page["rec_scores"], strict=True)
            if confidence > 0
        ]


class PaddleEngine:
    """PaddleOCR with two models, a detector side in pixels and a device.

    Raises:
        UsageError: one folder holds Paddle weights and the other ONNX.
    """

    install = INSTALL

    def __init__(self, detector_side: int, device: str, detection: Model, recognition: Model) -> None:
        self._detector_side = detector_side
        self._device_option = device
        self._models = (detection, recognition)
        self._device = "cpu"

    @property
    def version(self) -> str:
        """Packages, models with the start of their SHA-256, detector side.

        Raises:
            MissingDependencyError: a package or a model is absent.
        """
        missing = self.missing()
        if missing:
            raise MissingDependencyError("\n".join(missing))
        runtime = _first_version("onnxruntime", "onnxruntime-gpu") if self._onnx else _first_version(*_PADDLE)
        models = "/".join(_named(model) for model in self._models)
        return f"{_first_version('paddleocr')}+{runtime}/{models}/side-{self._detector_side}"

    @property
    def _onnx(self) -> bool:
        return self._models[0].is_onnx

    def missing(self) -> list[str]:
        """The packages and models that are absent."""
        wanted = ["paddleocr"] if all(model.is_onnx for model in self._models) else ["paddleocr", "paddle"]
        absent = ["paddlepaddle" if package == "paddle" else package for package in wanted if not is_installed(package)]
        lines = [f"The scorer 'ocr' needs {' and '.join(absent)}, not installed here: {INSTALL}"] if absent else []
        return lines + [line for model in self._models if (line := model.missing) is not None]

    def load(self) -> None:
        """Import the packages and choose the device.

        Raises:
            ImportError: a package does not import.
            MissingDependencyError: a model in the store is not what was downloaded.
            UsageError: the device is not there, paddlepaddle cannot use it, or a folder's model is another one.
        """
        detection, recognition = self._models
        for model in self._models:
            model.verify()
        if detection.is_onnx != recognition.is_onnx:
            raise UsageError(
                f"Scorer 'ocr': {detection.folder} and {recognition.folder} must both hold Paddle weights or both ONNX."
            )
        _ = detection.name, recognition.name
        with _quiet(), _own_signal_handlers():
            import paddleocr  # noqa: F401
        # paddleocr has set its own level while it was imported.
        for name in ("paddlex", "paddleocr", "ppocr"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._device = self._choose_device()

    def most_readers(self) -> int:
        """On a GPU one reader keeps it busy; on the CPU each works on one core."""
        return 1 if self._device.startswith("gpu") else _MOST_READERS

    def make_reader(self) -> PaddleReader:
        """A reader for the calling thread."""
        return PaddleReader(*self._models, self._detector_side, self._device)

    def _choose_device(self) -> str:
        """``cpu`` or ``gpu:N``; "auto" takes the GPU only where this build of paddlepaddle can use it."""
        if self._device_option == "cpu" or (self._device_option == "auto" and self._onnx):
            return "cpu"
        device = scorer_device(self._device_option)
        if device.type == "cpu":
            return "cpu"
        if self._onnx or _paddle_has_cuda():
            return f"gpu:{device.index or 0}"
        if self._device_option == "auto":
            return "cpu"
        raise UsageError(
            f"Scorer 'ocr': device is {self._device_option!r}, but this paddlepaddle is a CPU build. Install "
            'paddlepaddle-gpu (https://www.paddlepaddle.org.cn/en/install/quick) or set device = "cpu".'
        )


_PADDLE = ("paddlepaddle", "paddlepaddle-gpu")


def _paddle_has_cuda() -> bool:
    import paddle

    return bool(paddle.is_compiled_with_cuda())


def _named(model: Model) -> str:
    """A model's version; a folder that names no model shows in ``load``, not here, where only absence may stop us."""
    try:
        return model.version
    except UsageError as error:
        raise MissingDependencyError(str(error)) from None


def _first_version(*distributions: str) -> str:
    """``name-version`` of the first distribution that is installed."""
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name}-{importlib.metadata.version(name)}"
    return f"{distributions[0]}-unknown"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the packages say while they are imported and started; skip their probe of download hosts."""
    os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
    os.environ.setdefault("GLOG_minloglevel", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Keep the process' signal handlers: paddle installs its own, under which a SIGTERM kills a run at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    if is_installed("paddle"):
        import paddle

        paddle.disable_signal_handler()
    for number, handler in before.items():
        with contextlib.suppress(ValueError, TypeError):  # not the main thread; a handler that is not Python's
            signal.signal(number, handler)
