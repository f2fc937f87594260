"""One file from a server to the disk: resumed, verified, put in place in one step.

Bytes go to ``FILE.part``; ``FILE.part.json`` beside it says which content they belong to. The final name appears only
after size and hash were found right and the bytes are on the disk.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from ramctl.download.errors import DownloadError, StoppedError, TransientError
from ramctl.download.http import Http
from ramctl.download.patience import FIRST_WAIT, Patience
from ramctl.weights import Entry, WantedFile
from ramctl.weights.store import PART_SUFFIX, Recorded, hash_problem

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d*/(\d+|\*)")


@dataclass(frozen=True)
class Expected:
    """What a file must be: its size in bytes and hashes, as far as they are known, and who says so."""

    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    commit: str | None = None
    vouched_by: str = ""

    @property
    def identity(self) -> str:
        """A name for the content, or "" when nothing is known of it."""
        return self.sha256 or self.git_sha1 or ""


@dataclass
class Transfer:
    """The fetching of one file.

    ``report(bytes_here, size)`` is called as bytes arrive, ``note`` with what the user should know meanwhile;
    ``stop`` ends it from another thread; ``first_wait`` is the first pause between attempts in seconds.
    """

    http: Http
    entry: Entry
    file: WantedFile
    url: str
    target: Path
    expected: Expected
    stop: threading.Event
    report: Callable[[int, int | None], None] = lambda here, size: None
    note: Callable[[str], None] = lambda text: None
    first_wait: float = FIRST_WAIT

    def __post_init__(self) -> None:
        self._part = self.target.with_name(self.target.name + PART_SUFFIX)
        self._label = self._part.with_name(self._part.name + ".json")
        self._size = self.expected.size
        self._digest = hashlib.sha256()
        self._fresh = True

    def run(self) -> Recorded:
        """Fetch, verify and put in place.

        Raises:
            DownloadError: it cannot be had, or what came is not what it should be.
            StoppedError: ``stop`` was set.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._receive_all()
            problem = self._problem()
            if problem and not self._fresh:
                # The first half may be of another time; one download from the start settles it.
                self.note(f"{self.entry.name}/{self.file.path}: {problem}; starting over")
                self._discard()
                self._receive_all()
                problem = self._problem()
            if problem:
                self._discard()
                raise DownloadError(
                    f"{self.url} gives a wrong {self.entry.name}/{self.file.path}: {problem}. Nothing of it was kept. "
                    "Run the same command again; if it stays so, the server or a proxy changes the file: try another "
                    "network or --mirror."
                )
            return self._put_in_place()
        except OSError as error:
            raise disk_error(error, self.target) from error

    # -- receiving --------------------------------------------------------------------------------------------------

    def _receive_all(self) -> None:
        """Attempt after attempt until all bytes are there."""
        furthest = have = self._take_up()
        patience = Patience(self.http, self.url, self.stop, self.note, self.first_wait)
        while not self._complete(have):
            if self.stop.is_set():
                raise StoppedError
            try:
                have = self._attempt(have)
                if not self._complete(have):
                    raise TransientError(f"the server sent {have} bytes and ended")
            except TransientError as error:
                have = self._bytes_here()
                if have > furthest:
                    furthest = have
                    patience.progressed()
                patience.failed(error, f" with {have} bytes{f' of {self._size}' if self._size else ''}")

    def _attempt(self, have: int) -> int:
        """One request; the number of bytes there are after it."""
        headers = {}
        if have:
            headers["Range"] = f"bytes={have}-"
            validator = self._read_label().get("etag")
            if validator:
                headers["If-Range"] = validator
        with self.http.get(self.url, self.entry, headers) as response:
            if response.status_code == 416:
                return self._nothing_left(response, have)
            self.http.check(response, self.entry, self.url)
            start = self._start_of(response, have)
            self._write_label(response)
            self._learn_size(response, start)
            return self._store(response, start)

    def _start_of(self, response: httpx.Response, have: int) -> int:
        """The byte at which a body starts: ours, or 0 when the server sends everything again."""
        if response.status_code == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
            if match is None or int(match[1]) != have:
                self._discard()
                raise TransientError("the server sent another range than was asked for")
            if match[2].isdigit():
                if self.expected.size not in (None, int(match[2])):
                    self._discard()
                    raise TransientError(f"the file there has {match[2]} bytes in place of {self.expected.size}")
                self._size = int(match[2])
            self._fresh = False
            return have
        if response.status_code != 200:
            raise DownloadError(f"{self.url} answers with status {response.status_code}, which is no file.")
        self._fresh, self._size = True, self.expected.size
        return 0

    def _learn_size(self, response: httpx.Response, start: int) -> None:
        """The size by the server's word, where nobody better has said it."""
        length = response.headers.get("content-length", "")
        plain = response.headers.get("content-encoding", "identity") == "identity"
        if self._size is None and length.isdigit() and plain:
            self._size = start + int(length)

    def _store(self, response: httpx.Response, start: int) -> int:
        """Append the body from byte ``start`` on."""
        plain = response.headers.get("content-encoding", "identity") == "identity"
        have = start
        if start == 0:
            self._digest = hashlib.sha256()
        with self._part.open("ab" if start else "wb") as stream:
            for chunk in response.iter_raw() if plain else response.iter_bytes():
                if self.stop.is_set():
                    raise StoppedError
                stream.write(chunk)
                self._digest.update(chunk)
                have += len(chunk)
                if self._size is not None and have > self._size and self.expected.size is not None:
                    break  # more than there can be; the check says so
                self.report(have, self._size)
        if self._size is None:
            self._size = have  # a body without a length that ended in good order
        return have

    def _nothing_left(self, response: httpx.Response, have: int) -> int:
        """The server has no byte after ours: either that is all, or our part is of another file."""
        total = response.headers.get("content-range", "").removeprefix("bytes */")
        if total.isdigit() and int(total) == have and self.expected.size in (None, have):
            self._size = have
            return have
        self._discard()
        raise TransientError("the part that was here does not fit the file there")

    def _complete(self, have: int) -> bool:
        return self._size is not None and have >= self._size

    # -- the part file ----------------------------------------------------------------------------------------------

    def _take_up(self) -> int:
        """Bytes of an earlier, broken download of this very content that can be used again; they are hashed."""
        have = self._bytes_here()
        label = self._read_label()
        same = (
            label.get("identity") == self.expected.identity
            if self.expected.identity
            else bool(label.get("etag")) and label.get("url") == self.url
        )
        if have and (not same or (self._size is not None and have > self._size)):
            self._discard()
            have = 0
        self._digest = hashlib.sha256()
        self._fresh = have == 0
        if have:
            with self._part.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    if self.stop.is_set():
                        raise StoppedError
                    self._digest.update(chunk)
            if self._size is None and label.get("size", "").isdigit():
                self._size = int(label["size"])
        self.report(have, self._size)
        return have

    def _bytes_here(self) -> int:
        return self._part.stat().st_size if self._part.is_file() else 0

    def _read_label(self) -> dict[str, str]:
        try:
            label = json.loads(self._label.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(k): str(v) for k, v in label.items()} if isinstance(label, dict) else {}

    def _write_label(self, response: httpx.Response) -> None:
        """Say what the part belongs to, before its first byte is written. Weak validators cannot be resumed with."""
        etag = response.headers.get("etag", "")
        length = response.headers.get("content-length", "") if response.status_code == 200 else ""
        label = self._read_label() if response.status_code == 206 else {}
        label |= {"identity": self.expected.identity, "url": self.url}
        if response.status_code == 200:
            label["etag"] = "" if etag.startswith("W/") else etag
            label["size"] = str(self.expected.size or length)
        self._label.write_text(json.dumps(label), encoding="utf-8")

    def _discard(self) -> None:
        for path in (self._part, self._label):
            path.unlink(missing_ok=True)
        self._digest = hashlib.sha256()
        self._size = self.expected.size

    # -- arrival ----------------------------------------------------------------------------------------------------

    def _problem(self) -> str:
        """What is wrong with the bytes that came, or ""."""
        size = self._bytes_here()
        if self.expected.size is not None and size != self.expected.size:
            return f"{size} bytes, expected {self.expected.size}"
        problem = hash_problem(self.file, self.expected.sha256, self._digest.hexdigest())
        if problem:
            return problem
        if self.expected.git_sha1 and not self.expected.sha256:
            found = git_blob_sha1(self._part)
            if found != self.expected.git_sha1:
                return f"git hash {found}, expected {self.expected.git_sha1}"
        return rows_problem(self.file, self._part)

    def _put_in_place(self) -> Recorded:
        with self._part.open("rb") as stream:
            os.fsync(stream.fileno())
        size, digest = self._bytes_here(), self._digest.hexdigest()
        self._part.replace(self.target)
        self._label.unlink(missing_ok=True)
        with contextlib.suppress(OSError), _opened_folder(self.target.parent) as folder:
            os.fsync(folder)
        return Recorded(size, digest, self.expected.commit, self.expected.vouched_by or "the first download")


