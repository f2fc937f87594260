"""What servers answer: trouble, refusals, redirects; who gets the token; proxies and mirrors."""

from __future__ import annotations

import email.utils
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from ramctl.download import DownloadError, Options, fetch_all, http, patience, resolve
from tests.download.fetching import DATA, ENTRY, Write, fail, fetch, here, succeed
from tests.download.server import Act, Hub, Server

# -- statuses ---------------------------------------------------------------------------------------------------------


def test_a_server_in_trouble_is_asked_again(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(status=status) for status in (500, 502, 503, 504)]
    succeed(hub.url, "big")
    assert here() == DATA


def test_a_server_that_stays_in_trouble_is_given_up(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.always[stored] = Act(status=500)
    said = fail(hub.url, "big")
    assert "status 500" in said and f"given up after {patience.ATTEMPTS} attempts" in said


def test_the_pause_a_server_asks_for_is_made(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(status=429, headers={"Retry-After": "1"})]
    began = time.monotonic()
    succeed(hub.url, "big")
    assert time.monotonic() - began >= 1.0


def test_a_pause_until_a_date_is_understood() -> None:
    later = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=30))
    assert 25 < (http._retry_after(later) or 0) <= 30
    assert http._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert http._retry_after("7") == 7 and http._retry_after("soon") is None


def test_too_long_a_pause_ends_the_command(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    stored = hub.add("team/big", "big.bin", DATA)
    hub.storage.script[stored] = [Act(status=429, headers={"Retry-After": str(int(http.LONGEST_WAIT) + 1)})]
    assert "asks to wait 301 s" in fail(hub.url, "big")


def test_a_missing_file_is_named_with_its_address(hub: Hub, manifest: Write) -> None:
    manifest(ENTRY % "")
    said = fail(hub.url, "big")
    assert f"{hub.url}/team/big/resolve/main/big.bin does not exist (404)" in said
    assert len(hub.front.seen) == 1


def test_a_server_nobody_answers_at_is_tried_for_the_first_file_only(
    manifest: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up: list[str] = []
    remember = http.Http.unreachable

    def unreachable(self: http.Http, host: str, message: str) -> str:
        given_up.append(host)
        return remember(self, host, message)

    monkeypatch.setattr(http.Http, "unreachable", unreachable)
    manifest(ENTRY % "" + (ENTRY % "").replace("[big]", "[other]"))
    first, second = fetch("http://127.0.0.1:9", "big", "other")
    assert "127.0.0.1:9 cannot be reached" in str(first.error) and "--mirror" in str(first.error)
    assert str(second.error) == str(first.error)
    assert given_up == ["127.0.0.1:9"]


def test_one_entry_that_fails_does_not_keep_the_others_from_coming(hub: Hub, manifest: Write) -> None:
    manifest((ENTRY % "").replace("big", "absent") + ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    first, second = fetch(hub.url, "absent", "big")
    assert isinstance(first.error, DownloadError) and second.error is None
    assert here() == DATA


def test_offline_is_offline(hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in fail(hub.url, "big")
    assert hub.front.seen == []


# -- tokens and redirects ---------------------------------------------------------------------------------------------

GATED = (ENTRY % "").replace("licence", "gated = true\nlicence")


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(GATED)
    stored = hub.add("team/big", "big.bin", DATA)
    hub.front.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    hub.storage.script[stored] = [Act(cut=5)]
    succeed(hub.url, "big")
    assert all(seen.headers["authorization"] == "Bearer hf_secret" for seen in hub.front.seen)
    assert hub.storage.seen and not any("authorization" in seen.headers for seen in hub.storage.seen)


def test_the_stored_token_is_used(hub: Hub, manifest: Write, tmp_path: Path) -> None:
    manifest(GATED)
    hub.add("team/big", "big.bin", DATA)
    hub.front.token = "hf_stored"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_stored")
    succeed(hub.url, "big")


def test_a_mirror_gets_no_token_for_what_everybody_may_read(
    hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    succeed(hub.url, "big")
    assert not any("authorization" in seen.headers for seen in hub.front.seen)


def test_a_stale_token_does_not_stand_before_a_public_file(
    hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    hub.front.refuses_tokens = True
    monkeypatch.setattr(http, "DEFAULT_HUB", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    succeed(hub.url, "big")
    assert here() == DATA
    assert ["authorization" in seen.headers for seen in hub.front.seen[:2]] == [True, False]


def test_a_gated_model_without_a_token_says_how_to_get_access(hub: Hub, manifest: Write) -> None:
    manifest(GATED)
    hub.add("team/big", "big.bin", DATA)
    hub.front.token = "hf_secret"
    said = fail(hub.url, "big")
    for word in (
        "gated",
        "https://example.org/big",
        "accept its licence",
        "HF_TOKEN",
        "settings/tokens",
        "hf auth login",
    ):
        assert word in said
    assert len(hub.front.seen) == 1


@pytest.mark.parametrize("token", ["…", "hf_a b\tc", "hf_é"])
def test_what_is_no_token_is_said_and_sent_nowhere(
    hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    """As when somebody types the message's own ``export HF_TOKEN=…``."""
    monkeypatch.setenv("HF_TOKEN", token)
    manifest(GATED)
    hub.add("team/big", "big.bin", DATA)
    said = fail(hub.url, "big")
    assert "HF_TOKEN" in said and "settings/tokens" in said and token not in said
    assert not [seen for seen in hub.front.seen if "Authorization" in seen.headers]


def test_what_is_no_token_does_not_stand_before_a_public_file(
    hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "…")
    monkeypatch.setattr(http, "DEFAULT_HUB", hub.url)
    manifest(ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    succeed(hub.url, "big")
    assert here() == DATA


def test_a_token_without_access_is_told_from_no_token(
    hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(GATED)
    hub.add("team/big", "big.bin", DATA)
    hub.front.token = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    said = fail(hub.url, "big")
    assert "your token has no access (403)" in said and "https://example.org/big" in said and "hf_other" not in said


def test_endless_redirects_end(server: Server, manifest: Write) -> None:
    manifest((ENTRY % "").replace('repo = "team/big"', f'url = "{server.url}"'))
    server.moved["/big.bin"] = f"{server.url}/big.bin"
    assert "redirects more than" in fail("http://127.0.0.1:9", "big")


def test_a_redirect_off_encryption_is_refused() -> None:
    with pytest.raises(DownloadError, match="not encrypted"):
        http._checked_redirect(httpx.Request("GET", "http://storage.example/a"), "https://hub.example/a")
    same = httpx.Request("GET", "https://storage.example/a")
    assert http._checked_redirect(same, "https://hub.example/a") is same


def test_the_proxy_is_used(server: Server, manifest: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest((ENTRY % "").replace('repo = "team/big"', 'url = "http://files.example"'))
    server.files["/big.bin"] = DATA
    monkeypatch.setenv("HTTP_PROXY", server.url)
    succeed("http://127.0.0.1:9", "big")
    assert here() == DATA and server.seen[-1].headers["host"] == "files.example"


def test_the_mirror_of_the_environment_is_used(hub: Hub, manifest: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(ENTRY % "")
    hub.add("team/big", "big.bin", DATA)
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    (outcome,) = fetch_all(resolve(["big"]), Options(first_wait=0.01))
    assert outcome.error is None and here() == DATA
