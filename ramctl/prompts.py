"""Prompt records and their JSONL files.

A line of a prompt file is one JSON object with a ``prompt`` string; every other key is metadata for the scorers.
GenEval's own ``evaluation_metadata.jsonl`` (``tag``, ``include``, ``exclude``, ``prompt``) is read as it is. A
file whose name ends in ``.gz`` is gzip-compressed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ramctl.errors import DataError
from ramctl.resources import DOWNLOADED


@dataclass(frozen=True)
class Prompt:
    """One prompt: the text the model reads and the metadata the scorers read."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        """The prompt's kind (``metadata["tag"]``), ``"all"`` when it has none; metrics are split by it."""
        return str(self.metadata.get("tag", "all"))

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this prompt's line."""
        return {**self.metadata, "prompt": self.text}


def parse_prompt(line: str, where: str) -> Prompt:
    """One JSONL line as a :class:`Prompt`; ``where`` (file and line number) opens the error message.

    Raises:
        DataError: the line is not a JSON object of valid Unicode, or has no non-empty ``prompt`` string.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno}).") from None
    if "\\ud" in line.lower() and not is_unicode(json.dumps(row, ensure_ascii=False)):
        raise DataError(f"{where}: not valid Unicode: it holds half of a surrogate pair (an escape such as \\ud83d).")
    if not isinstance(row, dict):
        raise DataError(f'{where}: expected a JSON object such as {{"prompt": "…"}}, got {type(row).__name__}.')
    text = row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: the key "prompt" must be a non-empty string, got {text!r}.')
    return Prompt(text=text, metadata={key: value for key, value in row.items() if key != "prompt"})


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: half of a surrogate pair, or a byte of the command line that is none, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_lines(file: Path) -> list[str]:
    # With "-sig", as Windows' editors begin a file with a byte order mark.
    # Not str.splitlines: captions may hold other line separators (U+2028, U+0085), which JSON leaves as they are.
    if file.suffix != ".gz":
        return file.read_text(encoding="utf-8-sig").split("\n")
    with gzip.open(file, "rt", encoding="utf-8-sig") as stream:
        return stream.read().split("\n")


def read_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a file: JSON lines, or with the suffix ``.txt`` one plain prompt per line; ``.gz`` may follow.

    Raises:
        DataError: no such file, no prompt in it, a damaged ``.gz``, or a broken line (its number is named).
    """
    file = Path(path)
    try:
        lines = _read_lines(file)
    except FileNotFoundError:
        hint = f" Fetch it with: ramctl download-weights {file.parts[1]}" if _downloaded(file) else ""
        raise DataError(f"Prompt file {file} does not exist.{hint}") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"Prompt file {file} cannot be read: {error}.") from None
    plain = Path(file.stem if file.suffix == ".gz" else file.name).suffix == ".txt"
    prompts = [
        Prompt(text=line.strip()) if plain else parse_prompt(line, f"{file}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"Prompt file {file} holds no prompts.")
    return prompts


def _downloaded(file: Path) -> bool:
    """Whether a path names a file of the store of downloads (``weights/pickapic/train.txt``)."""
    return len(file.parts) == 3 and file.parts[0] == DOWNLOADED


def write_prompts(path: str | Path, prompts: Iterable[Prompt]) -> None:
    """Write prompts as JSON lines (UTF-8, keys in insertion order), ``prompt`` last; a ``.gz`` path compresses."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(prompt.to_json(), ensure_ascii=False) for prompt in prompts]
    text = "\n".join(lines) + "\n"
    if file.suffix == ".gz":
        # Without the time of writing, so that the same prompts give the same file.
        file.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))
    else:
        file.write_text(text, encoding="utf-8")


def spread_by_tag(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """``count`` prompts of the list, taking the tags in turn, so that a short selection shows every kind."""
    by_tag: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_tag.setdefault(prompt.tag, []).append(prompt)
    chosen: list[Prompt] = []
    depth = 0
    while len(chosen) < min(count, len(prompts)):
        chosen.extend(rows[depth] for rows in by_tag.values() if depth < len(rows))
        depth += 1
    return chosen[:count]
