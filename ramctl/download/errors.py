"""What can go wrong while fetching, as the user reads it and as the retry loop sees it."""

from __future__ import annotations

from ramctl.errors import RamctlError


class DownloadError(RamctlError):
    """A file could not be fetched or is not what it should be; another attempt now would not help."""


class TransientError(Exception):
    """A failure that another attempt may not meet; ``wait`` is the server's wish in seconds, None if it has none."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class StoppedError(Exception):
    """The user interrupted; raised in the threads that fetch."""
