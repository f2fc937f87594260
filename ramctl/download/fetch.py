"""Entries of the manifest from their servers into the store."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from filelock import FileLock, Timeout

from ramctl.download.errors import DownloadError, StoppedError, TransientError
from ramctl.download.http import Http, Remote, hub_address
from ramctl.download.needs import Need
from ramctl.download.patience import FIRST_WAIT, Patience
from ramctl.download.transfer import Expected, Transfer, disk_error, git_blob_sha1, rows_problem
from ramctl.errors import RamctlError
from ramctl.weights import Entry, WantedFile, entry_folder, states, weights_root
from ramctl.weights.store import (
    PART_SUFFIX,
    Record,
    Recorded,
    expected_files,
    file_sha256,
    hash_problem,
    read_record,
    remember_sha256,
    write_record,
)

LOCK_FILE = ".ramctl.lock"
_COMMIT = re.compile("[0-9a-f]{40}")
#: How long to wait, after an interrupt, for the threads that fetch to let go of their files; in seconds.
_GRACE = 2.0


@dataclass(frozen=True)
class Options:
    """How to fetch.

    ``root`` is the store (None: the usual one), ``mirror`` an address in place of the hub's, ``jobs`` the number of
    files at once, ``timeout`` the longest silence of a server in seconds, ``first_wait`` the first pause between
    attempts in seconds.
    """

    root: Path | None = None
    mirror: str | None = None
    jobs: int = 4
    timeout: float = 60.0
    first_wait: float = FIRST_WAIT

    def folder(self, entry: Entry) -> Path:
        """Where an entry's files go."""
        return entry_folder(entry.name, self.root)


@dataclass(frozen=True)
class Outcome:
    """What became of an entry: the files that came, their bytes, and the error that ended it, if one did."""

    need: Need
    fetched: tuple[str, ...] = ()
    bytes_fetched: int = 0
    error: RamctlError | None = None


class Progress(Protocol):
    """Who is told; called from several threads."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def moved(self, name: str, here: int, total: int | None) -> None:
        """``here`` of ``total`` bytes of the file ``name`` (ENTRY/PATH) are on the disk."""

    def ended(self, name: str) -> None:
        """The file is complete, or was given up."""


class Silent:
    """Tells nobody."""

    def note(self, text: str) -> None:
        """Nothing."""

    def moved(self, name: str, here: int, total: int | None) -> None:
        """Nothing."""

    def ended(self, name: str) -> None:
        """Nothing."""


def fetch_all(needs: Sequence[Need], options: Options, progress: Progress | None = None) -> list[Outcome]:
    """Fetch what is not there yet, entry after entry; one that fails does not keep the others from coming.

    Files that are there are checked against the hashes that are known of them and fetched again when they are wrong.
    Another process that fetches the same entry is waited for.

    Raises:
        DownloadError: the disk has too little room for all of it.
        UsageError: the mirror is no address.
    """
    told = progress or Silent()
    address = hub_address(options.mirror)
    _check_space(options, sum(estimate(need, options) for need in needs))
    stop = threading.Event()
    outcomes = []
    http = Http(address, timeout=options.timeout)
    try:
        for need in needs:
            try:
                outcomes.append(_Fetch(need, options, http, told, stop).run())
            except RamctlError as error:
                outcomes.append(Outcome(need, error=error))
            except OSError as error:  # the records beside the files could not be written
                outcomes.append(Outcome(need, error=disk_error(error, options.folder(need.entry))))
    finally:
        stop.set()
        http.close()
    return outcomes


def estimate(need: Need, options: Options) -> int:
    """About how many bytes of a need are still to come, without asking a server."""
    if _unlisted(need, options):
        return need.entry.bytes_about()
    return sum(max(0, file.bytes_about - begun) for file, begun in _absent(need, options))


def plan_sizes(needs: Sequence[Need], options: Options, *, ask: bool = True) -> list[tuple[Need, int, bool]]:
    """Bytes still to fetch of each need, and whether that is exact.

    Servers are asked for sizes that the manifest does not have; where one does not answer, and without ``ask``,
    estimates stand.
    """
    http = Http(hub_address(options.mirror), timeout=10.0, connect_timeout=5.0)
    plan = []
    try:
        asking = ask
        for need in needs:
            total, exact = 0, True
            for file, begun in _absent(need, options):
                size = file.size
                if size is None and asking and not need.entry.list_from_hub:
                    size, asking = _asked_size(http, need.entry, file)
                exact = exact and size is not None
                total += max(0, (size or file.bytes_about) - begun)
            if _unlisted(need, options):
                total, exact = estimate(need, options), False
            plan.append((need, total, exact))
    finally:
        http.close()
    return plan


def space_at(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not exist yet."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def _asked_size(http: Http, entry: Entry, file: WantedFile) -> tuple[int | None, bool]:
    """A file's size by its server, and whether it is worth asking on."""
    try:
        return http.probe(entry, http.file_url(entry, file, entry.revision)).size, True
    except TransientError:
        return None, False
    except DownloadError:
        return None, True


