"""The scorers' share of a plan's memory: sizes of the published files in the precision a scorer loads them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ramctl.config import Config
from ramctl.plan import SCORERS, make_plan
from ramctl.plan_scorers import _NETWORKS, ScorerWeights, scorer_weights
from ramctl.scorers.registry import available
from ramctl.settings import load_settings
from ramctl.weights import find_entry, load_manifest

CLIP = 1_710_540_580  # float32, as published
DETECTOR = 275_000_000
HPS = 1_972_490_005  # float16
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def config(scorers: dict[str, dict[str, Any]], model: str = "models/no-such") -> Config:
    table = load_settings("geneval-tiny").config.model_dump()
    table["reward"]["scorers"] = {name: {"options": options} for name, options in scorers.items()}
    table["model"]["path"] = model
    return Config.model_validate(table)


def planned(scorers: dict[str, dict[str, Any]], device: torch.device = GPU, processes: int = 1) -> ScorerWeights:
    return scorer_weights(config(scorers), device, processes)


@pytest.mark.parametrize(
    ("scorers", "expected"),
    [
        ({"geneval": {"detector": "mask2former"}}, DETECTOR + CLIP),
        ({"geneval": {"detector": "mask2former", "dtype": "bfloat16"}}, DETECTOR + CLIP // 2),  # autocast: float32 kept
        ({"geneval": {"detector": "tinyworld"}}, 0),
        ({"clipscore": {}, "aesthetic": {}, "geneval": {"detector": "mask2former"}}, DETECTOR + CLIP),  # one CLIP
        ({"clipscore": {}, "aesthetic": {"dtype": "float16"}}, CLIP + CLIP // 2),
        ({"hpsv2": {}}, 2 * HPS),
        ({"hpsv2": {"dtype": "float16"}}, HPS),
        ({"ocr": {}, "jpeg-compressibility": {}}, 0),
    ],
)
def test_weights_count_once_in_the_precision_they_are_loaded_in(
    scorers: dict[str, dict[str, Any]], expected: int
) -> None:
    assert planned(scorers) == ScorerWeights(expected, ())


@pytest.mark.parametrize(
    ("option", "device", "processes", "counted"),
    [
        ("auto", GPU, 1, True),
        ("cuda", GPU, 1, True),
        ("cpu", GPU, 1, False),
        ("cpu", CPU, 1, True),
        ("cuda:1", GPU, 1, False),
        ("cuda:1", GPU, 2, True),
        ("cuda:0", CPU, 1, False),
    ],
)
def test_weights_count_where_they_are(option: str, device: torch.device, processes: int, counted: bool) -> None:
    assert planned({"clipscore": {"device": option}}, device, processes).total == counted * CLIP


@pytest.mark.parametrize("gpu", [False, True])
def test_a_run_on_the_cpu_shares_its_memory_with_scorers_that_find_no_gpu(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert planned({"clipscore": {}}, CPU).total == (0 if gpu else CLIP)


def test_weights_of_unknown_size_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paddle = {"ocr": {"engine": "paddleocr"}}
    assert planned(paddle) == ScorerWeights(0, ("ocr",))
    assert planned({"ocr": {"engine": "paddleocr", "device": "cpu"}}).unknown == ()
    own = tmp_path / "manifest.toml"
    own.write_text("")
    monkeypatch.setenv("RAMCTL_MANIFEST", str(own))
    assert planned({"clipscore": {}}) == ScorerWeights(0, ("clipscore",))


def test_every_scorer_with_large_downloads_is_known_with_all_of_them() -> None:
    for name in available():
        users = [entry for entry in load_manifest().values() if f"scorer:{name}" in entry.used_by]
        large = {entry.name for entry in users if entry.bytes_about() > 100_000_000}
        assert {network.entry for network in _NETWORKS.get(name, ())} == large
        for network in _NETWORKS.get(name, ()):
            assert network.file is None or network.file in {file.path for file in find_entry(network.entry).files}


def test_they_are_there_through_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path))
    small = {"rollout": 2, "train": 2}
    table = config({"clipscore": {}}, "models/tinyworld").model_dump()
    for section, size in small.items():
        table[section]["micro_batch"] = size
    table["train"]["sweep_micro_batch"] = 2
    settings = Config.model_validate(table)
    table["reward"]["scorers"] = {"jpeg-compressibility": {}}
    without = make_plan(Config.model_validate(table), 1, "cuda").memory
    memory = make_plan(settings, 1, "cuda").memory
    assert memory is not None and without is not None
    assert memory.resident[SCORERS] == CLIP
    assert {name: memory.phases[name] - without.phases[name] for name in memory.phases} == dict.fromkeys(
        memory.phases, CLIP
    )
