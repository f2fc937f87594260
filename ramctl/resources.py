"""Where the files that travel with ramctl are: presets, prompt sets, the embedded model.

In a checkout they are the top-level folders; in an installed wheel they lie in ``ramctl/_data``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent

Kind = Literal["presets", "prompts", "models"]


def resource_dir(kind: Kind) -> Path:
    """The folder of the shipped ``kind``; a checkout's own folder comes before the installed copy."""
    checkout = _PACKAGE.parent / kind
    if (_PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    return _PACKAGE / "_data" / kind


def find_resource(path: str | Path, *, relative_to: Path | None = None) -> Path:
    """Resolve a path named in a preset: as given, else beside ``relative_to``, else among the shipped folders.

    ``prompts/geneval-tiny/train.jsonl`` and ``models/tinyworld`` therefore work from any working directory.
    The path is returned unresolved (as given) when nothing exists there, so that the caller can name it.
    """
    given = Path(path).expanduser()
    candidates = [given]
    if not given.is_absolute():
        if relative_to is not None:
            candidates.append(relative_to / given)
        if given.parts and given.parts[0] in ("presets", "prompts", "models"):
            kind: Kind = given.parts[0]  # type: ignore[assignment]
            candidates.append(resource_dir(kind).joinpath(*given.parts[1:]))
    return next((candidate for candidate in candidates if candidate.exists()), given)
