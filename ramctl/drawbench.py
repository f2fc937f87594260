"""DrawBench's prompts (Saharia et al. 2022, arXiv 2205.11487), or another file in their place.

They carry no licence, so they are downloaded, not shipped. Copies come as a table with categories, as plain lines, and
as lines that repeat each prompt once per picture; all of them are read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from ramctl.errors import DataError, MissingDependencyError
from ramctl.prompts import Prompt, read_prompts
from ramctl.resources import find_resource

#: The store's entry.
ENTRY = "drawbench"
_PROMPT_COLUMNS, _TAG_COLUMNS = ("prompt", "prompts", "text", "caption"), ("tag", "category", "kind")
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")


def drawbench_file(given: Path | None) -> Path:
    """The prompt file: the one given, else what ``ramctl download-weights drawbench`` has fetched.

    Raises:
        MissingDependencyError: none given and none fetched; says what to do.
    """
    if given is not None:
        return find_resource(given)
    from ramctl.weights import find_entry, weight_file

    names = [file.path for file in find_entry(ENTRY).files if Path(file.path).suffix in _SUFFIXES]
    try:
        return weight_file(ENTRY, names[0])
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"DrawBench's prompts: {error}; or give a file of your own, e.g. "
            "--drawbench-prompts prompts/general/test.jsonl"
        ) from None


def read_drawbench(file: Path) -> list[Prompt]:
    """The different prompts of a file, in order of first appearance.

    A table (``.csv``, ``.tsv``) needs a column named prompt(s); one named category or tag becomes the prompts' tag.
    Other files are read as :func:`ramctl.prompts.read_prompts` reads them.

    Raises:
        DataError: the file is absent or broken, or holds no prompts.
    """
    prompts = _read_table(file) if file.suffix in (".csv", ".tsv") else read_prompts(file)
    different: dict[str, Prompt] = {}
    for prompt in prompts:
        different.setdefault(prompt.text, prompt)
    return list(different.values())


def _read_table(file: Path) -> list[Prompt]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"Prompt file {file} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Prompt file {file} cannot be read: {error}.") from None
    rows = csv.reader(io.StringIO(text), delimiter="\t" if file.suffix == ".tsv" else ",")
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        column, tag = _column(header, _PROMPT_COLUMNS), _column(header, _TAG_COLUMNS)
        if column is None:
            raise DataError(f"{file}: its first line must name the columns, one of them Prompts; it is {header}.")
        prompts = list(_prompts(rows, column, tag))
    except csv.Error as error:
        raise DataError(f"{file}, line {rows.line_num}: {error}.") from None
    if not prompts:
        raise DataError(f"Prompt file {file} holds no prompts.")
    return prompts


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _prompts(rows: Iterator[list[str]], column: int, tag: int | None) -> Iterator[Prompt]:
    for row in rows:
        if len(row) <= column or not row[column].strip():
            continue
        kind = row[tag].strip() if tag is not None and len(row) > tag else ""
        yield Prompt(row[column].strip(), {"tag": kind} if kind else {})
