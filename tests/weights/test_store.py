"""Where files are looked for, what is said when they are not there, and what is known of those that are."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ramctl.errors import MissingDependencyError, UsageError
from ramctl.weights import (
    ROOT_VARIABLE,
    Missing,
    condition_of,
    find_entry,
    fingerprint,
    local_repository,
    missing_for,
    states,
    store,
    weight_file,
    weight_folder,
    weights_root,
)
from ramctl.weights.store import Record, Recorded, file_sha256, write_record

# These tests put tiny files in the place of the official ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is not the official file"),
    pytest.mark.filterwarnings("ignore:.*cannot be read; it is ignored"),
]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    return tmp_path


def put(name: str, file: str, data: bytes = b"weights") -> Path:
    path = weights_root() / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_root_is_the_variables_else_the_checkouts_else_the_users(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert weights_root() == root
    monkeypatch.delenv(ROOT_VARIABLE)
    checkout = Path(__file__).parents[2]
    assert weights_root() == checkout / "models" / "weights"
    monkeypatch.setattr(store, "_PACKAGE", tmp_path / "site-packages" / "ramctl")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    if sys.platform == "linux":
        assert weights_root() == tmp_path / "data" / "ramctl" / "weights"


def test_a_file_put_there_by_hand_is_found() -> None:
    path = put("imagereward", "ImageReward.pt")
    assert weight_file("imagereward", "ImageReward.pt") == path
    assert weight_folder("imagereward") == path.parent


def test_a_missing_file_is_named_with_the_command_that_gets_it(root: Path) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        weight_file("pickscore", "model.safetensors")
    path = root / "pickscore" / "model.safetensors"
    assert str(caught.value) == f"{path} is not there: ramctl download-weights pickscore"


def test_a_folder_needs_all_its_files() -> None:
    put("pickscore", "config.json")
    with pytest.raises(MissingDependencyError, match=r"model\.safetensors is not there"):
        weight_folder("pickscore")
    put("pickscore", "model.safetensors")
    assert weight_folder("pickscore").name == "pickscore"


def test_unknown_entries_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="Did you mean 'pickscore'"):
        weight_file("pick-score", "config.json")


def test_a_complete_repository_is_found_by_its_id_and_with_the_parts_asked_for() -> None:
    repo = "stabilityai/stable-diffusion-3.5-medium"
    model = find_entry("sd3.5-medium")
    assert local_repository(repo) is None
    for file in model.wanted():
        put("sd3.5-medium", file.path)
    assert local_repository(repo) == weights_root() / "sd3.5-medium"
    assert local_repository(repo, ["t5"]) is None
    for file in model.wanted(frozenset({"t5"})):
        put("sd3.5-medium", file.path)
    assert local_repository(repo, ["t5"]) == weights_root() / "sd3.5-medium"
    assert local_repository("somebody/else") is None


def test_what_is_missing_is_listed_with_the_command() -> None:
    put("pickscore", "config.json")
    assert missing_for(["pickscore", "bert-base-uncased"]) == [
        Missing("pickscore", "model.safetensors", "missing", "ramctl download-weights pickscore"),
        Missing("bert-base-uncased", "vocab.txt", "missing", "ramctl download-weights bert-base-uncased"),
    ]


def test_the_fingerprint_is_of_the_bytes_at_hand() -> None:
    put("imagereward", "ImageReward.pt", b"one")
    assert fingerprint("imagereward", "ImageReward.pt") == sha256(b"one")[:12]
    path = put("imagereward", "ImageReward.pt", b"two")
    os.utime(path, ns=(1, 1))
    assert fingerprint("imagereward", "ImageReward.pt") == sha256(b"two")[:12]


def test_another_file_under_an_official_name_is_warned_of_with_both_hashes() -> None:
    put("imagereward", "ImageReward.pt", b"one")
    official = find_entry("imagereward").files[0].sha256
    with pytest.warns(UserWarning, match=f"not the official file: SHA-256 {sha256(b'one')}, expected {official}"):
        fingerprint("imagereward", "ImageReward.pt")


def test_a_fingerprint_is_computed_once_for_all_processes(root: Path) -> None:
    path = put("imagereward", "ImageReward.pt", b"one")
    fingerprint("imagereward", "ImageReward.pt")
    # Other bytes under the same size and time: whoever reads them again would see it.
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))
    code = "from ramctl.weights import fingerprint; print(fingerprint('imagereward', 'ImageReward.pt'))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == sha256(b"one")[:12]
    assert file_sha256(path, path.parent, rehash=True) == sha256(b"two")


def test_a_store_that_cannot_be_written_still_gives_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    put("imagereward", "ImageReward.pt", b"one")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "write_json", refuse)
    assert fingerprint("imagereward", "ImageReward.pt") == sha256(b"one")[:12]


def test_a_missing_file_has_no_fingerprint() -> None:
    with pytest.raises(MissingDependencyError, match="ramctl download-weights imagereward"):
        fingerprint("imagereward", "ImageReward.pt")


def test_a_download_that_was_cut_short_or_changed_since_is_refused_with_both_hashes() -> None:
    path = put("imagereward", "ImageReward.pt", b"weights")
    write_record(path.parent, Record({"ImageReward.pt": Recorded(7, sha256(b"weights"))}))
    assert fingerprint("imagereward", "ImageReward.pt") == sha256(b"weights")[:12]
    path.write_bytes(b"weight")
    with pytest.raises(MissingDependencyError, match="damaged: 6 bytes in place of 7"):
        weight_file("imagereward", "ImageReward.pt")
    path.write_bytes(b"weightz")
    with pytest.raises(MissingDependencyError) as caught:
        fingerprint("imagereward", "ImageReward.pt")
    for word in (sha256(b"weights"), sha256(b"weightz"), "ramctl download-weights imagereward"):
        assert word in str(caught.value)


def test_states_tell_present_missing_partial_and_damaged() -> None:
    entry = find_entry("clip-vit-l14")
    put("clip-vit-l14", "config.json", b"x" * 4519)  # the right size and, once read, the wrong hash
    put("clip-vit-l14", "model.safetensors", b"short")
    put("clip-vit-l14", "vocab.json.part", b"12345")
    found = {state.file.path: state for state in states(entry)}
    assert found["config.json"].condition == "present"
    assert found["model.safetensors"].condition == "damaged"
    assert "5 bytes in place of 1710540580" in found["model.safetensors"].detail
    assert (found["vocab.json"].condition, found["vocab.json"].bytes_here) == ("partial", 5)
    assert found["merges.txt"].condition == "missing"
    again = {state.file.path: state for state in states(entry, rehash=True)}
    assert again["config.json"].condition == "damaged"
    assert sha256(b"x" * 4519) in again["config.json"].detail
    # What was found once stays known.
    assert {state.file.path: state.condition for state in states(entry)}["config.json"] == "damaged"


def test_the_condition_of_a_whole_entry() -> None:
    entry = find_entry("pickscore")
    assert condition_of(states(entry)) == "missing"
    put("pickscore", "model.safetensors.part")
    assert condition_of(states(entry)) == "partial"
    put("pickscore", "model.safetensors")
    put("pickscore", "config.json", b"{}")
    assert condition_of(states(entry)) == "present"
    assert condition_of(states(entry, rehash=True)) == "damaged"


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', '{"files": {"ImageReward.pt": {"size": 1}}}'])
def test_a_damaged_record_counts_as_none(text: str) -> None:
    put("imagereward", "ImageReward.pt")
    put("imagereward", ".ramctl.json", text.encode())
    put("imagereward", ".ramctl-hashes.json", text.encode())
    if text == "{":
        with pytest.warns(UserWarning, match=r"\.ramctl-hashes\.json cannot be read"):
            fingerprint("imagereward", "ImageReward.pt")
    assert fingerprint("imagereward", "ImageReward.pt") == sha256(b"weights")[:12]
