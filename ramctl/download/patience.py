"""When to try again, when to give up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import httpx

from ramctl.download.errors import DownloadError, StoppedError, TransientError
from ramctl.download.http import Http

#: Attempts in a row without progress before a request is given up.
ATTEMPTS = 6
#: The same for a server that cannot be connected to at all.
CONNECT_ATTEMPTS = 3
FIRST_WAIT = 1.0
_LONGEST_BACKOFF = 30.0
#: A pause as long as this is announced, in seconds.
_WORTH_SAYING = 5.0

T = TypeVar("T")


class Patience:
    """Counts the failures of one request and pauses between attempts, twice as long each time."""

    def __init__(
        self,
        http: Http,
        url: str,
        stop: threading.Event,
        note: Callable[[str], None],
        first_wait: float = FIRST_WAIT,
    ) -> None:
        self._http, self._url, self._stop, self._note, self._first_wait = http, url, stop, note, first_wait
        self._failures = self._unconnected = 0

    def progressed(self) -> None:
        """The last attempt brought something new: the count starts again."""
        self._failures = 0

    def failed(self, error: TransientError, so_far: str = "") -> None:
        """Count a failure, then wait as long as the server wishes or the backoff says.

        Raises:
            DownloadError: the last attempt was made.
            StoppedError: the user interrupted the pause.
        """
        self._failures += 1
        no_connection = isinstance(error.__cause__, (httpx.ConnectError, httpx.ConnectTimeout))
        self._unconnected = self._unconnected + 1 if no_connection else 0
        if self._unconnected >= CONNECT_ATTEMPTS:
            host = urlsplit(self._url).netloc
            another = "; --mirror URL names another hub" if self._url.startswith(self._http.hub) else ""
            advice = f"Check the network and HTTPS_PROXY{another}."
            raise DownloadError(
                self._http.unreachable(host, f"{host} cannot be reached ({error}). {advice}")
            ) from error
        if self._failures >= ATTEMPTS:
            raise DownloadError(
                f"{self._url}: {error}; given up after {self._failures} attempts{so_far}. "
                "Run the same command again; it resumes."
            ) from error
        wait = error.wait
        if wait is None:
            wait = min(self._first_wait * 2 ** (self._failures - 1), _LONGEST_BACKOFF)
        if wait >= _WORTH_SAYING:
            self._note(f"{self._url.rsplit('/', 1)[-1]}: {error}; next attempt in {wait:.0f} s")
        if self._stop.wait(wait):
            raise StoppedError

    def insist(self, request: Callable[[], T]) -> T:
        """The result of a request, attempted as often as it takes."""
        while True:
            try:
                return request()
            except TransientError as error:
                self.failed(error)
