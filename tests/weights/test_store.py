"""Where files are looked for, what is said when they are not there, and what is known of those that are."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ramctl.errors import MissingDependencyError, UsageError
from ramctl.weights import (
    MANIFEST_VARIABLE,
    OTHER_VARIABLE,
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

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be read; it is ignored")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    monkeypatch.delenv(OTHER_VARIABLE, raising=False)
    return tmp_path


#: The hub vouches for these files, not the manifest.
UNPINNED = ("clip-vit-h14-tokenizer", "tokenizer.json")


def put(name: str, file: str, data: bytes = b"weights") -> Path:
    path = weights_root() / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def with_path() -> dict[str, str]:
    """The environment of a process that imports what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


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
    path = put(*UNPINNED)
    assert weight_file(*UNPINNED) == path


def test_a_missing_file_is_named_with_the_command_that_gets_it(root: Path) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        weight_file("pickscore", "model.safetensors")
    path = root / "pickscore" / "model.safetensors"
    assert str(caught.value) == f"{path} is not there: ramctl download-weights scorer:pickscore"


def test_a_folder_needs_all_its_files() -> None:
    name = UNPINNED[0]
    first, *others = [file.path for file in find_entry(name).files]
    put(name, first)
    with pytest.raises(MissingDependencyError, match=f"{others[0]} is not there"):
        weight_folder(name)
    for file in others:
        put(name, file)
    assert weight_folder(name).name == name


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
        Missing("pickscore", "model.safetensors", "missing", "ramctl download-weights scorer:pickscore"),
        Missing("bert-base-uncased", "vocab.txt", "missing", "ramctl download-weights bert-base-uncased"),
    ]


def test_the_fingerprint_is_of_the_bytes_at_hand() -> None:
    put(*UNPINNED, b"one")
    assert fingerprint(*UNPINNED) == sha256(b"one")[:12]
    path = put(*UNPINNED, b"two")
    os.utime(path, ns=(1, 1))
    assert fingerprint(*UNPINNED) == sha256(b"two")[:12]


@pytest.mark.parametrize("ask", [weight_file, fingerprint])
def test_another_file_under_an_official_name_is_refused_with_both_hashes(ask: Callable[[str, str], object]) -> None:
    path = put("bert-base-uncased", "vocab.txt", b"x" * 231_508)  # of the right size
    official = find_entry("bert-base-uncased").files[0].sha256
    with pytest.raises(MissingDependencyError) as caught:
        ask("bert-base-uncased", "vocab.txt")
    assert str(caught.value) == (
        f"{path} is not the official file: SHA-256 {sha256(b'x' * 231_508)}, expected {official}. Fetch it again: "
        "ramctl download-weights bert-base-uncased, or to use it as it is, set RAMCTL_OTHER_WEIGHTS=allow"
    )


def test_the_first_digits_of_a_hash_are_compared_where_the_manifest_has_no_more() -> None:
    entry = find_entry("mask2former-swin-s-coco")
    put(entry.name, entry.files[0].path)
    with pytest.raises(MissingDependencyError, match=f"{sha256(b'weights')}, expected one that starts with 743b7d99"):
        weight_file(entry.name, entry.files[0].path)


def test_a_folder_with_another_file_in_it_is_refused_unless_nothing_is_loaded() -> None:
    put("pickscore", "config.json")
    put("pickscore", "model.safetensors")
    with pytest.raises(MissingDependencyError, match=r"config\.json is not the official file: SHA-256"):
        weight_folder("pickscore")
    assert weight_folder("pickscore", verify=False).name == "pickscore"


def test_other_weights_are_used_when_they_are_allowed_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    path = put("imagereward", "ImageReward.pt", b"one")
    official = find_entry("imagereward").files[0].sha256
    monkeypatch.setenv(OTHER_VARIABLE, "yes")
    with pytest.raises(MissingDependencyError, match="3 bytes in place of 1786880927, SHA-256"):
        weight_file("imagereward", "ImageReward.pt")
    monkeypatch.setenv(OTHER_VARIABLE, "allow")
    said = f"SHA-256 {sha256(b'one')}, expected {official}. Numbers will differ."
    with pytest.warns(UserWarning, match=said):
        assert weight_file("imagereward", "ImageReward.pt") == path
    with pytest.warns(UserWarning, match=said):
        assert fingerprint("imagereward", "ImageReward.pt") == sha256(b"one")[:12]


