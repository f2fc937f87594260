"""Where models and files named in a preset are looked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ramctl.errors import MissingDependencyError
from ramctl.resources import download_command, find_model, find_resource, resource_dir
from ramctl.weights import OTHER_VARIABLE, ROOT_VARIABLE, entry_folder, find_entry
from ramctl.weights.store import Record, Recorded, write_record

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


@pytest.mark.parametrize("with_t5", [True, False])
def test_a_model_that_changed_since_its_download_is_not_found_for_loading(
    with_t5: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(OTHER_VARIABLE, raising=False)
    folder = fetched(with_t5=True)
    transformer = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    t5 = folder / "text_encoder_3" / "model-00001-of-00002.safetensors"
    for file in (transformer, t5):
        file.write_bytes(b"weights")
    recorded = Recorded(7, hashlib.sha256(b"weights").hexdigest())
    write_record(folder, Record({file.relative_to(folder).as_posix(): recorded for file in (transformer, t5)}))
    assert find_model(HUB_ID, with_t5=with_t5) == folder
    t5.write_bytes(b"weightz")  # the size is the same
    if with_t5:
        with pytest.raises(MissingDependencyError, match=f"{t5.name} has changed since it was downloaded"):
            find_model(HUB_ID, with_t5=True)
    else:
        assert find_model(HUB_ID, with_t5=False) == folder
    transformer.write_bytes(b"weightz")
    found = hashlib.sha256(b"weightz").hexdigest()
    with pytest.raises(
        MissingDependencyError,
        match=f"{transformer.name} has changed .*SHA-256 {found}, expected {recorded.sha256}.*download-weights sd3",
    ):
        find_model(HUB_ID, with_t5=with_t5)
    # Another model is not refused because this one would be: its folder alone was asked for.
    assert find_model(HUB_ID) == folder
    monkeypatch.setenv(OTHER_VARIABLE, "allow")
    with pytest.warns(UserWarning) as told:
        assert find_model(HUB_ID, with_t5=with_t5) == folder
    assert [transformer.name in str(warning.message) for warning in told] == [True, False][: 1 + with_t5]


def test_the_command_that_fetches_a_model() -> None:
    assert download_command(HUB_ID) == "ramctl download-weights sd3.5-medium"
    assert download_command("someone/else") is None
