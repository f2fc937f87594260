"""One HTTP client for all servers: redirects, tokens, what a status means, what the hub says of a file."""

from __future__ import annotations

import contextlib
import email.utils
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from ramctl import __version__
from ramctl.download.errors import DownloadError, TransientError
from ramctl.errors import UsageError
from ramctl.weights import Entry, WantedFile
from ramctl.weights.manifest import check_relative
from ramctl.weights.store import command_for

DEFAULT_HUB = "https://huggingface.co"
#: The server may ask for a pause as long as this; for a longer one the command ends and says so.
LONGEST_WAIT = 300.0
_MOST_REDIRECTS = 10
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_SHA256 = re.compile("[0-9a-f]{64}")
_SHA1 = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class Remote:
    """What a server says of a file before it is fetched; None where it says nothing.

    ``size`` in bytes, ``sha256`` the hub's LFS hash, ``git_sha1`` the hash of git's blob for files kept in git itself,
    ``commit`` the repository's commit.
    """

    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None
    commit: str | None = None


def hub_address(mirror: str | None = None) -> str:
    """The hub's address without a final slash: ``mirror``, else ``HF_ENDPOINT``, else the hub itself.

    Raises:
        UsageError: it is no http or https URL.
    """
    address = (mirror or os.environ.get("HF_ENDPOINT") or DEFAULT_HUB).strip().rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"{address!r} is not the address of a mirror; give one such as https://hf-mirror.com.")
    return address


