"""Entries into the store: what is asked of the hub, what is kept, two processes, the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from ramctl.download import DownloadError
from ramctl.weights import find_entry, states, weight_folder, weights_root
from ramctl.weights.store import read_record
from tests.download.fetching import DATA, DIGEST, ENTRY, Listener, Write, fail, fetch, here, nothing_kept, succeed
from tests.download.server import COMMIT, Act, Hub, hub_serving

# -- the hub in good order --------------------------------------------------------------------------------------------


def test_a_file_is_pinned_by_the_hubs_hash_and_recorded_with_the_commit(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    (outcome,) = succeed(hub.url, "big")
    assert here() == DATA
    assert outcome.fetched == ("big.bin",) and outcome.bytes_fetched == len(DATA)
    recorded = read_record(weights_root() / "big").files["big.bin"]
    assert (recorded.size, recorded.sha256, recorded.commit) == (len(DATA), DIGEST, COMMIT)
    assert recorded.vouched_by == "hub"
    assert len(hub.storage.gets(stored)) == 1
    assert not list((weights_root() / "big").glob("*.part*"))


def test_what_is_there_is_not_fetched_again(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    succeed(hub.url, "big")
    asked = len(hub.front.seen) + len(hub.storage.seen)
    (outcome,) = succeed(hub.url, "big")
    assert outcome.fetched == () and len(hub.front.seen) + len(hub.storage.seen) == asked


def test_a_complete_store_need_not_be_writable(hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    succeed(hub.url, "big")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr("ramctl.download.fetch.FileLock", refuse)
    (outcome,) = succeed(hub.url, "big")
    assert outcome.fetched == ()


def test_files_put_there_by_hand_are_checked_and_count(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % f', sha256 = "{DIGEST}"')
    file = weights_root() / "big" / "big.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(DATA)
    (outcome,) = succeed(hub.url, "big")
    assert outcome.fetched == () and hub.front.seen == []


def test_a_damaged_file_is_fetched_again_and_replaced_only_by_a_good_one(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % f', sha256 = "{DIGEST}"')
    stored = hub.add("team/big", "big.bin", DATA)
    file = weights_root() / "big" / "big.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(DATA[:-1] + b"!")
    hub.storage.script[stored] = [Act(status=404)]
    listener = Listener()
    assert "does not exist" in fail(hub.url, "big", listener)
    assert file.read_bytes() == DATA[:-1] + b"!"
    assert "damaged" in listener.notes[0] and DIGEST in listener.notes[0]
    succeed(hub.url, "big")
    assert here() == DATA


def test_small_files_are_checked_by_gits_hash(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY.replace("big.bin", "sub/config.json") % "")
    path = hub.add("team/big", "sub/config.json", b'{"a": 1}', large=False)
    hub.front.script[path] = [Act(body=b'{"a": 2}')]
    assert "git hash" in fail(hub.url, "big")
    assert nothing_kept()
    succeed(hub.url, "big")
    assert here(file="sub/config.json") == b'{"a": 1}'


def test_a_pinned_commit_and_a_dataset_make_the_address(hub: Hub, manifest: Write) -> None:
    manifest(
        ENTRY.replace('repo = "team/big"', f'repo = "team/big"\nkind = "dataset"\nrevision = "{COMMIT}"')
        % ', source = "A b.csv"'
    )
    hub.add("team/big", "A%20b.csv", DATA, revision=COMMIT, kind="datasets/")
    succeed(hub.url, "big")
    assert here() == DATA


def test_all_files_come_from_the_commit_of_the_first(hub: Hub, manifest: Write) -> None:
    manifest((ENTRY % "").replace("files = [", 'files = ["one.json", '))
    hub.add("team/big", "one.json", b"{}", large=False)
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(status=403)]
    assert "refused" in fail(hub.url, "big")
    succeed(hub.url, "big")
    assert here() == DATA
    assert [path for path in hub.front.paths() if "/main/" in path] == ["/team/big/resolve/main/one.json"]


def test_a_repository_is_taken_by_the_hubs_own_list(hub: Hub, manifest: Write) -> None:
    manifest(
        (ENTRY % "")
        .replace("files = [", 'list_from_hub = true\nexclude = ["*.md"]\nfiles = [')
        .replace("big.bin", "config.json")
    )
    hub.add("team/big", "config.json", b"{}", large=False)
    hub.add("team/big", "deep/model.bin", DATA)
    rows = [
        {"type": "directory", "path": "deep", "size": 0, "oid": "0" * 40},
        {"type": "file", "path": "README.md", "size": 2, "oid": "1" * 40},
        {
            "type": "file",
            "path": "config.json",
            "size": 2,
            "oid": hub.front.etags["/team/big/resolve/main/config.json"],
        },
        {"type": "file", "path": "deep/model.bin", "size": len(DATA), "oid": "2" * 40, "lfs": {"oid": DIGEST}},
    ]
    listing = f"/api/models/team/big/tree/{COMMIT}?recursive=true"
    hub.front.files[listing] = json.dumps(rows[:2]).encode()
    hub.front.head[listing] = {"Link": f'<{hub.url}/more>; rel="next"'}
    hub.front.files["/more"] = json.dumps(rows[2:]).encode()
    hub.storage.script[f"/store/{DIGEST}"] = [Act(status=403)]
    assert "refused" in fail(hub.url, "big")
    missing = [state.file.path for state in states(find_entry("big")) if state.condition != "present"]
    assert "deep/model.bin" in missing  # a half-fetched repository is not taken for a whole one
    succeed(hub.url, "big")
    assert (weight_folder("big") / "deep/model.bin").read_bytes() == DATA
    assert not (weights_root() / "big" / "README.md").exists()


def test_a_listing_cannot_write_outside_the_store(hub: Hub, manifest: Write) -> None:
    manifest((ENTRY % "").replace("files = [", "list_from_hub = true\nfiles = ["))
    hub.add("team/big", "big.bin", DATA)
    row = {"type": "file", "path": "../../evil.bin", "size": 3, "oid": "1" * 40}
    hub.front.files[f"/api/models/team/big/tree/{COMMIT}?recursive=true"] = json.dumps([row]).encode()
    assert "leads out of its folder" in fail(hub.url, "big")
    assert not (weights_root().parent / "evil.bin").exists()


# -- the disk ---------------------------------------------------------------------------------------------------------


def test_too_small_a_disk_is_said_before_anything_is_fetched(
    hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(ENTRY % ", about_bytes = 5_000_000_000")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(DownloadError, match=r"1\.0 GB free, and 5\.0 GB are still to come"):
        fetch(hub.url, "big")
    assert hub.front.seen == []


def test_the_hubs_size_counts_where_the_manifest_has_none(
    hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 10**10, 1000))
    assert "GB free" in fail(hub.url, "big")
    assert hub.storage.seen == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_is_one_line_and_leaves_what_came(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    folder = weights_root() / "big"
    folder.mkdir(parents=True)
    (folder / "big.bin.part").symlink_to("/dev/full")
    said = fail(hub.url, "big")
    assert "is full" in said and "\n" not in said


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a folder that cannot be written")
def test_a_store_that_cannot_be_written_is_named(hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(ENTRY % "")
    monkeypatch.setenv("RAMCTL_WEIGHTS", "/proc/store")
    said = fail(hub.url, "big")
    assert "/proc/store" in said and "--output" in said


# -- several processes ------------------------------------------------------------------------------------------------

CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from ramctl.download import Options, Silent, fetch_all, resolve
class Said(Silent):
    def note(self, text): print(text, flush=True)
print("started", flush=True)
(outcome,) = fetch_all(resolve(["big"]), Options(mirror=sys.argv[1], first_wait=0.01), Said())
if outcome.error: raise outcome.error
print("fetched", outcome.bytes_fetched, flush=True)
"""


