"""Where models and files named in a preset are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramctl.errors import MissingDependencyError
from ramctl.resources import download_command, find_model, find_resource, resource_dir
from ramctl.weights import ROOT_VARIABLE, entry_folder, find_entry

HUB_ID = "stabilityai/stable-diffusion-3.5-medium"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of downloads, and a working directory without anything in it."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "store"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "store"


def fetched(*, with_t5: bool) -> Path:
    """The files of the entry, empty, as if put there by hand."""
    folder = entry_folder("sd3.5-medium")
    parts = frozenset({"t5"}) if with_t5 else frozenset[str]()
    for file in find_entry("sd3.5-medium").wanted(parts):
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).touch()
    return folder


def test_shipped_files_are_found_from_anywhere_and_others_are_given_back() -> None:
    assert find_resource("models/tinyworld") == resource_dir("models") / "tinyworld"
    assert find_resource("prompts/nothing.jsonl") == Path("prompts/nothing.jsonl")


def test_a_download_is_named_by_its_entry(store: Path) -> None:
    (store / "pickapic").mkdir(parents=True)
    (store / "pickapic" / "train.txt").write_text("a cat\n")
    assert find_resource("weights/pickapic/train.txt") == store / "pickapic" / "train.txt"
    assert find_resource("weights/pickapic/test.txt") == Path("weights/pickapic/test.txt")


def test_a_fetched_model_takes_the_place_of_its_hub_id() -> None:
    assert find_model(HUB_ID) == Path(HUB_ID)
    folder = fetched(with_t5=True)
    assert find_model(HUB_ID) == find_model(HUB_ID, with_t5=True) == folder
    assert find_model("models/tinyworld") == resource_dir("models") / "tinyworld"
    assert find_model("someone/else") == Path("someone/else")


def test_a_part_of_a_download_is_an_error_and_no_reason_to_fetch_it_all_elsewhere() -> None:
    folder = fetched(with_t5=False)
    assert find_model(HUB_ID) == folder
    with pytest.raises(MissingDependencyError, match=r"text_encoder_3.*ramctl download-weights sd3\.5-medium"):
        find_model(HUB_ID, with_t5=True)
    (folder / "model_index.json").unlink()
    with pytest.raises(MissingDependencyError, match=r"model_index\.json.*ramctl download-weights sd3\.5-medium"):
        find_model(HUB_ID)


def test_the_command_that_fetches_a_model() -> None:
    assert download_command(HUB_ID) == "ramctl download-weights sd3.5-medium"
    assert download_command("someone/else") is None
