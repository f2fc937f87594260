from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ramctl.weights import MANIFEST_VARIABLE, ROOT_VARIABLE
from tests.download.server import Hub, Server, hub_serving, serving

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's: its proxies, its token, its mirror, its store."""
    for name in (*_PROXIES, *map(str.lower, _PROXIES), "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "store"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_serving() as running:
        yield running


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a manifest of the test's own in the place of the shipped one."""

    def write(text: str) -> Path:
        file = tmp_path / "manifest.toml"
        file.write_text(text, encoding="utf-8")
        monkeypatch.setenv(MANIFEST_VARIABLE, str(file))
        return file

    return write
