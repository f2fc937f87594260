"""Weights and data that are downloaded, not shipped: what there is (the manifest) and where it lies (the store).

Nothing here touches the network; :mod:`ramctl.download` does. Nothing heavy is imported.
"""

from ramctl.weights.manifest import (
    FORMAT_KEYS,
    MANIFEST_VARIABLE,
    Entry,
    WantedFile,
    entry_of_repository,
    find_entry,
    load_manifest,
)
from ramctl.weights.store import (
    OTHER_VARIABLE,
    ROOT_VARIABLE,
    FileState,
    Missing,
    command_for,
    condition_of,
    entry_folder,
    fingerprint,
    local_repository,
    missing_for,
    states,
    weight_file,
    weight_folder,
    weights_root,
)

__all__ = [
    "FORMAT_KEYS",
    "MANIFEST_VARIABLE",
    "OTHER_VARIABLE",
    "ROOT_VARIABLE",
    "Entry",
    "FileState",
    "Missing",
    "WantedFile",
    "command_for",
    "condition_of",
    "entry_folder",
    "entry_of_repository",
    "find_entry",
    "fingerprint",
    "load_manifest",
    "local_repository",
    "missing_for",
    "states",
    "weight_file",
    "weight_folder",
    "weights_root",
]
