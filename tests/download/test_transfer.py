"""Servers that cut, lie and serve the wrong bytes: what arrives is right or nothing."""

from __future__ import annotations

import gzip
import hashlib
import time

import pytest

from ramctl.download import patience
from ramctl.errors import MissingDependencyError
from ramctl.weights import find_entry, states, weight_file, weights_root
from tests.download.fetching import DATA, DIGEST, ENTRY, Listener, Write, fail, fetch, here, nothing_kept, succeed
from tests.download.server import Act, Hub, Server


def test_a_cut_connection_is_resumed_where_it_broke(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(cut=100_000), Act(cut=50_000), Act(cut=1)]
    succeed(hub.url, "big")
    assert here() == DATA
    assert [seen.headers.get("range") for seen in hub.storage.gets(stored)] == [
        None,
        "bytes=100000-",
        "bytes=150000-",
        "bytes=150001-",
    ]


def test_many_cuts_are_no_reason_to_give_up_while_bytes_come(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.always[stored] = Act(cut=len(DATA) // 12)
    succeed(hub.url, "big")
    assert here() == DATA and len(hub.storage.gets(stored)) > patience.ATTEMPTS


def test_a_server_that_ignores_ranges_starts_the_file_over(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(cut=100_000), Act(ranges=False)]
    succeed(hub.url, "big")
    assert here() == DATA


def test_a_server_that_cuts_and_ignores_ranges_is_given_up(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.always[stored] = Act(cut=100_000, ranges=False)
    said = fail(hub.url, "big")
    assert f"given up after {patience.ATTEMPTS} attempts with 100000 bytes of {len(DATA)}" in said
    with pytest.raises(MissingDependencyError):
        weight_file("big", "big.bin")


def test_a_later_command_resumes_what_an_earlier_one_left(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(cut=200_000), Act(status=403)]
    fail(hub.url, "big")
    (state,) = states(find_entry("big"))
    assert (state.condition, state.bytes_here) == ("partial", 200_000)
    succeed(hub.url, "big")
    assert here() == DATA
    assert hub.storage.gets(stored)[-1].headers["range"] == "bytes=200000-"


def test_the_part_of_another_version_is_not_continued(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(cut=200_000), Act(status=403)]
    fail(hub.url, "big")
    newer = DATA[::-1]
    stored = hub.add("team/big", "big.bin", newer)
    succeed(hub.url, "big")
    assert here() == newer
    assert "range" not in hub.storage.gets(stored)[0].headers


def test_a_part_that_was_changed_costs_one_more_download_and_no_wrong_file(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(cut=200_000), Act(status=403)]
    fail(hub.url, "big")
    part = weights_root() / "big" / "big.bin.part"
    part.write_bytes(b"?" + part.read_bytes()[1:])
    listener = Listener()
    succeed(hub.url, "big", listener=listener)
    assert here() == DATA
    assert any("starting over" in note for note in listener.notes)


@pytest.mark.parametrize("claim", [-1, -100_000, 1, 100_000])
def test_a_false_length_is_seen_through(claim: int, hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(claim=claim)]
    succeed(hub.url, "big")
    assert here() == DATA


@pytest.mark.parametrize("claim", [-100_000, 100_000])
def test_a_false_length_of_a_file_nobody_knows_is_seen_through_where_it_can_be(
    claim: int, server: Server, manifest: Write
) -> None:
    manifest((ENTRY % "").replace('repo = "team/big"', f'url = "{server.url}"'))
    server.files["/big.bin"] = DATA
    server.etags["/big.bin"] = "v1"
    server.script["/big.bin"] = [Act(claim=claim)]
    succeed("http://127.0.0.1:9", "big")
    # After too long a length the server says that nothing is left, and nothing is fetched twice.
    assert len(server.gets("/big.bin")) == (2 if claim > 0 else 1)
    # Nothing contradicts a length that is too short.
    assert here() == (DATA if claim > 0 else DATA[:claim])


@pytest.mark.parametrize("body", [DATA[:-1] + b"!", DATA + b"more", b"<html>log in to the wireless network</html>"])
def test_wrong_bytes_leave_nothing_behind(body: bytes, hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % f', sha256 = "{DIGEST}", size = {len(DATA)}')
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.always[stored] = Act(body=body, ranges=False)
    said = fail(hub.url, "big")
    if len(body) == len(DATA):
        assert DIGEST in said and hashlib.sha256(body).hexdigest() in said and "Run the same command again" in said
        assert nothing_kept()
    else:
        assert str(len(DATA)) in said
    with pytest.raises(MissingDependencyError):
        weight_file("big", "big.bin")
    hub.storage.always.clear()
    succeed(hub.url, "big")
    assert here() == DATA


def test_the_manifests_first_digits_of_a_hash_count(server: Server, manifest: Write) -> None:
    manifest((ENTRY % ', sha256_starts = "00000000"').replace('repo = "team/big"', f'url = "{server.url}"'))
    server.files["/big.bin"] = DATA
    assert "starts with 00000000" in fail("http://127.0.0.1:9", "big")
    assert nothing_kept()


def test_another_file_on_the_hub_is_refused_before_it_is_fetched(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % f', sha256 = "{"a" * 64}"')
    hub.add("team/big", "big.bin", DATA)
    said = fail(hub.url, "big")
    assert DIGEST in said and "a" * 64 in said
    assert hub.storage.seen == []


def test_the_number_of_prompts_is_checked(server: Server, manifest: Write) -> None:
    manifest(
        (ENTRY % ", rows = 2").replace("big.bin", "set.csv").replace('repo = "team/big"', f'url = "{server.url}"')
        + (ENTRY % ", rows_at_least = 3")
        .replace("big]", "list]")
        .replace("big.bin", "list.txt")
        .replace('repo = "team/big"', f'url = "{server.url}"')
    )
    server.files["/set.csv"] = b'Prompts,Category\r\n"one, with\na break",Text\r\n'
    server.files["/list.txt"] = b"a\n\nb\nc\n"
    first, second = fetch("http://127.0.0.1:9", "big", "list")
    assert "1 prompts, expected 2" in str(first.error) and second.error is None
    server.files["/set.csv"] += b"two,Text\r\n"
    succeed("http://127.0.0.1:9", "big")


def test_a_silent_server_counts_as_cut(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(cut=100_000, pause=3.0)]
    began = time.monotonic()
    (outcome,) = fetch(hub.url, "big", timeout=0.3)
    assert outcome.error is None and here() == DATA and time.monotonic() - began < 2.5


def test_a_body_without_a_length_is_taken_to_its_end(hub: Hub, server: Server, manifest: Write) -> None:
    manifest(
        ENTRY % "" + (ENTRY % "").replace("[big]", "[other]").replace('repo = "team/big"', f'url = "{server.url}"')
    )
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(length=False, cut=100_000)]
    server.files["/big.bin"] = DATA
    server.always["/big.bin"] = Act(length=False)
    succeed(hub.url, "big", "other")
    assert here() == here("other") == DATA
    assert len(hub.storage.gets(stored)) == 2  # its size was known: the end was too early


def test_a_body_that_comes_packed_is_unpacked(server: Server, manifest: Write) -> None:
    manifest((ENTRY % f', sha256 = "{DIGEST}"').replace('repo = "team/big"', f'url = "{server.url}"'))
    server.files["/big.bin"] = DATA
    server.always["/big.bin"] = Act(body=gzip.compress(DATA), headers={"Content-Encoding": "gzip"}, ranges=False)
    succeed("http://127.0.0.1:9", "big")
    assert here() == DATA


def test_a_file_nobody_knows_is_not_continued_after_it_changed(server: Server, manifest: Write) -> None:
    manifest((ENTRY % "").replace('repo = "team/big"', f'url = "{server.url}"'))
    server.files["/big.bin"], server.etags["/big.bin"] = DATA, "v1"
    server.script["/big.bin"] = [Act(cut=100_000), Act(status=403)]
    fail("http://127.0.0.1:9", "big")
    server.files["/big.bin"], server.etags["/big.bin"] = DATA[::-1], "v2"
    succeed("http://127.0.0.1:9", "big")
    assert here() == DATA[::-1]
    last = server.gets("/big.bin")[-1].headers
    assert (last["range"], last["if-range"]) == ("bytes=100000-", '"v1"')


def test_a_part_from_another_place_is_not_appended(server: Server, manifest: Write) -> None:
    manifest((ENTRY % "").replace('repo = "team/big"', f'url = "{server.url}"'))
    server.files["/big.bin"], server.etags["/big.bin"] = DATA, "v1"
    server.script["/big.bin"] = [Act(cut=100_000), Act(from_start=True)]
    succeed("http://127.0.0.1:9", "big")
    assert here() == DATA


def test_progress_knows_the_whole_from_the_servers_word(server: Server, manifest: Write) -> None:
    manifest((ENTRY % "").replace('repo = "team/big"', f'url = "{server.url}"'))
    server.files["/big.bin"] = DATA
    listener = Listener()
    succeed("http://127.0.0.1:9", "big", listener=listener)
    assert listener.last == ("big/big.bin", len(DATA), len(DATA))
