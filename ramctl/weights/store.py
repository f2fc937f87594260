"""Where downloaded files lie, which of them are there, and what is known of each.

``ROOT/NAME/`` holds the files of the manifest entry NAME under their own names, whoever put them there. Beside them
``.ramctl.json`` records what a download was checked against and ``.ramctl-hashes.json`` remembers the hashes of files
by size and time of change, so that a 4 GB file is read once. Whoever loads a file asks here for its path and is refused
one of a file that differs from the manifest's, or from the one that was downloaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ramctl import hashing
from ramctl.errors import MissingDependencyError
from ramctl.weights.manifest import Entry, WantedFile, entry_of_repository, find_entry, load_manifest

#: Environment variable: the folder that holds the entries' folders.
ROOT_VARIABLE = "RAMCTL_WEIGHTS"
#: Environment variable: "allow" for weights that are meant to be others than the official ones; they are warned of.
OTHER_VARIABLE = "RAMCTL_OTHER_WEIGHTS"

RECORD_FILE = ".ramctl.json"
HASHES_FILE = ".ramctl-hashes.json"
HASHES_LOCK = ".ramctl-hashes.lock"
PART_SUFFIX = ".part"

Condition = Literal["present", "missing", "partial", "damaged"]

#: How long another process is waited for that may be reading the same file, in seconds.
_PATIENCE = 900.0

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
    """The command that fetches an entry; a preset of the same name, which brings more, is not meant."""
    is_preset_too = any(f"preset:{name}" in entry.used_by for entry in load_manifest().values())
    return f"ramctl download-weights {'scorer:' if is_preset_too else ''}{name}"


def weight_file(name: str, file: str, *, verify: bool = True) -> Path:
    """The path of one file of an entry, for loading it.

    Where the manifest, or else the record of its download, knows the file's SHA-256, the file must have it. It is read
    for that once, and again when its size or time of change are others. With ``RAMCTL_OTHER_WEIGHTS=allow`` a warning
    takes the error's place.

    Args:
        verify: without, sizes alone are compared: for those who look where files are and load none.

    Raises:
        MissingDependencyError: it is not there, or is another file (both hashes are named); with the command.
        UsageError: no entry of that name.
    """
    entry, folder = find_entry(name), entry_folder(name)
    path = folder / file
    if not path.is_file():
        raise MissingDependencyError(f"{path} is not there: {command_for(name)}")
    record = read_record(folder)
    files = expected_files(entry, record, frozenset(entry.parts))
    wanted = next((wanted for wanted in files if wanted.path == file), WantedFile(file))
    recorded = record.files.get(file)
    problem = _difference(wanted, recorded, path, folder, verify=verify)
    if not problem:
        return path
    official = wanted.sha256 or wanted.sha256_starts or recorded is None
    what = f"{path} {'is not the official file' if official else 'has changed since it was downloaded'}: {problem}."
    if os.environ.get(OTHER_VARIABLE) != "allow":
        raise MissingDependencyError(
            f"{what} Fetch it again: {command_for(name)}, or to use it as it is, set {OTHER_VARIABLE}=allow"
        )
    if verify:
        warnings.warn(f"{what} Numbers will differ.", stacklevel=2)
    return path


def weight_folder(name: str, parts: Collection[str] = (), *, verify: bool = True) -> Path:
    """The folder of an entry with all its files in it, those of the optional ``parts`` included, for loading them.

    Args:
        verify: see :func:`weight_file`, which every file goes through.

    Raises:
        MissingDependencyError: a file is not there, or is another one; with the command.
        UsageError: no entry of that name.
    """
    entry = find_entry(name)
    for file in expected_files(entry, read_record(entry_folder(name)), frozenset(parts)):
        weight_file(name, file.path, verify=verify)
    return entry_folder(name)


def local_repository(repo_id: str, parts: Collection[str] = ()) -> Path | None:
    """The store's folder of the hub repository ``repo_id`` if it is complete with the optional ``parts``, else None."""
    entry = entry_of_repository(repo_id)
    try:
        return None if entry is None else weight_folder(entry.name, parts, verify=False)
    except MissingDependencyError:
        return None


def fingerprint(name: str, file: str) -> str:
    """The first 12 hex digits of the SHA-256 of the file that is there, for version strings.

    Raises:
        MissingDependencyError: see :func:`weight_file`.
        UsageError: no entry of that name.
    """
    return file_sha256(weight_file(name, file), entry_folder(name))[:12]


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
    """The SHA-256 of a file, remembered in ``folder`` by its size and time of change.

    Of several processes that ask at once, one reads the file and the others wait for what it finds.
    """
    if rehash:
        return _read_sha256(path, folder)
    remembered = _remembered(path, folder)
    if remembered is not None:
        return remembered
    with _one_reader(folder):
        return _remembered(path, folder) or _read_sha256(path, folder)


def remember_sha256(path: Path, folder: Path, digest: str) -> None:
    """Keep the hash of a file that was just read, here and, where the folder can be written, on disk."""
    size, changed = _stamp(path)
    with _hashes_lock:
        _hashes[str(path), size, changed] = digest
        # A store on a read-only share is fine; then each process reads the file once.
        with contextlib.suppress(OSError):
            rows = _read_json(folder / HASHES_FILE)
            rows[path.relative_to(folder).as_posix()] = [size, changed, digest]
            write_json(folder / HASHES_FILE, rows)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a small JSON file in one step."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _read_sha256(path: Path, folder: Path) -> str:
    stamp = _stamp(path)
    digest = hashing.file_sha256(path)
    # What was read of a file while it changed must not stand for what it has become.
    if _stamp(path) == stamp:
        remember_sha256(path, folder, digest)
    return digest


@contextlib.contextmanager
def _one_reader(folder: Path) -> Iterator[None]:
    """Wait until no other process reads a file of ``folder`` for its hash; where that cannot be told, go on."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / HASHES_LOCK)
    # A read-only store, or a disk without locks: then every process reads for itself.
    with contextlib.suppress(OSError, NotImplementedError, Timeout):
        lock.acquire(timeout=_PATIENCE)
    try:
        yield
    finally:
        lock.release()


def _remembered(path: Path, folder: Path) -> str | None:
    stamp = _stamp(path)
    if (str(path), *stamp) in _hashes:
        return _hashes[(str(path), *stamp)]
    row = _read_json(folder / HASHES_FILE).get(path.relative_to(folder).as_posix())
    if isinstance(row, list) and row[:2] == list(stamp) and len(row) == 3:
        return str(row[2])
    return None


def _difference(wanted: WantedFile, recorded: Recorded | None, path: Path, folder: Path, *, verify: bool) -> str:
    """How a file differs from what is known of it, or ""; without ``verify`` only one of another size is read."""
    size, expected = path.stat().st_size, wanted.size or (recorded.size if recorded else None)
    words = [] if expected in (None, size) else [f"{size} bytes in place of {expected}"]
    pinned = recorded.sha256 if recorded else None
    if (wanted.sha256 or wanted.sha256_starts or pinned) and (verify or words):
        words.append(hash_problem(wanted, pinned, file_sha256(path, folder)))
    return ", ".join(filter(None, words))


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
    digest = file_sha256(path, folder, rehash=True) if rehash else _remembered(path, folder)
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
