"""``models/manifest.toml``: every file ramctl can use and does not ship, with its source, size, hash and licence."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import tomli

from ramctl.errors import ConfigError, UsageError, did_you_mean
from ramctl.resources import resource_dir

#: Environment variable: another manifest in place of the shipped one.
MANIFEST_VARIABLE = "RAMCTL_MANIFEST"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_USER = re.compile(r"(scorer|preset|command):[a-z0-9][\w.-]*")

#: The keys of an entry and of a file, with the types their values have; all others are errors.
FORMAT_KEYS: Mapping[str, Mapping[str, type]] = {
    "entry": {
        "about": str,
        "used_by": list,
        "licence": str,
        "page": str,
        "repo": str,
        "kind": str,
        "revision": str,
        "url": str,
        "gated": bool,
        "on_request": bool,
        "list_from_hub": bool,
        "exclude": list,
        "about_bytes": int,
        "files": list,
    },
    "file": {
        "path": str,
        "source": str,
        "url": str,
        "size": int,
        "about_bytes": int,
        "sha256": str,
        "sha256_starts": str,
        "rows": int,
        "rows_at_least": int,
        "part": str,
    },
}


@dataclass(frozen=True)
class WantedFile:
    """One file of an entry and what is known of it beforehand.

    ``path`` is relative to the entry's folder, with forward slashes; ``source`` its path in the repository when that is
    another; ``url`` where it lies when that is not the entry's repository; ``size`` in bytes, exact; ``about_bytes`` an
    estimate for people where the size is not known; ``sha256_starts`` the known first digits of a hash; ``rows`` the
    number of prompts in a text or CSV file, ``rows_at_least`` a lower bound of it; ``part`` the optional part it
    belongs to.
    """

    path: str
    source: str | None = None
    url: str | None = None
    size: int | None = None
    about_bytes: int | None = None
    sha256: str | None = None
    sha256_starts: str | None = None
    rows: int | None = None
    rows_at_least: int | None = None
    part: str | None = None

    @property
    def bytes_about(self) -> int:
        """The size, else the estimate, else 0."""
        return self.size or self.about_bytes or 0


@dataclass(frozen=True)
class Entry:
    """A folder of the store: one model's, scorer's or prompt set's files and their source.

    ``used_by`` holds "scorer:NAME", "preset:NAME" and "command:NAME". ``repo`` is a hub repository, ``kind`` "model" or
    "dataset". ``on_request`` entries are fetched only when named. With ``list_from_hub`` the hub's own listing of the
    repository, less the ``exclude`` globs, takes the place of a list of files; ``files`` then holds what must be there.
    """

    name: str
    about: str
    used_by: tuple[str, ...]
    licence: str
    page: str
    files: tuple[WantedFile, ...]
    repo: str | None = None
    kind: str = "model"
    revision: str = "main"
    gated: bool = False
    on_request: bool = False
    list_from_hub: bool = False
    exclude: tuple[str, ...] = ()
    about_bytes: int | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its optional parts."""
        return tuple(dict.fromkeys(file.part for file in self.files if file.part))

    def wanted(self, parts: frozenset[str] = frozenset()) -> tuple[WantedFile, ...]:
        """The files every user needs, and those of the optional ``parts``."""
        return tuple(file for file in self.files if file.part is None or file.part in parts)

    def bytes_about(self, parts: frozenset[str] = frozenset()) -> int:
        """The size in bytes of :meth:`wanted`, estimates included."""
        return self.about_bytes or sum(file.bytes_about for file in self.wanted(parts))


def entry_of_repository(repo_id: str) -> Entry | None:
    """The entry whose files are those of the hub repository ``repo_id``."""
    return next((entry for entry in load_manifest().values() if entry.repo == repo_id), None)


def load_manifest(path: Path | None = None) -> Mapping[str, Entry]:
    """The manifest's entries by name, in its order.

    Args:
        path: a manifest file; by default the one ``RAMCTL_MANIFEST`` names, else the shipped one.

    Raises:
        ConfigError: it cannot be read, or holds an unknown key, a wrong type or an impossible value.
    """
    given = path or (Path(os.environ[MANIFEST_VARIABLE]) if os.environ.get(MANIFEST_VARIABLE) else None)
    file = given or resource_dir("models") / "manifest.toml"
    try:
        stamp = file.stat()
    except OSError as error:
        raise ConfigError(
            f"The manifest {file} cannot be read: {os.strerror(error.errno or 0)}. Install ramctl again, "
            f"or correct {MANIFEST_VARIABLE}."
        ) from error
    return _load(file, stamp.st_mtime_ns, stamp.st_size)


