"""The shipped manifest, and what a manifest may hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ramctl.errors import ConfigError, UsageError
from ramctl.weights import MANIFEST_VARIABLE, find_entry, load_manifest
from ramctl.weights.manifest import check_relative

ENTRY = '[one]\nabout = "a"\nlicence = "MIT"\npage = "https://example.org"\nrepo = "team/one"\nfiles = ["a.bin"]\n'

AGREED = {
    "clip-vit-l14": "config.json model.safetensors vocab.json merges.txt tokenizer_config.json special_tokens_map.json "
    "tokenizer.json",
    "mask2former-swin-s-coco": "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    "pickscore": "config.json model.safetensors",
    "clip-vit-h14-tokenizer": "vocab.json merges.txt tokenizer_config.json special_tokens_map.json tokenizer.json",
    "imagereward": "ImageReward.pt",
    "bert-base-uncased": "vocab.txt",
    "hpsv2.1": "HPS_v2.1_compressed.pt",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth",
    "drawbench": "drawbench.csv",
    "pickapic": "train.txt test.txt",
}


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def write_and_load(text: str) -> None:
        file = tmp_path / "manifest.toml"
        file.write_text(text, encoding="utf-8")
        monkeypatch.setenv(MANIFEST_VARIABLE, str(file))
        load_manifest()

    return write_and_load


def test_the_shipped_entries_hold_the_files_that_scorers_read() -> None:
    manifest = load_manifest()
    for name, files in AGREED.items():
        assert [file.path for file in manifest[name].files] == files.split()
    assert {"sd3.5-medium", "deqa"} <= set(manifest)
    assert [entry.name for entry in manifest.values() if entry.gated] == ["sd3.5-medium"]


def test_the_base_model_is_a_whole_diffusers_folder_and_t5_a_part_of_it() -> None:
    model = find_entry("sd3.5-medium")
    folders = {file.path.partition("/")[0] for file in model.wanted(frozenset({"t5"}))}
    assert folders == {
        "model_index.json", "scheduler", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
        "tokenizer", "tokenizer_2", "tokenizer_3",
    }  # fmt: skip
    without = {file.path for file in model.wanted()}
    assert not any(path.startswith("text_encoder_3/") for path in without)
    assert model.bytes_about(frozenset({"t5"})) - model.bytes_about() > 9e9


def test_every_large_file_says_how_large_it_is_and_every_source_is_encrypted() -> None:
    for entry in load_manifest().values():
        assert urlsplit(entry.page).scheme == "https" and entry.licence and entry.used_by
        assert entry.bytes_about(frozenset(entry.parts)) > 0
        for file in entry.files:
            assert file.url is None or urlsplit(file.url).scheme == "https"
            if file.path.endswith((".safetensors", ".pt", ".pth")):
                assert file.bytes_about > 1e6, file.path
            # Whatever is not on the hub is vouched for by nobody but us.
            assert entry.repo or file.sha256 or file.sha256_starts or file.rows_at_least, file.path


def test_pickled_weights_have_a_hash_of_their_own() -> None:
    for entry in load_manifest().values():
        for file in entry.files:
            if file.path.endswith((".pt", ".pth")):
                assert file.sha256 or file.sha256_starts


def test_addresses_are_quoted() -> None:
    assert find_entry("aesthetic").files[0].url is not None
    assert find_entry("aesthetic").files[0].url.endswith("/sac%2Blogos%2Bava1-l14-linearMSE.pth")


def test_unknown_entries_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="Did you mean 'clip-vit-l14'"):
        find_entry("clip-vit-l-14")


def test_another_manifest_and_its_changes_are_seen(read: Callable[[str], None]) -> None:
    read(ENTRY)
    assert list(load_manifest()) == ["one"]
    read(ENTRY.replace("[one]", "[other]"))
    assert list(load_manifest()) == ["other"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("licence", "license"), "unknown key 'license'. Did you mean 'licence'"),
        (('about = "a"\n', ""), "`about` is missing"),
        (('["a.bin"]', '"a.bin"'), "must be of type list"),
        (('"a.bin"', '{ path = "a.bin", size = "3" }'), "must be of type int"),
        (('"a.bin"', '{ path = "a.bin", size = 0 }'), "must be above 0"),
        (('"a.bin"', '{ path = "a.bin", sha256 = "ABC" }'), "64 lower-case hex digits"),
        (('"a.bin"', '{ path = "a.bin", sha256_starts = "abc" }'), "8 or more"),
        (('"a.bin"', '{ path = "a.bin", sha = "abc" }'), "unknown key 'sha'"),
        (('"a.bin"', '"../a.bin"'), "leads out of its folder"),
        (('"a.bin"', '"a.bin", "a.bin"'), "listed twice"),
        (('"a.bin"', "3"), "a path or a table"),
        (('repo = "team/one"\n', ""), "give `repo`, or a `url`"),
        (('repo = "team/one"\n', 'repo = "team/one"\nkind = "space"\n'), "'model' or 'dataset'"),
        (('repo = "team/one"\n', 'repo = "team/one"\nused_by = ["geneval"]\n'), "scorer:NAME"),
        (("[one]", "[One]"), "lower-case"),
        (("[one]", "[one"), "cannot be read"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_place(
    change: tuple[str, str], said: str, read: Callable[[str], None]
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read(ENTRY.replace(*change))
    assert "manifest.toml" in str(caught.value)


def test_a_manifest_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(MANIFEST_VARIABLE, str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read"):
        load_manifest()


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../up", "a/../../up", "a\\b", ".ramctl.json", "."])
def test_paths_stay_in_their_folder(path: str) -> None:
    with pytest.raises(ConfigError):
        check_relative(path, "here")