class Http:
    """The client; thread-safe, to be closed.

    ``timeout`` is the longest silence in seconds before a connection counts as cut.
    """

    def __init__(self, hub: str, *, timeout: float = 60.0, connect_timeout: float = 15.0) -> None:
        self.hub = hub
        self._token: str | None = None
        self._token_read = False
        self._token_refused = False
        self._unreachable: dict[str, str] = {}
        self._lock = threading.Lock()
        try:
            self._client = httpx.Client(
                timeout=httpx.Timeout(timeout, connect=connect_timeout),
                headers={"User-Agent": f"ramctl/{__version__}", "Accept-Encoding": "identity"},
                follow_redirects=False,
            )
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:  # a SOCKS proxy without socksio, …
            raise DownloadError(
                f"The network client cannot start: {_first_line(error)}. Check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY "
                "and SSL_CERT_FILE."
            ) from error

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    # -- the hub ----------------------------------------------------------------------------------------------------

    def file_url(self, entry: Entry, file: WantedFile, revision: str) -> str:
        """Where a file lies."""
        if file.url is not None:
            return file.url
        kind = "datasets/" if entry.kind == "dataset" else ""
        return f"{self.hub}/{kind}{entry.repo}/resolve/{quote(revision, safe='')}/{quote(file.source or file.path)}"

    def probe(self, entry: Entry, url: str) -> Remote:
        """Ask for a file's size and hash with HEAD.

        The hub answers for a large file with a redirect to its storage; the headers of that first answer count, and
        the storage, which often refuses HEAD, is not asked. Servers that cannot do HEAD give an empty answer.
        """
        with self._send("HEAD", url, entry, stop_at="x-linked-etag") as (response, seen):
            if response.status_code in (401, 403, 404, 410) and url.startswith(self.hub + "/"):
                raise self.refusal(response, entry, url)
            if response.status_code in _TRANSIENT:
                raise _transient(response)
            if response.status_code >= 400:
                return Remote()
            return _remote(seen)

    def list_files(self, entry: Entry, revision: str) -> list[tuple[WantedFile, Remote]]:
        """The files of a repository by the hub's own listing, with their sizes and hashes.

        Raises:
            DownloadError: the listing is refused or is none.
        """
        kind = "datasets" if entry.kind == "dataset" else "models"
        url = f"{self.hub}/api/{kind}/{entry.repo}/tree/{quote(revision, safe='')}?recursive=true"
        found: list[tuple[WantedFile, Remote]] = []
        while url:
            with self._send("GET", url, entry) as (response, _):
                self.check(response, entry, url)
                try:
                    response.read()
                    found += [_listed(row, url) for row in response.json() if row["type"] == "file"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DownloadError(f"{url} is no listing of a repository ({_first_line(error)}).") from error
                except httpx.HTTPError as error:
                    raise TransientError(_first_line(error)) from error
            following = response.links.get("next", {}).get("url", "")
            url = str(response.url.join(following)) if following else ""
        return found

    # -- requests ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def get(self, url: str, entry: Entry, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """A GET whose body is not read yet; the status is the caller's to judge."""
        with self._send("GET", url, entry, headers) as (response, _):
            yield response

    def check(self, response: httpx.Response, entry: Entry, url: str) -> None:
        """Raise what a status above 399 means.

        Raises:
            TransientError: another attempt may help.
            DownloadError: it would not.
        """
        if response.status_code in _TRANSIENT or response.status_code >= 500:
            raise _transient(response)
        if response.status_code >= 400:
            raise self.refusal(response, entry, url)

    @contextlib.contextmanager
    def _send(
        self, method: str, url: str, entry: Entry, headers: dict[str, str] | None = None, *, stop_at: str = ""
    ) -> Iterator[tuple[httpx.Response, dict[str, str]]]:
        """Send, follow redirects; yields the last response and all headers seen, those of earlier hops first.

        httpx drops the Authorization header itself on the way to another origin.
        """
        token = self._token_for(url, entry)
        all_headers = {**(headers or {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        host = urlsplit(url).netloc
        if host in self._unreachable:
            raise DownloadError(self._unreachable[host])
        response: httpx.Response | None = None
        seen: dict[str, str] = {}
        try:
            request = self._client.build_request(method, url, headers=all_headers)
            for _ in range(_MOST_REDIRECTS + 1):
                response = self._client.send(request, stream=True)
                seen = {**response.headers, **{k: v for k, v in seen.items() if k.startswith("x-")}}
                if response.next_request is None or (stop_at and stop_at in seen):
                    break
                request = _checked_redirect(response.next_request, url)
                response.close()
            else:
                raise DownloadError(f"{url} redirects more than {_MOST_REDIRECTS} times.")
            if response.status_code == 401 and token and not entry.gated:
                # The hub refuses a stale token even for what everybody may read.
                self._token_refused = True
                raise TransientError("the server refuses the token; trying without it", 0)
            yield response, seen
        except httpx.ConnectError as error:
            raise self._no_connection(error, host) from error
        except (httpx.TimeoutException, httpx.NetworkError, httpx.ProtocolError, httpx.ProxyError) as error:
            raise TransientError(_first_line(error) or type(error).__name__) from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise DownloadError(f"{url} cannot be fetched: {_first_line(error)}.") from error
        finally:
            if response is not None:
                response.close()

    def unreachable(self, host: str, message: str) -> str:
        """Remember that a server cannot be reached, so that the next files do not try again; the message."""
        self._unreachable[host] = message
        return message

    def _no_connection(self, error: httpx.ConnectError, host: str) -> Exception:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return DownloadError(
                    f"The certificate of {host} is not trusted ({cause.verify_message}). Behind a proxy that "
                    "replaces certificates, set SSL_CERT_FILE to a file with its authority."
                )
            cause = cause.__cause__ or cause.__context__
        return TransientError(_first_line(error) or "no connection")

    def _token_for(self, url: str, entry: Entry) -> str | None:
        """The hub's token, for requests to the hub only; a mirror gets it for gated repositories alone."""
        if entry.repo is None or not url.startswith(self.hub + "/") or self._token_refused:
            return None
        if self.hub != DEFAULT_HUB and not entry.gated:
            return None
        with self._lock:
            if not self._token_read:
                from huggingface_hub import get_token

                self._token, self._token_read = get_token(), True
        if self._token is None or (self._token.isascii() and self._token.isprintable()):
            return self._token
        if entry.gated:
            raise DownloadError(
                f"{entry.name} is gated, and the token here (HF_TOKEN, or that of `hf auth login`) is none: it holds "
                "characters no token has. Make one at https://huggingface.co/settings/tokens, then: "
                "export HF_TOKEN=hf_..."
            )
        return None  # what everybody may read is there without it

    # -- what a refusal means ---------------------------------------------------------------------------------------

    def refusal(self, response: httpx.Response, entry: Entry, url: str) -> DownloadError:
        """The message for a status that no second attempt will change."""
        status = response.status_code
        if status in (401, 403) and entry.gated:
            return DownloadError(self._gated(entry, status))
        if status == 404 or status == 410:
            where = "The mirror does not have it" if self.hub != DEFAULT_HUB and entry.repo else "It may have moved"
            return DownloadError(f"{url} does not exist ({status}). {where}; see {entry.page}.")
        reason = response.headers.get("x-error-message") or response.reason_phrase or "no reason given"
        advice = " A token may be needed: set HF_TOKEN." if status in (401, 403) and entry.repo else ""
        return DownloadError(f"{url} is refused ({status}: {reason[:200]}).{advice}")

    def _gated(self, entry: Entry, status: int) -> str:
        if self._token is None:
            return (
                f"{entry.name} is gated ({status}): log in at {entry.page} and accept its licence, make a token at "
                f"https://huggingface.co/settings/tokens, then:\n"
                f"  export HF_TOKEN=…   # or: hf auth login\n  {command_for(entry.name)}"
            )
        return (
            f"{entry.name} is gated, and your token has no access ({status}): accept the licence at {entry.page} with "
            "the token's account; a fine-grained token needs the right to read public gated repositories.\n"
            f"Then: {command_for(entry.name)}"
        )


def _checked_redirect(request: httpx.Request, origin: str) -> httpx.Request:
    if request.url.scheme not in ("http", "https") or (origin.startswith("https:") and request.url.scheme == "http"):
        raise DownloadError(f"{origin} redirects to {request.url}, which is not encrypted; refused.")
    return request


def _remote(headers: dict[str, str]) -> Remote:
    linked = _unquoted(headers.get("x-linked-etag", ""))
    commit = headers.get("x-repo-commit")
    # Only the hub's own ETag is a hash of the content, and only the hub names its commit.
    etag = linked or (_unquoted(headers.get("etag", "")) if commit else "")
    size = headers.get("x-linked-size") or (headers.get("content-length", "") if commit and not linked else "")
    return Remote(
        size=int(size) if size.isdigit() else None,
        sha256=etag if _SHA256.fullmatch(etag) else None,
        git_sha1=etag if _SHA1.fullmatch(etag) else None,
        commit=commit if commit and _SHA1.fullmatch(commit) else None,
    )


def _listed(row: dict[str, Any], url: str) -> tuple[WantedFile, Remote]:
    path, size = str(row["path"]), int(row["size"])
    check_relative(path, f"The listing {url}")
    large = row.get("lfs")
    if large:
        return WantedFile(path, size=size), Remote(size, sha256=str(large["oid"]).removeprefix("sha256:"))
    return WantedFile(path, size=size), Remote(size, git_sha1=str(row["oid"]))


def _unquoted(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _transient(response: httpx.Response) -> TransientError:
    reason = f"status {response.status_code} {response.reason_phrase}".strip()
    wait = _retry_after(response.headers.get("retry-after", ""))
    if wait is not None and wait > LONGEST_WAIT:
        raise DownloadError(
            f"{response.url.host} asks to wait {wait:.0f} s ({reason}). Run the same command later; it resumes."
        )
    return TransientError(reason, wait)


def _retry_after(value: str) -> float | None:
    """Seconds, from a number or a date."""
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
