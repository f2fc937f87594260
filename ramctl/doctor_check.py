"""One finding of ``ramctl doctor``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, how it is, the facts, and what to do when it is not well."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


CheckFunction = Callable[[], Check]


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