def start(hub: Hub) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, hub.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_at_once_fetch_once(manifest: Write) -> None:
    manifest(ENTRY % "")
    with hub_serving() as hub:
        stored = hub.add("team/big", "big.bin", DATA)
        hub.storage.always[stored] = Act(trickle=0.02)
        one = start(hub)
        wait_for(lambda: bool(hub.storage.gets(stored)))
        two = start(hub)
        said = [one.communicate(timeout=30), two.communicate(timeout=30)]
    assert (one.returncode, two.returncode) == (0, 0), said
    assert f"fetched {len(DATA)}" in said[0][0]
    assert "Another process is fetching big; waiting" in said[1][0] and "fetched 0" in said[1][0]
    assert len(hub.storage.gets(stored)) == 1 and here() == DATA


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_no_file_and_the_next_one_resumes(how: signal.Signals, manifest: Write) -> None:
    manifest(ENTRY % "")
    with hub_serving() as hub:
        stored = hub.add("team/big", "big.bin", DATA)
        hub.storage.script[stored] = [Act(trickle=0.02)]
        part = weights_root() / "big" / "big.bin.part"
        child = start(hub)
        wait_for(lambda: part.is_file() and part.stat().st_size > 20_000)
        child.send_signal(how)
        child.communicate(timeout=20)
        assert child.returncode != 0
        assert not (weights_root() / "big" / "big.bin").exists()
        begun = part.stat().st_size
        succeed(hub.url, "big")
    assert here() == DATA
    assert hub.storage.gets(stored)[-1].headers["range"] == f"bytes={begun}-" and begun < len(DATA)