def test_a_hash_is_computed_once_for_all_processes() -> None:
    path = put(*UNPINNED, b"one")
    fingerprint(*UNPINNED)
    # Other bytes under the same size and time: whoever reads them again would see it.
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp, stamp))
    code = f"from ramctl.weights import fingerprint; print(fingerprint(*{UNPINNED}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=with_path(), check=True)
    assert done.stdout.strip() == sha256(b"one")[:12]
    assert file_sha256(path, path.parent, rehash=True) == sha256(b"two")


def test_of_processes_that_start_together_one_reads_a_file() -> None:
    put(*UNPINNED, b"one")
    # Each says when it reads, and takes its time over it.
    code = f"""
import time
from ramctl import hashing
read = hashing.file_sha256
def slowly(path):
    print("read", flush=True)
    time.sleep(1.5)
    return read(path)
hashing.file_sha256 = slowly
from ramctl.weights import fingerprint
print("ready", flush=True)
input()
print(fingerprint(*{UNPINNED}))
"""
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=with_path()) for _ in range(3)]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].split() for process in running]
    assert [words[-1] for words in said] == [sha256(b"one")[:12]] * 3
    assert sum(words.count("read") for words in said) == 1


def test_what_was_read_of_a_file_while_it_changed_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(*UNPINNED, b"one")

    def read_then_change(file: Path) -> str:
        path.write_bytes(b"other")
        return sha256(b"one")

    with monkeypatch.context() as patch:
        patch.setattr(store.hashing, "file_sha256", read_then_change)
        fingerprint(*UNPINNED)
    assert fingerprint(*UNPINNED) == sha256(b"other")[:12]


def test_a_store_that_cannot_be_written_still_gives_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(*UNPINNED, b"one")
    (path.parent / store.HASHES_LOCK).mkdir()  # no file can be made of it

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "write_json", refuse)
    assert fingerprint(*UNPINNED) == sha256(b"one")[:12]


def test_a_missing_file_has_no_fingerprint() -> None:
    with pytest.raises(MissingDependencyError, match="ramctl download-weights imagereward"):
        fingerprint("imagereward", "ImageReward.pt")


def test_a_download_that_was_cut_short_or_changed_since_is_refused_with_both_hashes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = put(*UNPINNED, b"weights")
    write_record(path.parent, Record({path.name: Recorded(7, sha256(b"weights"))}))
    assert fingerprint(*UNPINNED) == sha256(b"weights")[:12]
    for found, size in ((b"weightz", ""), (b"weight", "6 bytes in place of 7, ")):
        path.write_bytes(found)
        for ask in (weight_file, fingerprint):
            with pytest.raises(MissingDependencyError) as caught:
                ask(*UNPINNED)
            assert str(caught.value).startswith(
                f"{path} has changed since it was downloaded: {size}SHA-256 {sha256(found)}, expected "
                f"{sha256(b'weights')}. Fetch it again: ramctl download-weights {UNPINNED[0]},"
            )
    # Who loads nothing compares sizes, and is not told of other weights that are allowed.
    with pytest.raises(MissingDependencyError, match="6 bytes in place of 7"):
        weight_file(*UNPINNED, verify=False)
    monkeypatch.setenv(OTHER_VARIABLE, "allow")
    assert weight_file(*UNPINNED, verify=False) == path
    with pytest.warns(UserWarning, match="has changed since it was downloaded.* Numbers will differ"):
        assert weight_file(*UNPINNED) == path


def test_the_manifests_word_goes_before_an_earlier_downloads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = root / "manifest.toml"
    file = f'{{ path = "one.bin", sha256 = "{sha256(b"new")}" }}'
    manifest.write_text(f'[one]\nabout = ""\nlicence = "MIT"\npage = ""\nrepo = "a/one"\nfiles = [{file}]\n')
    monkeypatch.setenv(MANIFEST_VARIABLE, str(manifest))
    path = put("one", "one.bin", b"new")
    write_record(path.parent, Record({"one.bin": Recorded(3, sha256(b"old"))}))
    assert weight_file("one", "one.bin") == path
    put("one", "one.bin", b"older")
    with pytest.raises(MissingDependencyError, match="not the official file"):
        weight_file("one", "one.bin")


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


@pytest.mark.parametrize("text", ["{", "[]", '{"files": 3}', '{"files": {"tokenizer.json": {"size": 1}}}'])
def test_a_damaged_record_counts_as_none(text: str) -> None:
    put(*UNPINNED)
    put(UNPINNED[0], ".ramctl.json", text.encode())
    put(UNPINNED[0], ".ramctl-hashes.json", text.encode())
    if text == "{":
        with pytest.warns(UserWarning, match=r"\.ramctl-hashes\.json cannot be read"):
            fingerprint(*UNPINNED)
    assert fingerprint(*UNPINNED) == sha256(b"weights")[:12]
