"""DeQA through its real runner, on a stand-in model folder: numbers, failures, restarts, what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ramctl.errors import MissingDependencyError, RamctlError, ScorerError, UsageError
from ramctl.hashing import file_sha256
from ramctl.prompts import Prompt
from ramctl.scorers import registry
from ramctl.scorers.base import Images, Scores
from ramctl.scorers.deqa import environment
from ramctl.scorers.deqa import scorer as module
from ramctl.scorers.deqa.scorer import DeqaScorer, model_files
from ramctl.weights.store import Record, Recorded, write_record

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
#: What the stand-in does at pictures of these colours (conftest.py).
CRASH, ERROR, NOT_A_NUMBER, FULL_ABOVE_TWO = 255, 1, 2, 4


def plain(*colours: int | tuple[int, int, int], height: int = 64, width: int = 64) -> Images:
    return np.stack([np.full((height, width, 3), colour, dtype=np.uint8) for colour in colours])


def score(scorer: DeqaScorer, images: Images, prompt: str = "a cat") -> Scores:
    return scorer.score(images, [Prompt(prompt)] * len(images))


def expected_score(weights: dict[str, torch.Tensor], mean_colour: np.ndarray) -> float:
    """The expectation of 5, 4, 3, 2, 1 under the stand-in's levels for a picture of this mean colour in [0, 1]."""
    logits = weights["levels.weight"].double().numpy() @ ((mean_colour - MEAN) / STD) + weights["levels.bias"].numpy()
    odds = np.exp(logits - logits.max())
    return float(odds @ np.array([5.0, 4, 3, 2, 1]) / odds.sum())


def make(**options: object) -> DeqaScorer:
    return DeqaScorer(**{"python": sys.executable, "device": "cpu", "dtype": "float32", **options})  # type: ignore[arg-type]


# --- numbers


@pytest.fixture(scope="module")
def scorer(shared_store: Path) -> Iterator[DeqaScorer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAMCTL_WEIGHTS", str(shared_store))
        made = make()
        made.ensure_loaded()
    yield made
    made.close()


@pytest.fixture(scope="module")
def weights(shared_store: Path) -> dict[str, torch.Tensor]:
    return load_file(shared_store / "deqa" / "model.safetensors")


@pytest.mark.slow
def test_the_value_is_a_fifth_of_the_expected_level(scorer: DeqaScorer, weights: dict[str, torch.Tensor]) -> None:
    colours = [(0, 0, 0), (200, 30, 90), (20, 250, 128)]
    scores = score(scorer, plain(*colours))
    expected = [expected_score(weights, np.array(colour) / 255) for colour in colours]
    assert not scores.failed.any(), scores.errors
    np.testing.assert_allclose(scores.details["score"], expected, atol=1e-4)
    np.testing.assert_allclose(scores.value, np.array(expected) / 5, atol=1e-4)
    assert max(expected) - min(expected) > 0.5


@pytest.mark.slow
def test_a_picture_that_is_not_square_is_padded(scorer: DeqaScorer, weights: dict[str, torch.Tensor]) -> None:
    mean_colour = np.mean([(200, 30, 90), (122, 116, 104)], axis=0)
    found = score(scorer, plain((200, 30, 90), height=448, width=224)).details["score"]
    assert found[0] == pytest.approx(expected_score(weights, mean_colour / 255), abs=1e-4)


@pytest.mark.slow
def test_a_batch_of_one_and_of_eight_agree_and_the_prompt_plays_no_part(
    scorer: DeqaScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 250, (9, 50, 70, 3), dtype=np.uint8)
    together = score(scorer, images).value
    monkeypatch.setattr(scorer, "_size", 1)
    np.testing.assert_allclose(score(scorer, images, "").value, together, atol=1e-6)
    assert len(set(together.tolist())) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "images",
    [
        pytest.param(plain(0, height=1, width=1), id="1x1"),
        pytest.param(plain(90, height=1, width=500), id="1x500"),
        pytest.param(plain(254, height=2048, width=2048), id="large"),
        pytest.param(plain(9, height=33, width=61)[:, :, ::-1], id="a view that is not contiguous"),
    ],
)
def test_odd_pictures_are_scored(scorer: DeqaScorer, images: Images) -> None:
    scores = score(scorer, images)
    assert not scores.failed[0], scores.errors
    assert 0.2 <= scores.value[0] <= 1