def rows_problem(file: WantedFile, path: Path) -> str:
    """What is wrong with the number of prompts in a text or CSV file, or ""."""
    if file.rows is None and file.rows_at_least is None:
        return ""
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            if file.path.endswith(".csv"):
                rows = sum(1 for row in csv.reader(stream) if any(cell.strip() for cell in row)) - 1
            else:
                rows = sum(1 for line in stream if line.strip())
    except (UnicodeDecodeError, csv.Error) as error:
        return f"no text file of prompts ({error})"
    if file.rows is not None and rows != file.rows:
        return f"{rows} prompts, expected {file.rows}"
    if file.rows_at_least is not None and rows < file.rows_at_least:
        return f"{rows} prompts, expected {file.rows_at_least} or more"
    return ""


def git_blob_sha1(path: Path) -> str:
    """The hash under which git keeps a file: SHA-1 over a header with its size and its bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def disk_error(error: OSError, target: Path) -> DownloadError:
    """What a failure to write ``target`` means, and what to do about it."""
    if error.errno in _FULL:
        return DownloadError(
            f"The disk of {target.parent} is full. What came stays in {target.name}{PART_SUFFIX}: free some space and "
            "run the same command again, or choose another folder with --output."
        )
    reason = os.strerror(error.errno) if error.errno else str(error)
    return DownloadError(f"{target} cannot be written: {reason}. Choose another folder with --output.")


@contextlib.contextmanager
def _opened_folder(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
