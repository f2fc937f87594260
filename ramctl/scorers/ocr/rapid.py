"""RapidOCR: the PP-OCRv6 models inside the ``rapidocr`` wheel, on the CPU through ONNX Runtime.

They need no download and read 64x64 pictures. The paper's engine is the other one (:mod:`ramctl.scorers.ocr.paddle`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ramctl.errors import MissingDependencyError
from ramctl.scorers.base import Images
from ramctl.scorers.ocr.engine import fingerprint, is_installed, to_bgr

INSTALL = "pip install 'rapidocr>=3.10,<4' onnxruntime rapidfuzz"

#: Named, so that another release of the package cannot change the reward unnoticed.
DETECTOR_FILE = "PP-OCRv6_det_small.onnx"
RECOGNISER_FILE = "PP-OCRv6_rec_small.onnx"

#: Least width in pixels (at height 48) to which a line is padded before it is recognised; longer ones stay
#: whole. The engine's own 320 doubles the recogniser's time on short words and reads none of them better, and
#: 96 misreads some (benchmarks/ocr_speed.py).
LINE_WIDTH = 160

_MOST_READERS = 8


@cache
def model_files() -> tuple[Path, Path]:
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


class RapidReader:
    """One RapidOCR engine; not to be shared by threads."""

    def __init__(self, detector_side: int) -> None:
        from rapidocr import RapidOCR

        detector, recogniser = model_files()
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
        found = self._engine(to_bgr(image))
        # Without a line the engine returns objects of other kinds, some without these fields.
        lines: Sequence[str] = getattr(found, "txts", None) or ()
        confidences: Sequence[float] = getattr(found, "scores", None) or ()
        return [line for line, confidence in zip(lines, confidences, strict=True) if confidence > 0]


class RapidEngine:
    """RapidOCR with a detector side in pixels."""

    install = INSTALL

    def __init__(self, detector_side: int) -> None:
        self._detector_side = detector_side

    @property
    def version(self) -> str:
        """Package, model files with the start of their SHA-256, detector side and line width.

        Raises:
            MissingDependencyError: the package or a model file is absent.
        """
        models = "/".join(f"{file.stem}-{fingerprint(file)}" for file in model_files())
        package = f"rapidocr-{importlib.metadata.version('rapidocr')}"
        return f"{package}/{models}/side-{self._detector_side}/line-{LINE_WIDTH}"

    def missing(self) -> list[str]:
        """The packages or the model file that are absent."""
        packages = [package for package in ("rapidocr", "onnxruntime") if not is_installed(package)]
        if packages:
            return [f"The scorer 'ocr' needs {' and '.join(packages)}, not installed here: {INSTALL}"]
        try:
            model_files()
        except MissingDependencyError as error:
            return [str(error)]
        return []

    def load(self) -> None:
        """Import the packages.

        Raises:
            ImportError: one of them does not import.
        """
        import onnxruntime  # noqa: F401
        import rapidocr  # noqa: F401

    def most_readers(self) -> int:
        """Each reader works on one core and holds about 100 MB."""
        return _MOST_READERS

    def make_reader(self) -> RapidReader:
        """A reader for the calling thread."""
        return RapidReader(self._detector_side)