@pytest.mark.slow
def test_bad_pictures_fail_alone_or_with_their_batch_and_the_child_goes_on(
    scorer: DeqaScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(score(scorer, plain(7)[:0])) == 0
    empty = score(scorer, np.zeros((2, 0, 5, 3), dtype=np.uint8))
    assert list(empty.errors) == ["the picture has no pixels"] * 2
    child = scorer._child
    mixed = score(scorer, plain(7, NOT_A_NUMBER, 9))
    assert mixed.failed.tolist() == [False, True, False]
    assert mixed.errors[1] == "DeQA: the model's answer is not a finite number"
    monkeypatch.setattr(scorer, "_size", 2)
    broken = score(scorer, plain(7, ERROR, 9))
    assert broken.failed.tolist() == [True, True, False]
    assert broken.errors[0] == "DeQA: RuntimeError: first line"
    assert scorer._child is child


@pytest.mark.slow
def test_a_full_gpu_halves_the_batch_once(scorer: DeqaScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_size", 4), ("_halved", False)):
        monkeypatch.setattr(scorer, name, value)
    scores = score(scorer, plain(*[FULL_ABOVE_TWO] * 5))
    assert not scores.failed.any() and scorer._size == 2
    monkeypatch.setattr(scorer, "_size", 8)
    with pytest.raises(RamctlError, match=r"deqa.*8 images a time.*batch_size"):
        score(scorer, plain(*[FULL_ABOVE_TWO] * 8))


@pytest.mark.slow
def test_the_self_test_says_what_it_saw(scorer: DeqaScorer) -> None:
    result = scorer.self_test()
    assert result.summary.startswith("a drawn landscape scores ")


# --- the child breaks


@pytest.mark.slow
def test_a_crash_fails_its_pictures_after_one_restart_and_restarts_come_to_an_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_RESTARTS", 2)
    scorer = make(batch_size=2)
    scorer.ensure_loaded()
    started: list[int] = []
    original = scorer._start
    monkeypatch.setattr(scorer, "_start", lambda: (started.append(1), original()))
    first = score(scorer, plain(7, CRASH, 9, 11))
    assert first.failed.tolist() == [True, True, False, False]
    died = "DeQA: DeQA's process ended with code 3: the white picture broke me"
    assert list(first.errors) == [died, died, None, None]
    assert len(started) == 2  # for the same batch once more, and for the next
    second = score(scorer, plain(CRASH, 7, 9))
    assert second.failed.all() and len(started) == 2
    assert all(error is not None and "is not started again" in error for error in second.errors)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_model_that_is_not_whole_or_another_is_refused(folder: Path, what: str) -> None:
    if what == "weights":
        save_file({"levels.bias": torch.zeros(5)}, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "preferential_ids": [1, 2, 3, 4, 5]}))
    with pytest.raises(ScorerError) as caught:
        make().ensure_loaded()
    assert ("lack 1 tensors: levels.weight" if what == "weights" else "numbers the five quality words [1, 2") in str(
        caught.value
    )
    assert "known to work with 4.36.1" in str(caught.value)  # this test's interpreter has another release


# --- what is missing, and options: no child needed


def test_an_interpreter_without_the_packages_is_named(folder: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    with pytest.raises(MissingDependencyError, match=r"bare/bin/python.*No module named.*deqa\.environment"):
        make(python=str(tmp_path / "bare" / "bin" / "python")).ensure_loaded()


def test_a_program_that_is_no_interpreter_is_named(folder: Path) -> None:
    with pytest.raises(ScorerError, match=r"DeQA does not start with /bin/false: .* ended with code 1"):
        make(python="/bin/false").ensure_loaded()


def test_without_environment_the_command_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAMCTL_DEQA_PYTHON", raising=False)
    with pytest.raises(MissingDependencyError, match=r"python -m ramctl\.scorers\.deqa\.environment"):
        make(python="").ensure_loaded()


def test_without_the_model_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path / "nothing"))
    for use in (lambda: make().ensure_loaded(), lambda: make().version):
        with pytest.raises(MissingDependencyError, match="ramctl download-weights deqa"):
            use()


@pytest.mark.parametrize("file", ["modeling_stand_in.py", "model.safetensors"])
def test_an_incomplete_folder_is_named_before_anything_starts(folder: Path, file: str) -> None:
    (folder / file).unlink()
    for use in (lambda: make().ensure_loaded(), lambda: make().version):
        with pytest.raises(MissingDependencyError, match=rf"{file}.*ramctl download-weights deqa"):
            use()


@pytest.mark.parametrize("file", ["model.safetensors", "modeling_stand_in.py"])
def test_files_that_changed_since_their_download_are_refused_before_anything_starts(
    folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAMCTL_OTHER_WEIGHTS")
    came = {path.name: Recorded(path.stat().st_size, file_sha256(path)) for path in folder.iterdir()}
    write_record(folder, Record(came, {name: recorded.size for name, recorded in came.items()}))
    before = make().version
    content = bytearray((folder / file).read_bytes())
    content[-2] ^= 1
    (folder / file).write_bytes(content)
    os.utime(folder / file, ns=(1, 1))
    monkeypatch.setattr(module, "Child", pytest.fail)
    said = rf"{file} has changed since it was downloaded: SHA-256 \w+, expected {came[file].sha256}"
    for use in (lambda: make().ensure_loaded(), lambda: make().version):
        with pytest.raises(MissingDependencyError, match=said):
            use()
    monkeypatch.setenv("RAMCTL_OTHER_WEIGHTS", "allow")
    with pytest.warns(UserWarning, match=said):
        assert make().version != before


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingDependencyError, match=r"lacks 1 .*model-00002-of-00002"):
        model_files(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model_type": "llama"}', '{"auto_map": {"AutoModelForCausalLM": "a--b.C"}}']
)
def test_a_configuration_of_something_else_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ScorerError, match=r"config\.json.*ramctl download-weights deqa --verify"):
        make().ensure_loaded()
    with pytest.raises(MissingDependencyError):
        _ = make().version


def test_the_version_names_everything_the_number_depends_on(folder: Path) -> None:
    before = make().version
    assert before.startswith("deqa/deqa-mix3-1/model-") and before.endswith("/float32")
    assert make(dtype="float16").version != before
    assert make(batch_size=3).version == before
    (folder / "second_helper.py").write_text("IDS = [1, 2, 3, 4, 5]\n")
    assert make().version != before


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int8"},
        {"batch_size": 0},
        {"timeout": 0},
        {"start_timeout": -1},
        {"timeout": float("nan")},
        {"gpu": 1},
    ],
    ids=str,
)
def test_wrong_options_are_refused_at_once(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="deqa"):
        registry.create("deqa", options)


def test_an_absent_environment_counts_as_missing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights being there is not enough: doctor and evaluate ask this before anything is drawn."""
    assert make().missing() == []
    (line,) = make(python=str(tmp_path / "python")).missing()
    assert environment.COMMAND in line
