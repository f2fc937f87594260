"""Where downloaded files lie, which of them are there, and what is known of each.

``ROOT/NAME/`` holds the files of the manifest entry NAME under their own names, whoever put them there. Beside them
``.ramctl.json`` records what a download was checked against and ``.ramctl-hashes.json`` remembers the hashes of files
by size and time of change, so that a 4 GB file is read once.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ramctl import hashing
from ramctl.errors import MissingDependencyError
from ramctl.weights.manifest import Entry, WantedFile, entry_of_repository, find_entry

#: Environment variable: the folder that holds the entries' folders.
ROOT_VARIABLE = "RAMCTL_WEIGHTS"

RECORD_FILE = ".ramctl.json"
HASHES_FILE = ".ramctl-hashes.json"
PART_SUFFIX = ".part"

Condition = Literal["present", "missing", "partial", "damaged"]

_PACKAGE = Path(__file__).resolve().parents[1]
_hashes: dict[tuple[str, int, int], str] = {}
_hashes_lock = threading.Lock()


@dataclass(frozen=True)
class FileState:
    """A file of an entry: ``detail`` says what is wrong with a damaged one; ``bytes_here`` counts what is there."""

    file: WantedFile
    condition: Condition
    bytes_here: int
    detail: str = ""


@dataclass(frozen=True)
class Missing:
    """A file that is absent or damaged, and the command that gets it."""

    entry: str
    file: str
    condition: Condition
    command: str


def weights_root() -> Path:
    """The store: ``RAMCTL_WEIGHTS``, else ``models/weights`` in a checkout, else a folder of the user's data."""
    given = os.environ.get(ROOT_VARIABLE)
    if given:
        return Path(given).expanduser()
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        return _PACKAGE.parent / "models" / "weights"
    from platformdirs import user_data_path

    return user_data_path("ramctl", appauthor=False) / "weights"


def entry_folder(name: str, root: Path | None = None) -> Path:
    """The folder of an entry, there or not."""
    return (root or weights_root()) / name


def command_for(name: str) -> str:
    """The command that fetches an entry."""
    return f"ramctl download-weights {name}"


def weight_file(name: str, file: str) -> Path:
    """The path of one file of an entry.

    Raises:
        MissingDependencyError: it is not there, or a download of ours has since been cut short; with the command.
        UsageError: no entry of that name.
    """
    find_entry(name)
    path = entry_folder(name) / file
    if not path.is_file():
        raise MissingDependencyError(f"{path} is not there: {command_for(name)}")
    recorded = read_record(entry_folder(name)).files.get(file)
    if recorded is not None and path.stat().st_size != recorded.size:
        raise MissingDependencyError(
            f"{path} is damaged: {path.stat().st_size} bytes in place of {recorded.size}. "
            f"Fetch it again: {command_for(name)}"
        )
    return path


def weight_folder(name: str, parts: Collection[str] = ()) -> Path:
    """The folder of an entry with all its files in it, those of the optional ``parts`` included.

    Raises:
        MissingDependencyError: a file is not there, or damaged; with the command.
        UsageError: no entry of that name.
    """
    entry = find_entry(name)
    for file in expected_files(entry, read_record(entry_folder(name)), frozenset(parts)):
        weight_file(name, file.path)
    return entry_folder(name)


def local_repository(repo_id: str, parts: Collection[str] = ()) -> Path | None:
    """The store's folder of the hub repository ``repo_id`` if it is complete with the optional ``parts``, else None."""
    entry = entry_of_repository(repo_id)
    try:
        return None if entry is None else weight_folder(entry.name, parts)
    except MissingDependencyError:
        return None


def fingerprint(name: str, file: str) -> str:
    """The first 12 hex digits of the SHA-256 of the file that is there, for version strings.

    A file put there by hand may be another than the manifest's; a warning names both hashes.

    Raises:
        MissingDependencyError: it is not there, or is no longer what was downloaded (both hashes are named).
        UsageError: no entry of that name.
    """
    path, folder = weight_file(name, file), entry_folder(name)
    found = file_sha256(path, folder)
    recorded = read_record(folder).files.get(file)
    if recorded is not None and recorded.sha256 != found:
        raise MissingDependencyError(
            f"{path} has changed since it was downloaded: SHA-256 {found}, expected {recorded.sha256}. "
            f"Fetch it again: {command_for(name)}"
        )
    wanted = next((wanted for wanted in find_entry(name).files if wanted.path == file), None)
    problem = hash_problem(wanted, None, found) if wanted else ""
    if problem:
        warnings.warn(f"{path} is not the official file: {problem}. Numbers will differ.", stacklevel=2)
    return found[:12]


def missing_for(names: Iterable[str], parts: Collection[str] = ()) -> list[Missing]:
    """The files of the named entries that are not there or are known to be damaged; no hash is computed."""
    return [
        Missing(name, state.file.path, state.condition, command_for(name))
        for name in names
        for state in states(find_entry(name), parts)
        if state.condition != "present"
    ]


def states(
    entry: Entry, parts: Collection[str] = (), *, root: Path | None = None, rehash: bool = False
) -> list[FileState]:
    """How each file of an entry is: present, missing, partial (a download was begun) or damaged.

    Sizes are compared always, and hashes where one is remembered; with ``rehash`` every file is read again.
    """
    folder = entry_folder(entry.name, root)
    record = read_record(folder)
    return [
        _state(file, folder, record.files.get(file.path), rehash)
        for file in expected_files(entry, record, frozenset(parts))
    ]


