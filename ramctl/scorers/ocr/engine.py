"""What an OCR engine is to the scorer, and what every engine shares."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from ramctl.hashing import file_sha256
from ramctl.scorers.base import Images

#: Detectors enlarge the shorter side to ``detector_side``: a strip of 1x500 would become 160,000 wide.
MAX_ASPECT = 10


class Reader(Protocol):
    """One running engine; not to be shared by threads."""

    def read(self, image: Images) -> list[str]:
        """The lines of confidence above 0 in a picture ``uint8 [H, W, 3]`` RGB, in the detector's order."""
        ...


class Engine(Protocol):
    """A choice of engine, models and settings, from which readers are made."""

    #: The command that installs its packages.
    install: str

    @property
    def version(self) -> str:
        """Packages, model files with the start of their SHA-256, and the settings that change what is read.

        Raises:
            MissingDependencyError: a package or a model file is absent.
        """
        ...

    def missing(self) -> list[str]:
        """What is absent, one line each with the command that gets it; imports nothing."""
        ...

    def load(self) -> None:
        """Import the packages; called once, before the first reader is made.

        Raises:
            ImportError: a package does not import.
            UsageError: the device asked for is not there.
        """
        ...

    def most_readers(self) -> int:
        """How many readers are worth having side by side; asked after ``load``."""
        ...

    def make_reader(self) -> Reader:
        """A reader for the calling thread."""
        ...


def is_installed(package: str) -> bool:
    """Whether a top-level package could be imported; nothing is."""
    return importlib.util.find_spec(package) is not None


@cache
def fingerprint(file: Path) -> str:
    """The first eight hex digits of a model file's SHA-256."""
    return file_sha256(file)[:8]


def to_bgr(image: Images) -> Images:
    """The picture as both engines take it: no extreme strip, blue first, contiguous."""
    return np.ascontiguousarray(limit_aspect(image)[:, :, ::-1])


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
