"""The folder of an evaluation: which one a protocol may use, and what of an earlier call in it still holds.

``images/`` has the pictures and their list, ``pictures.sha256`` their hashes (``sha256sum -c`` checks them),
``protocol.json`` all that the pictures depend on, ``scores.jsonl`` a line per picture, ``scores.json`` the protocol,
versions and results, ``evaluation.html`` the page for people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ramctl.errors import DataError
from ramctl.scorers.base import ImageScore

IMAGES, PROTOCOL, LINES, SCORES = "images", "protocol.json", "scores.jsonl", "scores.json"
HASHES, PAGE = "pictures.sha256", "evaluation.html"


def to_json(value: Mapping[str, Any]) -> str:
    """A JSON file's text."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def choose_folder(given: Path | None, default: Path, protocol: Mapping[str, Any]) -> Path:
    """The given folder when it is new, empty or of this protocol; else the default, numbered until it is.

    Raises:
        DataError: the given folder holds something else (what differs is named).
    """
    if given is not None:
        if given.exists() and not given.is_dir():
            raise DataError(f"Output folder {given} is a file; choose another with --output.")
        problem = _other_content(given, protocol)
        if problem is not None:
            raise DataError(f"Output folder {given} {problem}; choose another with --output.")
        return given
    candidate, count = default, 1
    while _other_content(candidate, protocol) is not None:
        count += 1
        candidate = default.with_name(f"{default.name}-{count}")
    return candidate


def _other_content(folder: Path, protocol: Mapping[str, Any]) -> str | None:
    """Why this protocol's pictures cannot go into the folder, or None."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        old = json.loads((folder / PROTOCOL).read_text(encoding="utf-8"))
        differing = [key for key in dict.fromkeys((*old, *protocol)) if old.get(key) != protocol.get(key)]
    except (OSError, ValueError, TypeError, AttributeError):
        return f"is not empty and is no evaluation (no readable {PROTOCOL})"
    if not differing:
        return None
    shown = "; ".join(
        f"{key}: {old.get(key)} → {protocol.get(key)}" if not isinstance(old.get(key), dict) else key
        for key in differing[:3]
    )
    return f"holds an evaluation with other settings ({shown})"


def set_aside(folder: Path, scorers: Mapping[str, Any]) -> None:
    """Keep the results of other scorers on the same pictures under a numbered name."""
    try:
        old = json.loads((folder / SCORES).read_text(encoding="utf-8"))["scorers"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if old == json.loads(to_json(scorers)):
        return
    count = 2
    while (folder / f"scores-{count}.json").exists():
        count += 1
    for name in (LINES, SCORES):
        file = folder / name
        if file.exists():
            file.rename(file.with_stem(f"{file.stem}-{count}"))


class KeptScores:
    """The scores that an earlier call left in a folder.

    One is used again for the same file (by hash), the same prompt file and the same scorer: name, version, options.
    Failures are not; they are tried again.
    """

    def __init__(self, folder: Path, prompt_file_sha256: str) -> None:
        self._scorers: Mapping[str, Any] = {}
        self._rows: dict[tuple[str, str], Mapping[str, Any]] = {}
        try:
            content = json.loads((folder / SCORES).read_text(encoding="utf-8"))
            if content["protocol"]["prompt_file_sha256"] != prompt_file_sha256:
                return
            # Not splitlines(): that also splits at separators which prompts may hold as they are.
            lines = (folder / LINES).read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines if line]
            self._rows = {(row["file"], row["sha256"]): row for row in rows}
            self._scorers = content["scorers"]
        except (OSError, ValueError, KeyError, TypeError):
            self._rows = {}  # nothing there, or not ours: everything is scored

    def find(self, scorer: str, version: str, options: Mapping[str, Any], file: str, sha256: str) -> ImageScore | None:
        """What the scorer said of that file (its path inside the folder), None where it must be asked."""
        made = self._scorers.get(scorer)
        row = self._rows.get((file, sha256))
        if made is None or row is None:
            return None
        if made.get("version") != version or made.get("options") != json.loads(json.dumps(options)):
            return None
        return _image_score(row["scores"].get(scorer))


def _image_score(kept: Any) -> ImageScore | None:
    """The JSON object of a score as the score; None for a failure."""
    if not isinstance(kept, dict) or kept.get("error") is not None or kept.get("value") is None:
        return None
    return ImageScore(
        value=float(kept["value"]),
        strict=None if kept["strict"] is None else float(kept["strict"]),
        details={name: math.nan if value is None else float(value) for name, value in kept["details"].items()},
        record=kept["record"],
    )