def condition_of(files: Iterable[FileState]) -> Condition:
    """The condition of several files together: damaged if one is, present if all are, missing if none is."""
    found = {state.condition for state in files}
    if "damaged" in found:
        return "damaged"
    if len(found) == 1:
        return found.pop()
    return "partial" if found else "present"


# -- what is known of a file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What a download was: its size in bytes, SHA-256, the repository's commit and who vouched for the hash."""

    size: int
    sha256: str
    commit: str | None = None
    vouched_by: str = ""


@dataclass(frozen=True)
class Record:
    """What an entry's folder remembers of its downloads.

    ``files`` came; ``listing`` is what the hub listed (path → bytes); ``commit`` is the commit of the repository that
    all of them are of, where the manifest names none.
    """

    files: Mapping[str, Recorded] = field(default_factory=dict)
    listing: Mapping[str, int] = field(default_factory=dict)
    commit: str | None = None


def read_record(folder: Path) -> Record:
    """The record of an entry's folder; a damaged one counts as none."""
    content = _read_json(folder / RECORD_FILE)
    try:
        files = {str(path): Recorded(**row) for path, row in content.get("files", {}).items()}
        listing = {str(path): int(size) for path, size in content.get("listing", {}).items()}
    except (TypeError, ValueError, AttributeError):
        return Record()
    return Record(files, listing, content.get("commit"))


def write_record(folder: Path, record: Record) -> None:
    """Replace the record; call it with the entry's lock held."""
    rows = {path: vars(row) for path, row in sorted(record.files.items())}
    write_json(folder / RECORD_FILE, {"commit": record.commit, "files": rows, "listing": dict(record.listing)})


def file_sha256(path: Path, folder: Path, *, rehash: bool = False) -> str:
    """The SHA-256 of a file, remembered in ``folder`` by its size and time of change."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    relative = path.relative_to(folder).as_posix()
    if not rehash:
        remembered = _remembered(key, relative, folder)
        if remembered is not None:
            return remembered
    digest = hashing.file_sha256(path)
    remember_sha256(path, folder, digest)
    return digest


def remember_sha256(path: Path, folder: Path, digest: str) -> None:
    """Keep the hash of a file that was just read, here and, where the folder can be written, on disk."""
    stat = path.stat()
    relative = path.relative_to(folder).as_posix()
    with _hashes_lock:
        _hashes[str(path), stat.st_size, stat.st_mtime_ns] = digest
        # A store on a read-only share is fine; then each process reads the file once.
        with contextlib.suppress(OSError):
            rows = _read_json(folder / HASHES_FILE)
            rows[relative] = [stat.st_size, stat.st_mtime_ns, digest]
            write_json(folder / HASHES_FILE, rows)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a small JSON file in one step."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remembered(key: tuple[str, int, int], relative: str, folder: Path) -> str | None:
    if key in _hashes:
        return _hashes[key]
    row = _read_json(folder / HASHES_FILE).get(relative)
    if isinstance(row, list) and row[:2] == list(key[1:]) and len(row) == 3:
        return str(row[2])
    return None


def _state(file: WantedFile, folder: Path, recorded: Recorded | None, rehash: bool) -> FileState:
    path = folder / file.path
    if not path.is_file():
        part = path.with_name(path.name + PART_SUFFIX)
        begun = part.stat().st_size if part.is_file() else 0
        return FileState(file, "partial" if begun else "missing", begun)
    size = path.stat().st_size
    expected_size = file.size or (recorded.size if recorded else None)
    if expected_size is not None and size != expected_size:
        return FileState(file, "damaged", size, f"{size} bytes in place of {expected_size}")
    digest: str | None
    if rehash:
        digest = file_sha256(path, folder, rehash=True)
    else:
        stat = path.stat()
        digest = _remembered((str(path), stat.st_size, stat.st_mtime_ns), file.path, folder)
    problem = hash_problem(file, recorded.sha256 if recorded else None, digest) if digest else ""
    return FileState(file, "damaged" if problem else "present", size, problem)


def hash_problem(file: WantedFile, pinned: str | None, digest: str) -> str:
    """What is wrong with a SHA-256, given the manifest's and, where it has none, an earlier download's; or ""."""
    expected = file.sha256 or pinned
    if expected is not None and digest != expected:
        return f"SHA-256 {digest}, expected {expected}"
    if file.sha256_starts is not None and not digest.startswith(file.sha256_starts):
        return f"SHA-256 {digest}, expected one that starts with {file.sha256_starts}"
    return ""


def expected_files(entry: Entry, record: Record, parts: frozenset[str] = frozenset()) -> list[WantedFile]:
    """The manifest's files and, for an entry listed by the hub, those of the listing."""
    files = list(entry.wanted(parts))
    known = {file.path for file in files}
    return files + [WantedFile(path, size=size) for path, size in record.listing.items() if path not in known]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        warnings.warn(f"{path} cannot be read; it is ignored.", stacklevel=3)
        return {}
    return content if isinstance(content, dict) else {}