def find_entry(name: str) -> Entry:
    """The entry of that name.

    Raises:
        UsageError: there is none; the nearest names are given.
    """
    manifest = load_manifest()
    if name not in manifest:
        raise UsageError(f"The manifest has no entry {name!r}.{did_you_mean(name, manifest)}")
    return manifest[name]


@lru_cache(maxsize=4)
def _load(file: Path, _changed: int, _size: int) -> Mapping[str, Entry]:
    try:
        content = tomli.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The manifest {file} cannot be read: {error}.") from error
    return MappingProxyType({name: _entry(file, name, table) for name, table in content.items()})


def _entry(manifest: Path, name: str, table: Any) -> Entry:
    where = f"Manifest {manifest}, entry {name!r}"
    if not _NAME.fullmatch(name) or not isinstance(table, dict):
        raise ConfigError(f"{where}: an entry is a table with a lower-case name.")
    values = _checked(where, table, FORMAT_KEYS["entry"], ("about", "licence", "page", "files"))
    base = values.pop("url", None)
    files = tuple(_file(where, item, base) for item in values.pop("files"))
    for key in ("used_by", "exclude"):
        values[key] = tuple(values.get(key, ()))
    entry = Entry(name=name, files=files, **values)
    if (entry.repo is None) != all(file.url is not None for file in files):
        raise ConfigError(f"{where}: give `repo`, or a `url` for every file.")
    if entry.kind not in ("model", "dataset"):
        raise ConfigError(f"{where}: `kind` is 'model' or 'dataset', not {entry.kind!r}.")
    wrong = [user for user in entry.used_by if not isinstance(user, str) or not _USER.fullmatch(user)]
    if wrong:
        raise ConfigError(f"{where}: `used_by` holds scorer:NAME, preset:NAME or command:NAME, not {wrong[0]!r}.")
    if len({file.path for file in files}) < len(files):
        raise ConfigError(f"{where}: a file is listed twice.")
    return entry


def _file(where: str, item: Any, base: str | None) -> WantedFile:
    table = {"path": item} if isinstance(item, str) else item
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: a file is a path or a table, not {item!r}.")
    values = _checked(where, table, FORMAT_KEYS["file"], ("path",))
    path = values["path"]
    check_relative(path, where)
    where = f"{where}, file {path!r}"
    if "sha256" in values and not _SHA256.fullmatch(values["sha256"]):
        raise ConfigError(f"{where}: `sha256` is 64 lower-case hex digits.")
    if "sha256_starts" in values and not re.fullmatch("[0-9a-f]{8,63}", values["sha256_starts"]):
        raise ConfigError(f"{where}: `sha256_starts` is 8 or more lower-case hex digits.")
    if base is not None:
        values.setdefault("url", base.rstrip("/") + "/" + quote(path))
    for key in ("size", "about_bytes", "rows", "rows_at_least"):
        if values.get(key, 1) <= 0:
            raise ConfigError(f"{where}: `{key}` must be above 0.")
    return WantedFile(**values)


def check_relative(path: str, where: str) -> None:
    """Refuse a path that leads out of its folder: listings come from the network, too.

    Raises:
        ConfigError: it is absolute, has ``..`` or a backslash in it, is empty, or is one of the store's own.
    """
    pure = PurePosixPath(path)
    ours = pure.parts[:1] and pure.parts[0].startswith(".ramctl")
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or ours:
        raise ConfigError(f"{where}: the path {path!r} leads out of its folder.")


def _checked(where: str, table: dict[str, Any], keys: Mapping[str, type], needed: tuple[str, ...]) -> dict[str, Any]:
    for key, value in table.items():
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {key!r}.{did_you_mean(key, keys)}")
        if type(value) is not keys[key]:
            raise ConfigError(f"{where}: `{key}` must be of type {keys[key].__name__}, got {value!r}.")
    for key in needed:
        if key not in table:
            raise ConfigError(f"{where}: `{key}` is missing.")
    return dict(table)
