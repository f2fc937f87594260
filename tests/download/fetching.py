"""Fetching in tests: one entry with one large file, short pauses, a listener."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from ramctl.download import Options, Outcome, Silent, fetch_all, resolve
from ramctl.weights import weight_file, weights_root

DATA = bytes(range(256)) * 1200  # 307,200 bytes
DIGEST = hashlib.sha256(DATA).hexdigest()

ENTRY = """
[big]
about = "one large file"
licence = "MIT"
page = "https://example.org/big"
repo = "team/big"
files = [{ path = "big.bin"%s }]
"""

Write = Callable[[str], Path]


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.last: tuple[str, int, int | None] | None = None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def moved(self, name: str, here: int, total: int | None) -> None:
        self.last = (name, here, total)


def fetch(
    hub: str, *names: str, listener: Listener | None = None, jobs: int = 4, timeout: float = 5.0
) -> list[Outcome]:
    options = Options(mirror=hub, first_wait=0.01, jobs=jobs, timeout=timeout)
    return fetch_all(resolve(names), options, listener)


def succeed(hub: str, *names: str, listener: Listener | None = None) -> list[Outcome]:
    outcomes = fetch(hub, *names, listener=listener)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return outcomes


def fail(hub: str, name: str, listener: Listener | None = None, **how: float) -> str:
    (outcome,) = fetch(hub, name, listener=listener, **how)
    assert outcome.error is not None
    return str(outcome.error)


def here(name: str = "big", file: str = "big.bin") -> bytes:
    return weight_file(name, file).read_bytes()


def nothing_kept(name: str = "big") -> bool:
    folder = weights_root() / name
    return not [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".ramctl")]
