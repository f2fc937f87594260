"""A whole run in its folder: files, resume, rewinding, damage, divergence, a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ramctl import training
from ramctl.engine.checkpoint import CheckpointStore, damage, find_checkpoint
from ramctl.engine.distributed import World
from ramctl.engine.trainer import Trainer
from ramctl.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    RunFolderError,
    ScorerError,
)
from ramctl.observer import SilentObserver
from ramctl.runfolder import RunFolder
from ramctl.scorers.base import Images, ImageScore
from ramctl.scorers.jpeg import JpegCompressibility
from ramctl.settings import load_settings
from ramctl.training import Outcome, Run, config_rows, make_reward, train
from tests.training_runs import (  # noqa: F401
    Listener,
    Start,
    broken_pictures,
    finished_fixture,
    half_fixture,
    plain_report_fixture,
    rows,
    start_fixture,
    tensors,
)

# -- a run from its start to its end


def test_a_finished_run_tells_what_happened(finished: tuple[Outcome, Listener]) -> None:
    outcome, listener = finished
    assert (outcome.status, outcome.step, outcome.reason) == ("finished", 4, "")
    assert listener.first == 0
    assert listener.steps == [1, 2, 3, 4]
    assert listener.evaluations == [0, 2, 4]
    assert [row["step"] for row in outcome.evaluations] == [0, 2, 4]
    (comparison,) = outcome.comparisons
    assert comparison.name == "value"
    assert comparison.count == 6
    assert comparison.low is not None
    assert comparison.high is not None
    assert comparison.low <= comparison.after - comparison.before <= comparison.high
    assert comparison.before == pytest.approx(outcome.evaluations[0]["eval/mean"])
    assert comparison.after == pytest.approx(outcome.evaluations[-1]["eval/mean"])
    assert outcome.best is not None
    assert damage(outcome.best) is None


def test_a_finished_run_leaves_its_files(finished: tuple[Outcome, Listener]) -> None:
    folder = finished[0].folder
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    assert all("images/edges" in row for row in rows(folder))
    assert list(CheckpointStore(folder).steps()) == [2, 4]
    assert find_checkpoint(folder / "latest").name == "step-000004"
    for step in (0, 2, 4):
        with Image.open(folder / "samples" / f"step-{step:06d}.png") as picture:
            assert picture.width >= 128
    page = (folder / "report.html").read_text()
    assert "tiny-test" in page
    assert "finished" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert not [path.name for path in folder.iterdir() if path.name.endswith((".tmp", ".old"))]


def test_the_written_config_starts_the_same_experiment(finished: tuple[Outcome, Listener], tiny_preset: Path) -> None:
    folder = finished[0].folder
    settings = load_settings(str(folder / "config.toml"))
    assert settings.config.train.steps == 4
    assert settings.config.optimizer == load_settings(str(tiny_preset)).config.optimizer
    assert "steps = 4  # command line" in (folder / "config.toml").read_text()
    shown = {row.key: row.value for row in config_rows(settings)}
    assert shown["optimizer.lr"] == 2e-2
    assert shown["reward.scorers.jpeg-compressibility.weight"] == 1.0


# -- resume


def test_a_resumed_run_is_the_run_that_was_never_interrupted(
    start: Start, finished: tuple[Outcome, Listener], half: Path
) -> None:
    listener = Listener()
    outcome = start(half, observer=listener)
    assert outcome.status == "finished"
    assert listener.first == 2
    assert listener.steps == [3, 4]
    assert listener.evaluations == [4]
    assert any("Resuming from" in note and "step-000002 (step 2)" in note for note in listener.notes)
    whole = finished[0].folder
    assert rows(half) == rows(whole)
    assert rows(half, "evaluations.jsonl") == rows(whole, "evaluations.jsonl")
    assert tensors(half / "step-000004") == tensors(whole / "step-000004")
    assert outcome.comparisons == finished[0].comparisons
    assert outcome.seconds > json.loads((half / "step-000002" / "state.json").read_text())["seconds"]
    assert (half / "report.html").is_file()


@pytest.mark.usefixtures("plain_report")
def test_a_finished_run_does_nothing_more_and_more_steps_go_on(start: Start, half: Path) -> None:
    start(half)
    before = tensors(half / "step-000004")
    listener = Listener()
    start(half, observer=listener)
    assert listener.steps == listener.evaluations == []
    assert tensors(half / "step-000004") == before
    outcome = start(half, ("train.steps", "5"), observer=listener)
    assert listener.steps == [5]
    assert outcome.step == 5
    assert find_checkpoint(half / "latest").name == "step-000005"


@pytest.mark.usefixtures("plain_report")
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    start: Start, finished: tuple[Outcome, Listener], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0].folder, folder, symlinks=True)
    whole = tensors(folder / "step-000004")
    broken = folder / "step-000004" / "optimizer.safetensors"
    data = bytearray(broken.read_bytes())
    data[200] ^= 4
    broken.write_bytes(data)
    listener = Listener()
    start(folder, observer=listener)
    assert any(f"Damaged checkpoint left aside: {broken} is damaged" in note for note in listener.notes)
    assert listener.steps == [3, 4]
    assert tensors(folder / "step-000004") == whole
    assert damage(folder / "step-000004") is None


def test_with_every_checkpoint_damaged_nothing_is_started(start: Start, half: Path) -> None:
    (half / "step-000002" / "state.json").write_text("{}")
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(CheckpointError, match=r"No intact checkpoint .*state\.json is damaged.*--fresh"):
        start(half)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.usefixtures("plain_report")
def test_leftovers_of_a_kill_are_swept(start: Start, half: Path) -> None:
    (half / ".step-000003.77.tmp").mkdir()
    (half / ".step-000003.77.tmp" / "optimizer.safetensors").write_bytes(b"half")
    (half / ".latest.77.tmp").symlink_to("step-000003")
    (half / ".config.toml.77.tmp").write_text("na")
    start(half, ("train.steps", "3"))
    assert [path.name for path in half.iterdir() if path.name.startswith(".")] == [".lock"]


@pytest.mark.usefixtures("plain_report")
def test_a_changed_experiment_is_refused_and_fresh_starts_beside(start: Start, half: Path) -> None:
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.02 → 0\.001.*--fresh"):
        start(half, ("optimizer.lr", "1e-3"))
    outcome = start(half, ("optimizer.lr", "1e-3"), ("train.steps", "1"), ("prompts.evaluation", "none"), fresh=True)
    assert outcome.folder == half.with_name("half-2")
    assert outcome.step == 1
    assert {path: path.read_bytes() for path in before} == before


# -- what is refused before anything is drawn


def test_prompts_without_the_scorers_fields_name_file_line_and_key(start: Start, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a ring", "tag": "x", "include": []}\n{"prompt": "a star"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl: Prompt 2 \('a star'\) has no .*'include'.*'geneval'"):
        start(
            tmp_path / "run",
            ("prompts.train", str(tmp_path / "train.jsonl")),
            ("reward.scorers.geneval.weight", "1"),
        )


def test_held_out_prompts_are_checked_too(start: Start, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "a star"}\n')
    with pytest.raises(DataError, match=r"test\.jsonl: Prompt 1 "):
        start(
            tmp_path / "run",
            ("prompts.evaluation", str(tmp_path / "test.jsonl")),
            ("reward.scorers.geneval.weight", "1"),
        )


def test_a_broken_scorer_is_not_trained_on(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramctl.scorers.jpeg.QUALITY", 5)
    with pytest.raises(ScorerError, match="'jpeg-compressibility' fails its self-test: flat"):
        start(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_more_processes_than_pictures_are_refused(tiny_preset: Path, tmp_path: Path) -> None:
    run = Run(load_settings(str(tiny_preset)), RunFolder(tmp_path), World(0, 5), torch.device("cpu"), SilentObserver())
    with pytest.raises(ConfigError, match="5 processes cannot share 4 pictures per step"):
        run.go()


def test_a_second_run_in_the_same_folder_is_refused(start: Start, half: Path) -> None:
    with RunFolder(half).locked(), pytest.raises(RunFolderError, match=rf"in use by process {os.getpid()} on"):
        start(half)


# -- failures on the way


def brightness(image: Images) -> float:
    return float(image.mean()) / 255


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize(("value", "said"), [(None, "unreadable picture"), (float("nan"), "non-finite value")])
def test_too_many_failed_pictures_stop_the_run_with_the_last_checkpoint_intact(
    start: Start, half: Path, monkeypatch: pytest.MonkeyPatch, value: float | None, said: str
) -> None:
    before = tensors(half / "step-000002")
    broken_pictures(monkeypatch, from_picture=4, every=2, value=value)  # the first step is clean
    with pytest.raises(ScorerError, match=rf"Step 4: 2 of 4 pictures could not be scored .*{said}"):
        start(half)
    assert find_checkpoint(half / "latest").name == "step-000002"
    assert tensors(half / "step-000002") == before
    assert [row["step"] for row in rows(half)] == [1, 2, 3]
    assert "could not be scored" in (half / "report.html").read_text()


@pytest.mark.usefixtures("plain_report")
def test_a_few_failed_pictures_are_counted_and_the_run_goes_on(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_pictures(monkeypatch, from_picture=0, every=4, value=float("nan"))
    options = ("max_failed_share", "0.3"), ("train.steps", "2"), ("prompts.evaluation", "none")
    outcome = start(tmp_path / "run", *options)
    assert outcome.status == "finished"
    assert [row["reward/failed"] for row in rows(tmp_path / "run")] == [0.25, 0.25]
    assert all(isinstance(row["reward/mean"], float) for row in rows(tmp_path / "run"))


@pytest.mark.usefixtures("plain_report")
def test_a_scorer_with_one_value_for_all_pictures_is_told_of_once(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JpegCompressibility, "score_image", lambda self, image, prompt: ImageScore(0.1))
    listener = Listener()
    options = ("train.steps", "2"), ("prompts.evaluation", "none"), ("reward.self_test", "false")
    start(tmp_path / "run", *options, observer=listener)
    told = [note for note in listener.notes if "the same for all 4 pictures" in note]
    assert len(told) == 1
    assert told[0].startswith("Step 1: the reward was")


@pytest.mark.usefixtures("plain_report")
def test_a_non_finite_loss_names_step_and_pictures_and_keeps_the_last_checkpoint(
    start: Start, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Trainer._target

    def poisoned(self: Trainer, *arguments: object) -> torch.Tensor:
        result = target(self, *arguments)  # type: ignore[arg-type]
        if self.step_index == 3:
            result[0] = float("nan")
        return result

    monkeypatch.setattr(Trainer, "_target", poisoned)
    before = tensors(half / "step-000002")
    with pytest.raises(DivergedError, match=r"Step 4: the loss of 1 of 4 pictures is not finite \(numbers 0\)"):
        start(half)
    monkeypatch.undo()
    assert tensors(half / "step-000002") == before
    assert find_checkpoint(half / "latest").name == "step-000002"
    assert start(half).status == "finished"


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize("where", ["metrics.jsonl", "checkpoint", pytest.param("samples", marks=pytest.mark.slow)])
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_intact(
    start: Start, half: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = tensors(half / "step-000002")
    if where == "metrics.jsonl":
        monkeypatch.setattr(RunFolder, "append", full)
    elif where == "checkpoint":
        monkeypatch.setattr("safetensors.torch.save_file", full)
    else:
        monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left") as caught:
        start(half)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert tensors(half / "step-000002") == before
    # An evaluation that fails comes after the step's checkpoint.
    assert find_checkpoint(half / "latest").name == ("step-000004" if where == "samples" else "step-000002")
    assert not [path.name for path in half.iterdir() if path.name.endswith(".tmp")]
    outcome = start(half)
    assert (outcome.status, outcome.step) == ("finished", 4)
    assert [row["step"] for row in rows(half)] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(half, "evaluations.jsonl")] == [0, 2, 4]


def test_a_report_that_cannot_be_written_does_not_hide_the_failure(
    start: Start, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    broken_pictures(monkeypatch, from_picture=0, every=1, value=None)
    monkeypatch.setattr(training, "write_report", full)
    with pytest.raises(ScorerError, match="4 of 4 pictures"):
        start(half)


@pytest.mark.usefixtures("plain_report")
def test_an_interrupt_writes_the_report_and_the_run_can_go_on(
    start: Start, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer) -> object:
        if self.step_index == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(half)
    assert (half / "report.html").read_text() == "stopped interrupted"
    monkeypatch.setattr(Trainer, "step", step)
    assert start(half).step == 4


# -- divergence


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize("held_out", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_absurd_rate_stops_the_run_and_the_best_checkpoint_is_named(
    start: Start, tmp_path: Path, held_out: bool
) -> None:
    options = [
        ("reward_multiplier", "100"),
        ("optimizer.lr", "0.02"),
        ("train.steps", "40"),
        ("evaluation.every", "4"),
        ("checkpoint.every", "4"),
    ]
    if not held_out:
        options.append(("prompts.evaluation", "none"))
    outcome = start(tmp_path / "run", *options)
    assert outcome.status == "stopped"
    assert 16 <= outcome.step < 40
    assert "the reward fell" in outcome.reason
    assert "the drift from the reference grew" in outcome.reason
    assert outcome.best is not None
    assert damage(outcome.best) is None
    assert int(outcome.best.name.removeprefix("step-")) < outcome.step
    assert find_checkpoint(tmp_path / "run" / "latest").name == f"step-{outcome.step:06d}"
    assert "stopped" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.usefixtures("plain_report")
def test_without_the_guard_a_bad_run_goes_on(start: Start, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ramctl.engine.guard.Guard.update", lambda *arguments: "it is hopeless")
    copy = half.with_name("copy")
    shutil.copytree(half, copy, symlinks=True)
    assert start(half, ("train.guard", "false")).step == 4
    outcome = start(copy)
    assert (outcome.status, outcome.step, outcome.reason) == ("stopped", 3, "it is hopeless")
    assert find_checkpoint(copy / "latest").name == "step-000003"


def test_the_rewards_terms_come_from_the_preset(tiny_preset: Path) -> None:
    settings = load_settings(
        str(tiny_preset),
        overrides=[
            ("reward.scorers.geneval.weight", "0.5"),
            ("reward.scorers.geneval.scale", "4"),
            ("reward.scorers.geneval.output", "strict"),
            ("reward.scorers.geneval.offset", "0.25"),
        ],
    )
    reward = make_reward(settings.config)
    assert reward.names == ["jpeg-compressibility", "geneval"]
    terms = [(term.weight, term.scale, term.output, term.offset) for term in reward.terms]
    assert terms == [(1, 1, "value", 0), (0.5, 4, "strict", 0.25)]


def test_an_output_no_scorer_reports_stops_the_run_before_the_model_is_loaded(
    tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ramctl.training.load_backbone", lambda *_: pytest.fail("the model was loaded"))
    settings = load_settings(
        str(tiny_preset),
        overrides=[("reward.scorers.jpeg-compressibility.output", "kilobyte"), ("reward.self_test", "false")],
    )
    with pytest.raises(ConfigError, match=r"output is 'kilobyte'.*Did you mean 'kilobytes'\?"):
        train(settings, output=tmp_path / "run")


def test_rollouts_in_8_bits_are_refused_before_anything_is_loaded_where_there_are_none(
    tiny_preset: Path, tmp_path: Path
) -> None:
    keys = [("rollout.float8", "true"), ("runtime.compile", "true"), ("precision", "bfloat16"), ("device", "cpu")]
    settings = load_settings(str(tiny_preset), overrides=keys)
    with pytest.raises(ConfigError, match=r"rollout\.float8 needs a GPU.*which cpu is not\. Leave it false"):
        train(settings, output=tmp_path / "run")
    assert not list((tmp_path / "run").glob("step-*"))


def test_rollouts_in_8_bits_go_with_compiling_only(tiny_preset: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.float8 pays in compiled blocks only.*runtime\.compile = true"):
        load_settings(str(tiny_preset), overrides=[("rollout.float8", "true"), ("precision", "bfloat16")])