def _unlisted(need: Need, options: Options) -> bool:
    """Whether the hub has not said yet which files there are, and they are not there by hand."""
    if not need.entry.list_from_hub or read_record(options.folder(need.entry)).listing:
        return False
    return any(True for _ in _absent(need, options))


def _absent(need: Need, options: Options) -> Iterator[tuple[WantedFile, int]]:
    """The files that are not there, or damaged, with the bytes of them that an earlier attempt left."""
    for state in states(need.entry, need.parts, root=options.root):
        if state.condition != "present":
            yield state.file, state.bytes_here if state.condition == "partial" else 0


def _check_space(options: Options, needed: int) -> None:
    root = options.root or weights_root()
    free = space_at(root)
    if needed > free:
        raise DownloadError(
            f"The disk of {root} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are still to come. "
            "Free some, name less, or choose another folder with --output."
        )


class _Fetch:
    """The fetching of one entry."""

    def __init__(self, need: Need, options: Options, http: Http, progress: Progress, stop: threading.Event) -> None:
        self._need, self._options, self._http, self._progress, self._stop = need, options, http, progress, stop
        self._entry = need.entry
        self._folder = options.folder(need.entry)
        self._remotes: dict[str, Remote] = {}
        self._record = Record()
        self._record_lock = threading.Lock()

    def run(self) -> Outcome:
        """Bring the entry's files.

        Raises:
            RamctlError: a file cannot be had; those that came before stay.
        """
        if self._nothing_to_do():
            return Outcome(self._need)
        with self._locked():
            self._record = read_record(self._folder)
            if self._entry.list_from_hub and not self._record.listing:
                self._list()
            missing = [file for file in self._wanted() if not self._is_good(file)]
            if not missing:
                return Outcome(self._need)
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
                raise DownloadError(
                    f"{self._entry.name}/{missing[0].path} is not there, and HF_HUB_OFFLINE forbids to fetch it."
                )
            transfers = self._transfers(missing)
            _check_space(self._options, sum(self._still_to_come(transfer) for transfer in transfers))
            fetched = self._run_all(transfers)
        return Outcome(self._need, tuple(fetched), sum(fetched.values()))

    def _nothing_to_do(self) -> bool:
        """Whether all is there and good; found without the lock, so that a store that is only read suffices."""
        self._record = read_record(self._folder)
        if self._entry.list_from_hub and not self._record.listing:
            return False
        paths = [(file, self._folder / file.path) for file in self._wanted()]
        return all(path.is_file() for _, path in paths) and not any(self._problem_of(*pair) for pair in paths)

    def _wanted(self) -> list[WantedFile]:
        return expected_files(self._entry, self._record, self._need.parts)

    # -- before anything is fetched ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the entry's folder; another process that holds it is waited for."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._folder / LOCK_FILE)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self._progress.note(f"Another process is fetching {self._entry.name}; waiting for it.")
                lock.acquire()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise DownloadError(
                f"{self._folder} cannot be written: {reason}. Choose another folder with --output."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _list(self) -> None:
        """Take the hub's list of the repository's files, and keep it: it says when the entry is complete."""
        entry = self._entry
        url = self._http.file_url(entry, entry.files[0], self._revision())
        patience = self._patience(url)
        self._pin(patience.insist(lambda: self._http.probe(entry, url)))
        for file, remote in patience.insist(lambda: self._http.list_files(entry, self._revision())):
            if not any(fnmatch.fnmatch(file.path, pattern) for pattern in entry.exclude):
                self._remotes[file.path] = remote
        if not self._remotes:
            raise DownloadError(f"The hub lists no file of {entry.repo}; see {entry.page}.")
        self._record = replace(self._record, listing={path: remote.size or 0 for path, remote in self._remotes.items()})
        write_record(self._folder, self._record)

    def _revision(self) -> str:
        """The commit where one is known, else the branch."""
        return self._record.commit or self._entry.revision

    def _pin(self, remote: Remote) -> None:
        """Take every further file from the commit that the first one is of."""
        if remote.commit and not _COMMIT.fullmatch(self._revision()):
            self._record = replace(self._record, commit=remote.commit)
            write_record(self._folder, self._record)

    def _is_good(self, file: WantedFile) -> bool:
        """Whether a file is there and is what it should be, as far as that is known."""
        path = self._folder / file.path
        if not path.is_file():
            return False
        problem = self._problem_of(file, path)
        if problem:
            self._progress.note(f"{self._entry.name}/{file.path} is damaged ({problem}); fetching it again")
        return not problem

    def _problem_of(self, file: WantedFile, path: Path) -> str:
        recorded, remote = self._record.files.get(file.path), self._remotes.get(file.path, Remote())
        size = file.size or (recorded.size if recorded else None)
        if size is not None and path.stat().st_size != size:
            return f"{path.stat().st_size} bytes in place of {size}"
        pinned = recorded.sha256 if recorded else remote.sha256
        if file.sha256 or file.sha256_starts or pinned:
            return hash_problem(file, pinned, file_sha256(path, self._folder))
        if remote.git_sha1 and git_blob_sha1(path) != remote.git_sha1:
            return "not the file of the repository"
        return rows_problem(file, path)

    # -- what each file must be -------------------------------------------------------------------------------------

    def _transfers(self, files: Sequence[WantedFile]) -> list[Transfer]:
        """One transfer per file; all of them from one commit of the repository."""
        transfers = []
        for file in files:
            remote = self._remote(file)
            self._pin(remote)
            url = self._http.file_url(self._entry, file, self._revision())
            transfers.append(self._transfer(file, url, self._expected(file, url, remote)))
        return transfers

    def _remote(self, file: WantedFile) -> Remote:
        known = self._remotes.get(file.path)
        if known is not None or file.url is not None:
            return known or Remote()
        url = self._http.file_url(self._entry, file, self._revision())
        return self._patience(url).insist(lambda: self._http.probe(self._entry, url))

    def _expected(self, file: WantedFile, url: str, remote: Remote) -> Expected:
        """The manifest's word first, then that of an earlier download, then the hub's."""
        recorded = self._record.files.get(file.path)
        pinned = file.sha256 or (recorded.sha256 if recorded else None)
        if pinned and remote.sha256 and pinned != remote.sha256:
            raise DownloadError(
                f"{url} is not the expected file: the hub has SHA-256 {remote.sha256}, expected {pinned} "
                f"({'the manifest' if file.sha256 else 'an earlier download'}). Nothing was fetched; see "
                f"{self._entry.page}."
            )
        if file.sha256 or file.sha256_starts:
            vouched_by = "manifest"
        elif remote.sha256 or remote.git_sha1:
            vouched_by = "hub"
        else:
            vouched_by = recorded.vouched_by if recorded else ""
        return Expected(
            size=file.size or remote.size or (recorded.size if recorded else None),
            sha256=pinned or remote.sha256,
            git_sha1=remote.git_sha1,
            commit=self._revision() if self._entry.repo and _COMMIT.fullmatch(self._revision()) else None,
            vouched_by=vouched_by,
        )

    def _transfer(self, file: WantedFile, url: str, expected: Expected) -> Transfer:
        name = f"{self._entry.name}/{file.path}"
        return Transfer(
            http=self._http,
            entry=self._entry,
            file=file,
            url=url,
            target=self._folder / file.path,
            expected=expected,
            stop=self._stop,
            report=lambda here, total: self._progress.moved(name, here, total or file.about_bytes),
            note=self._progress.note,
            first_wait=self._options.first_wait,
        )

    def _still_to_come(self, transfer: Transfer) -> int:
        part = transfer.target.with_name(transfer.target.name + PART_SUFFIX)
        begun = part.stat().st_size if part.is_file() else 0
        return max(0, (transfer.expected.size or transfer.file.bytes_about) - begun)

    # -- fetching ---------------------------------------------------------------------------------------------------

    def _run_all(self, transfers: Sequence[Transfer]) -> dict[str, int]:
        """Run the transfers, several at once, the largest first; path → bytes of those that came."""
        waiting: SimpleQueue[Transfer] = SimpleQueue()
        for transfer in sorted(transfers, key=lambda one: -self._still_to_come(one)):
            waiting.put(transfer)
        fetched: dict[str, int] = {}
        errors: list[Exception] = []

        def work() -> None:
            with contextlib.suppress(Empty):
                while not errors and not self._stop.is_set():
                    transfer = waiting.get_nowait()
                    try:
                        fetched[transfer.file.path] = self._keep(transfer, transfer.run())
                    except StoppedError:
                        return
                    except Exception as error:  # raised again in the main thread
                        errors.append(error)
                    finally:
                        self._progress.ended(f"{self._entry.name}/{transfer.file.path}")

        _in_threads(work, min(max(1, self._options.jobs), len(transfers)), self._stop)
        if errors:
            raise errors[0]
        return fetched

    def _keep(self, transfer: Transfer, received: Recorded) -> int:
        """Write down what came."""
        path = transfer.file.path
        with self._record_lock:
            self._record = replace(self._record, files={**self._record.files, path: received})
            write_record(self._folder, self._record)
        remember_sha256(transfer.target, self._folder, received.sha256)
        if not transfer.expected.vouched_by:
            self._progress.note(
                f"{self._entry.name}/{path}: nobody publishes its hash; SHA-256 {received.sha256} is recorded"
            )
        return received.size

    def _patience(self, url: str) -> Patience:
        return Patience(self._http, url, self._stop, self._progress.note, self._options.first_wait)


def _in_threads(work: Callable[[], None], count: int, stop: threading.Event) -> None:
    """Run ``work`` in threads until all are done.

    They are daemons: after an interrupt, one that hangs in a silent connection does not hold the command up.
    """
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except BaseException:
        stop.set()
        deadline = time.monotonic() + _GRACE
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        raise
