"""From names to entries."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramctl.download import argument_for, everything, inventory, left_out, preset_needs, resolve, scorer_needs
from ramctl.download.needs import PAPER_PRESETS
from ramctl.errors import MissingDependencyError, UsageError
from ramctl.scorers.registry import available, create
from ramctl.settings import list_presets
from ramctl.weights import OTHER_VARIABLE, ROOT_VARIABLE, find_entry, load_manifest

PADDLE = ["pp-ocrv3-mobile-det", "en-pp-ocrv4-mobile-rec"]


def names(*asked: str, without: tuple[str, ...] = ()) -> list[str]:
    return [need.entry.name for need in resolve(asked, without)]


def test_a_preset_brings_its_model_its_prompts_and_its_scorers_weights() -> None:
    assert names("preset:geneval") == ["sd3.5-medium", "clip-vit-l14", "mask2former-swin-s-coco"]
    assert names("preset:pickscore") == ["sd3.5-medium", "pickscore", "clip-vit-h14-tokenizer", "pickapic"]
    assert names("preset:ocr") == ["sd3.5-medium"]
    assert names("geneval-24gb") == names("preset:geneval")


def test_a_scorer_alone_brings_what_it_reads() -> None:
    assert names("scorer:geneval") == ["clip-vit-l14", "mask2former-swin-s-coco"]
    assert names("hpsv2") == ["clip-vit-h14-tokenizer", "hpsv2.1"]
    assert names("scorer:jpeg-compressibility") == []


def test_a_presets_name_goes_before_an_entrys_or_a_scorers() -> None:
    for name in PAPER_PRESETS:
        assert names(name) == names(f"preset:{name}")
        assert "sd3.5-medium" in names(name)
    assert "pickapic" in names("pickscore")
    assert names("scorer:pickscore") == ["pickscore", "clip-vit-h14-tokenizer"]


def test_an_entrys_name_brings_the_entry_with_what_its_scorer_reads() -> None:
    assert names("imagereward") == ["imagereward", "bert-base-uncased"]


def test_what_is_typed_for_an_entry_brings_it_without_a_presets_model() -> None:
    assert argument_for(find_entry("pickscore")) == "scorer:pickscore"
    assert argument_for(find_entry("imagereward")) == "imagereward"
    for entry in load_manifest().values():
        brought = names(argument_for(entry))
        assert entry.name in brought and (entry.name == "sd3.5-medium" or "sd3.5-medium" not in brought)


def test_what_one_engine_reads_comes_with_the_scorer_and_with_a_preset_that_sets_that_engine(
    tmp_path: Path,
) -> None:
    assert names("scorer:ocr") == PADDLE
    assert [need.entry.name for need in scorer_needs("ocr", {"engine": "paddleocr"})] == PADDLE
    assert scorer_needs("ocr", {"engine": "rapidocr"}) == scorer_needs("ocr", {}) == []
    assert not set(PADDLE) & set(names("preset:ocr"))
    preset = tmp_path / "signs.toml"
    preset.write_text('name = "signs"\nextends = "ocr"\n[reward.scorers.ocr.options]\nengine = "paddleocr"\n')
    assert [need.entry.name for need in preset_needs(str(preset))] == ["sd3.5-medium", *PADDLE]


def test_each_entry_comes_once_in_the_manifests_order() -> None:
    assert names("aesthetic", "geneval", "clipscore") == [
        "sd3.5-medium",
        "clip-vit-l14",
        "mask2former-swin-s-coco",
        "aesthetic",
    ]


def test_optional_parts_come_along_unless_left_out() -> None:
    assert [need.parts for need in resolve(["sd3.5-medium"])] == [frozenset({"t5"})]
    assert [need.parts for need in resolve(["sd3.5-medium"], ["t5"])] == [frozenset()]
    with pytest.raises(UsageError, match="no optional part 't6'"):
        resolve(["sd3.5-medium"], ["t6"])


def test_presets_on_the_embedded_model_need_no_download() -> None:
    for preset in list_presets():
        if "-tiny" in preset.name:
            assert preset_needs(preset.name) == []


def test_everything_is_all_but_what_comes_on_request() -> None:
    brought = everything()
    on_request = ["deqa", *PADDLE]
    assert [need.entry.name for need in brought] == [name for name in load_manifest() if name not in on_request]
    assert [entry.name for entry in left_out(brought)] == on_request
    assert left_out(resolve([*on_request])) == []


def test_the_inventory_is_every_entry_with_its_parts() -> None:
    assert [(need.entry.name, need.parts) for need in inventory()] == [
        (name, frozenset(entry.parts)) for name, entry in load_manifest().items()
    ]
    assert all(not need.parts for need in inventory(["t5"]))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("pickscor", "Did you mean 'pickscore'"),
        ("scorer:genevall", "Did you mean 'geneval'"),
        ("preset:nothing", "no preset 'nothing'"),
    ],
)
def test_unknown_names_are_usage_errors(asked: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        resolve([asked])
    assert str(caught.value).count("'pickscore'") <= 1


def test_the_manifest_speaks_of_scorers_presets_and_commands_there_are() -> None:
    from ramctl.cli.app import COMMANDS

    there = {
        *(f"scorer:{name}" for name in available()),
        *(f"preset:{preset.name}" for preset in list_presets()),
        *(f"command:{name}" for name in COMMANDS),
    }
    # scorer:NAME.ENGINE: an engine of the scorer.
    named = {user.partition(".")[0] for entry in load_manifest().values() for user in entry.used_by}
    assert named <= there


def test_the_presets_the_manifest_names_are_those_that_read_the_entry() -> None:
    for entry in load_manifest().values():
        named = {user.removeprefix("preset:") for user in entry.used_by if user.startswith("preset:")}
        for preset in named:
            assert entry in [need.entry for need in preset_needs(preset)]


@pytest.mark.filterwarnings("ignore:.*is not the official file")
@pytest.mark.parametrize("name", ["geneval", "pickscore", "imagereward", "hpsv2", "aesthetic", "clipscore"])
def test_a_scorer_asks_for_no_entry_but_those_the_manifest_says_it_reads(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setenv(OTHER_VARIABLE, "allow")
    scorer = create(name, {"detector": "mask2former"} if name == "geneval" else {})
    asked: set[str] = set()
    for _ in range(40):
        try:
            version = scorer.version
            break
        except MissingDependencyError as error:
            path = Path(str(error).partition(" is not there: ramctl download-weights ")[0])
            assert path.is_relative_to(tmp_path), str(error)
            asked.add(path.relative_to(tmp_path).parts[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    assert version and asked == {need.entry.name for need in scorer_needs(name)}
