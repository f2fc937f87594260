"""A run's evaluations: after the checkpoint that they are of, made up for after a kill, each in its own row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ramctl import training
from ramctl.engine.checkpoint import CheckpointStore, find_checkpoint
from ramctl.engine.guard import Guard
from ramctl.errors import (
    ConfigError,
    OutOfMemoryError,
    RunFolderError,
    ScorerError,
)
from ramctl.hashing import file_sha256
from ramctl.training import Outcome
from tests.training_runs import (  # noqa: F401
    Listener,
    Start,
    broken_pictures,
    change_state,
    failing_evaluation,
    finished_fixture,
    half_fixture,
    plain_report_fixture,
    rows,
    start_fixture,
    tensors,
)


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize("error", [OutOfMemoryError("full"), KeyboardInterrupt()], ids=["failure", "kill"])
def test_what_goes_wrong_in_an_evaluation_costs_no_weights_and_is_made_up_for_once(
    start: Start,
    finished: tuple[Outcome, Listener],
    half: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    whole = finished[0].folder
    failing_evaluation(monkeypatch, error)
    with pytest.raises(type(error)):
        start(half)
    assert tensors(half / "step-000004") == tensors(whole / "step-000004")
    assert find_checkpoint(half / "latest").name == "step-000004"
    assert [row["step"] for row in rows(half, "evaluations.jsonl")] == [0, 2]
    monkeypatch.undo()
    listener = Listener()
    outcome = start(half, observer=listener)
    assert (listener.steps, listener.evaluations) == ([], [4])
    assert rows(half) == rows(whole)
    assert rows(half, "evaluations.jsonl") == rows(whole, "evaluations.jsonl")
    assert outcome.comparisons == finished[0].comparisons
    assert (half / "best").readlink() == (whole / "best").readlink()
    start(half, observer=listener)
    assert listener.evaluations == [4]


@pytest.mark.usefixtures("plain_report")
@pytest.mark.parametrize(("value", "stopped", "best"), [(99, None, 4), (99, "it is hopeless", 2), (-99, None, 2)])
def test_a_kill_before_the_best_checkpoint_is_marked_is_made_up_for(
    start: Start, finished: tuple[Outcome, Listener], tmp_path: Path, value: float, stopped: str | None, best: int
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0].folder, folder, symlinks=True)
    evaluations = rows(folder, "evaluations.jsonl")
    evaluations[-1]["eval/mean"] = value
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    change_state(folder / "step-000004", stopped=stopped)
    (folder / "best").unlink()
    (folder / "best").symlink_to("step-000002")
    listener = Listener()
    outcome = start(folder, observer=listener)
    assert listener.evaluations == []
    assert outcome.best == folder / f"step-00000{best}"


@pytest.mark.usefixtures("plain_report")
def test_a_checkpoint_knows_the_best_value_before_it_and_the_pointer_moves_after_its_evaluation(
    start: Start, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_state(half / "step-000002", best_value=-1000.0, evaluation_due=None)  # as if nothing good had been seen
    assert (half / "best").readlink() == Path("step-000002")
    start(half, ("checkpoint.keep", "1"))
    assert (half / "best").readlink() == Path("step-000004")
    assert list(CheckpointStore(half).steps()) == [4]
    state = json.loads((half / "step-000004" / "state.json").read_text())
    assert state["best_value"] == -1000
    assert state["evaluation_due"] is True


@pytest.mark.usefixtures("plain_report")
def test_a_run_killed_when_the_guard_stopped_it_is_stopped_after_the_evaluation(
    start: Start, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guard, "update", lambda *arguments: "it is hopeless")
    failing_evaluation(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        start(half)
    monkeypatch.undo()
    monkeypatch.setattr(training, "write_report", lambda *arguments: None)
    listener = Listener()
    outcome = start(half, observer=listener)
    assert (outcome.status, outcome.step, outcome.reason) == ("stopped", 3, "it is hopeless")
    assert (listener.steps, listener.evaluations) == ([], [3])
    assert outcome.best == half / "step-000002"


@pytest.mark.usefixtures("plain_report")
def test_held_out_pictures_that_cannot_be_scored_stop_the_run_and_it_can_go_on(
    start: Start, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_pictures(monkeypatch, from_picture=8, every=1, value=None)  # steps 3 and 4 have four pictures each
    with pytest.raises(ScorerError, match=r"Held-out evaluation at step 4: 6 of 6 pictures .*unreadable picture"):
        start(half)
    assert find_checkpoint(half / "latest").name == "step-000004"
    monkeypatch.undo()
    monkeypatch.setattr(training, "write_report", lambda *arguments: None)
    assert start(half).status == "finished"


@pytest.mark.parametrize("gone", ["samples", "all but the checkpoint"])
@pytest.mark.usefixtures("plain_report")
def test_missing_evaluations_are_filed_under_their_own_steps(
    start: Start, finished: tuple[Outcome, Listener], half: Path, gone: str
) -> None:
    shutil.rmtree(half / "samples")
    if gone != "samples":
        (half / "evaluations.jsonl").unlink()
    listener = Listener()
    outcome = start(half, observer=listener)
    assert listener.evaluations == [0, 2, 4]
    assert rows(half, "evaluations.jsonl") == rows(finished[0].folder, "evaluations.jsonl")
    assert outcome.comparisons == finished[0].comparisons
    start(half, observer=listener)
    assert listener.evaluations == [0, 2, 4]


@pytest.mark.slow
def test_another_number_of_pictures_may_be_shown_after_a_resume(start: Start, half: Path) -> None:
    listener = Listener()
    assert start(half, ("picture_prompts", "3"), observer=listener).status == "finished"
    assert not [note for note in listener.notes if "report" in note]
    assert "finished" in (half / "report.html").read_text()


def test_a_report_that_cannot_be_written_is_told_of_once_and_stops_nothing(
    start: Start, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise RunFolderError("The report cannot be written: No space left on device.")

    monkeypatch.setattr(training, "write_report", full)
    listener = Listener()
    assert start(half, observer=listener).status == "finished"  # after an evaluation, and at the end
    told = [note for note in listener.notes if "report could not be written" in note]
    assert len(told) == 1
    assert "No space left" in told[0]


def test_a_prompt_file_edited_between_two_starts_is_refused(start: Start, half: Path, tiny_preset: Path) -> None:
    kept = json.loads((half / "step-000002" / "state.json").read_text())["prompts_sha256"]
    files = {"prompts.train": "train.jsonl", "prompts.evaluation": "test.jsonl"}
    assert kept == {key: file_sha256(tiny_preset.parent / name) for key, name in files.items()}
    change_state(half / "step-000002", prompts_sha256={**kept, "prompts.evaluation": "0" * 64})
    with pytest.raises(ConfigError, match=r"prompts\.evaluation: the content of .*test\.jsonl"):
        start(half)
