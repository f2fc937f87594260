"""Where the files that travel with ramctl are (presets, prompt sets, the embedded model), and those it downloads.

In a checkout they are the top-level folders; in an installed wheel they lie in ``ramctl/_data``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parent

Kind = Literal["presets", "prompts", "models"]

#: First part of a path below the store of downloaded files.
DOWNLOADED = "weights"


def resource_dir(kind: Kind) -> Path:
    """The folder of the shipped ``kind``; a checkout's own folder comes before the installed copy."""
    checkout = _PACKAGE.parent / kind
    if (_PACKAGE.parent / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    return _PACKAGE / "_data" / kind


def find_resource(path: str | Path, *, relative_to: Path | None = None) -> Path:
    """Resolve a path named in a preset: as given, else beside ``relative_to``, else among the shipped folders.

    ``prompts/geneval-tiny/train.jsonl`` and ``models/tinyworld`` therefore work from any working directory, and
    ``weights/pickapic/train.txt`` is what ``ramctl download-weights pickapic`` has fetched, wherever that lies.
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
        if given.parts and given.parts[0] == DOWNLOADED:
            from ramctl.weights import weights_root

            candidates.append(weights_root().joinpath(*given.parts[1:]))
    return next((candidate for candidate in candidates if candidate.exists()), given)


def find_model(path: str, *, with_t5: bool | None = None) -> Path:
    """Where a model named in a preset lies: a folder, or what ``ramctl download-weights`` has fetched of that hub id.

    The path is returned as given when neither is there.

    Args:
        with_t5: what is about to be loaded: all of it, or all but its T5. A download must then have the SHA-256 that
            the manifest or the record of its arrival has of each file. None: nothing is, only its folder is asked for.

    Raises:
        MissingDependencyError: the download is there in part, or its files are others (or it lacks its T5 and
            ``with_t5`` asks for it); fetching all of it from the hub instead, without a word, would surprise.
    """
    from ramctl.weights import entry_folder, entry_of_repository, weight_folder

    folder = find_resource(path)
    if folder.exists():
        return folder
    entry = entry_of_repository(path)
    if entry is None or not any(entry_folder(entry.name).glob("[!.]*")):
        return folder
    return weight_folder(entry.name, ("t5",) if with_t5 and "t5" in entry.parts else (), verify=with_t5 is not None)


def download_command(path: str) -> str | None:
    """The command that fetches a hub model into the store, where the manifest knows that model."""
    from ramctl.weights import entry_of_repository

    entry = entry_of_repository(path)
    return None if entry is None else f"ramctl download-weights {entry.name}"
