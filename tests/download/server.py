"""A server on this machine that behaves like the hub and its storage, or misbehaves as told."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass(frozen=True)
class Act:
    """What a server does to one GET.

    ``cut`` closes the connection after so many bytes of the body, ``claim`` is added to the true Content-Length,
    ``body`` is sent in place of the file, ``status`` in place of 200. ``ranges`` off ignores the Range header,
    ``from_start`` answers it with a part that begins at 0, ``length`` off sends no Content-Length. ``trickle`` seconds
    pass after every 4 KiB, ``pause`` seconds after the body.
    """

    cut: int | None = None
    claim: int = 0
    body: bytes | None = None
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    ranges: bool = True
    length: bool = True
    from_start: bool = False
    trickle: float = 0.0


GOOD = Act()


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what these tests are about."""


class Server:
    """``files`` by path; ``script`` holds what happens to the next GETs of a path, ``always`` what happens after."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.head: dict[str, dict[str, str]] = {}
        self.moved: dict[str, str] = {}
        self.etags: dict[str, str] = {}
        self.script: dict[str, list[Act]] = defaultdict(list)
        self.always: dict[str, Act] = {}
        self.head_status: dict[str, int] = {}
        self.token: str | None = None
        self.refuses_tokens = False
        self.seen: list[Seen] = []
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def gets(self, path: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == "GET" and seen.path == path]

    def paths(self) -> list[str]:
        return [seen.path for seen in self.seen]


@dataclass
class Hub:
    """A hub of two servers: the front and the storage of large files."""

    front: Server
    storage: Server

    @property
    def url(self) -> str:
        return self.front.url

    def add(
        self, repo: str, path: str, data: bytes, *, large: bool = True, revision: str = "main", kind: str = ""
    ) -> str:
        """Serve a file of a repository as the hub does; the path to script: the storage's or the front's."""
        if revision == "main":
            at_commit = self.add(repo, path, data, large=large, revision=COMMIT, kind=kind)
        front_path = f"/{kind}{repo}/resolve/{revision}/{path}"
        if not large:
            self.front.files[front_path] = data
            self.front.head[front_path] = {"X-Repo-Commit": COMMIT}
            self.front.etags[front_path] = git_sha1(data)
            return at_commit if revision == "main" else front_path
        digest = hashlib.sha256(data).hexdigest()
        stored = f"/store/{digest}"
        self.storage.files[stored] = data
        self.storage.etags[stored] = digest[:32]
        self.front.moved[front_path] = self.storage.url + stored
        self.front.head[front_path] = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{digest}"',
        }
        return stored


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


@contextmanager
def hub_serving() -> Iterator[Hub]:
    with serving() as front, serving() as storage:
        yield Hub(front, storage)


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            path = self._note()
            if path in server.head_status:
                self._answer(server.head_status[path], {}, b"")
            elif not self._stopped(path):
                self._answer(200, self._headers(path), server.files[path], body_sent=False)

        def do_GET(self) -> None:
            path = self._note()
            waiting = server.script[path]
            act = waiting.pop(0) if waiting else server.always.get(path, GOOD)
            if act.status is not None:
                self._answer(act.status, act.headers, b"no")
            elif not self._stopped(path):
                self._file(path, act)

        def _note(self) -> str:
            # A request through a proxy names the whole address.
            path = (
                self.path.partition("://")[2].partition("/")[2] if "://" in self.path else self.path.removeprefix("/")
            )
            path = "/" + path
            server.seen.append(Seen(self.command, path, {k.lower(): v for k, v in self.headers.items()}))
            return path

        def _stopped(self, path: str) -> bool:
            """Answers what is not a file: a missing token, a redirect, a missing file."""
            given = self.headers.get("Authorization")
            if server.refuses_tokens and given is not None:
                self._answer(401, {}, b"this token is not valid")
            elif server.token is not None and given != f"Bearer {server.token}":
                self._answer(401 if given is None else 403, {}, b"who are you")
            elif path in server.moved:
                self._answer(302, {**server.head.get(path, {}), "Location": server.moved[path]}, b"")
            elif path not in server.files:
                self._answer(404, {}, b"nothing here")
            else:
                return False
            return True

        def _headers(self, path: str) -> dict[str, str]:
            etag = {"ETag": f'"{server.etags[path]}"'} if path in server.etags else {}
            return {**server.head.get(path, {}), **etag, "Accept-Ranges": "bytes"}

        def _file(self, path: str, act: Act) -> None:
            data = server.files[path] if act.body is None else act.body
            headers, status, start = self._headers(path), 200, 0
            asked = self.headers.get("Range", "")
            same = self.headers.get("If-Range", headers.get("ETag")) == headers.get("ETag")
            if act.ranges and asked.startswith("bytes=") and same:
                start = 0 if act.from_start else int(asked[6:].split("-")[0])
                if start >= len(data):
                    self._answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
                    return
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                status = 206
            self._answer(status, {**headers, **act.headers}, data[start:], act=act)

        def _answer(
            self, status: int, headers: dict[str, str], data: bytes, *, body_sent: bool = True, act: Act = GOOD
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            if act.length:
                self.send_header("Content-Length", str(len(data) + act.claim))
            else:
                self.close_connection = True
            self.end_headers()
            if not body_sent or self.command == "HEAD":
                return
            sent = data if act.cut is None else data[: act.cut]
            if act.claim < 0:
                sent = sent[: len(data) + act.claim]
            try:
                for at in range(0, len(sent), 4096):
                    self.wfile.write(sent[at : at + 4096])
                    if act.trickle:
                        time.sleep(act.trickle)
                self.wfile.flush()
                time.sleep(act.pause)
            except OSError:
                pass  # the client has gone
            if act.cut is not None or act.claim:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
