"""Run folders: locked, never taken from another run, their files rewound on resume."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ramctl.errors import CheckpointError, ConfigError, RunFolderError
from ramctl.runfolder import FREE_TO_CHANGE, RunFolder, numbered, prompt_hashes, require_checkpoint
from ramctl.settings import Settings, all_keys, load_settings


def other_settings(preset: Path, *overrides: tuple[str, str]) -> Settings:
    return load_settings(str(preset), overrides=overrides)


# -- names


def test_a_new_folder_gets_the_first_free_number(tmp_path: Path) -> None:
    folder = tmp_path / "run.v1"
    assert numbered(folder) == folder
    folder.mkdir()
    assert numbered(folder) == tmp_path / "run.v1-2"
    (tmp_path / "run.v1-2").write_text("a file is in the way, too")
    assert numbered(folder) == tmp_path / "run.v1-3"


# -- the lock


def test_a_second_holder_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    with folder.locked():
        with pytest.raises(RunFolderError) as caught, RunFolder(folder.path).locked():
            pass
        assert f"process {os.getpid()} on " in str(caught.value)
        assert str(folder.path) in str(caught.value)
        assert "--output" in str(caught.value)
    with folder.locked():
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from ramctl.runfolder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert done.returncode == -9
    with RunFolder(tmp_path / "run").locked():
        text = (tmp_path / "run" / ".lock").read_text()
        assert f"process {os.getpid()} on " in text
        assert text.count("process") == 1


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    told: list[str] = []
    with RunFolder(tmp_path / "run").locked(told.append):
        assert f"process {os.getpid()} on " in (tmp_path / "run" / ".lock").read_text()
    assert len(told) == 1
    assert f"file system of {tmp_path / 'run'} has no locks ({os.strerror(code)})" in told[0]


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_process_holds_is_no_missing_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunFolderError, match="in use by another process"), RunFolder(tmp_path / "run").locked():
        pass


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunFolderError, match=r"cannot be written: .*--output"), RunFolder(tmp_path / place).locked():
        pass
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="rights do not bind the superuser")
def test_a_read_only_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(RunFolderError, match="Permission denied"), RunFolder(tmp_path / "run").locked():
        pass


# -- whose folder


def test_an_empty_or_absent_folder_is_anybodys(tmp_path: Path, tiny_settings: Settings) -> None:
    RunFolder(tmp_path / "absent").check_owner(tiny_settings.config)
    with RunFolder(tmp_path).locked():
        RunFolder(tmp_path).check_owner(tiny_settings.config)


def test_what_a_kill_left_of_the_first_file_does_not_lock_the_user_out(tmp_path: Path, tiny_settings: Settings) -> None:
    (tmp_path / ".config.toml.123.tmp").write_text("name = ")
    RunFolder(tmp_path).check_owner(tiny_settings.config)


def test_a_folder_with_other_files_is_refused(tmp_path: Path, tiny_settings: Settings) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match=r"is not empty and is no run folder \(no config\.toml\)"):
        RunFolder(tmp_path).check_owner(tiny_settings.config)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_another_presets_folder_is_refused_by_name(tmp_path: Path, tiny_settings: Settings, tiny_preset: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config(other_settings(tiny_preset, ("name", "somebody-else")))
    with pytest.raises(RunFolderError, match="belongs to preset 'somebody-else', not 'tiny-test'"):
        folder.check_owner(tiny_settings.config)


def test_the_written_config_reads_back_and_is_the_owner(tmp_path: Path, tiny_settings: Settings) -> None:
    folder = RunFolder(tmp_path)
    text = folder.write_config(tiny_settings)
    folder.check_owner(tiny_settings.config)
    assert (tmp_path / "config.toml").read_text() == text
    assert load_settings(str(tmp_path / "config.toml")).config == tiny_settings.config
    assert f"lr = 0.02  # {tiny_settings.provenance['optimizer.lr']}" in text


# -- the same experiment


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", "1e-3"),
        ("reward_multiplier", "2"),
        ("prompts_per_step", "4"),
        ("train.seed", "1"),
        ("lora.rank", "8"),
        ("evaluation.seed", "5"),
        ("runtime.precision", "bfloat16"),
    ],
)
def test_a_changed_experiment_is_refused_with_the_key_and_both_values(
    tiny_checkpoint: Path, tiny_settings: Settings, tiny_preset: Path, key: str, value: str
) -> None:
    folder = RunFolder(tiny_checkpoint.parent)
    folder.check_same_experiment(tiny_checkpoint, tiny_settings)
    with pytest.raises(ConfigError) as caught:
        folder.check_same_experiment(tiny_checkpoint, other_settings(tiny_preset, (key, value)))
    message = str(caught.value)
    assert f"{key.split('.')[-1]}: " in message
    assert " → " in message
    assert "--fresh" in message


def test_many_changes_are_counted(tiny_checkpoint: Path, tiny_preset: Path) -> None:
    changes = [("lr", "1e-3"), ("beta1", "0"), ("beta2", "0"), ("train.seed", "3"), ("lora.alpha", "1"), ("rank", "2")]
    with pytest.raises(ConfigError, match="and 2 more"):
        RunFolder(tiny_checkpoint.parent).check_same_experiment(tiny_checkpoint, other_settings(tiny_preset, *changes))


def test_what_does_not_change_the_experiment_may_change(tiny_checkpoint: Path, tiny_preset: Path) -> None:
    free = [
        ("train.steps", "99"),
        ("train.micro_batch", "1"),
        ("rollout.micro_batch", "1"),
        ("evaluation.every", "3"),
        ("checkpoint.every", "1"),
        ("tracking.kind", "mlflow"),
        ("runtime.threads", "1"),
        ("train.guard", "false"),
        ("train.gradient_checkpointing", "true"),
        ("train.sweep_micro_batch", "1"),
        ("model.text_encoders", "parked"),
        ("reward.self_test", "false"),
        ("reward.max_failed_share", "0.5"),
        ("runtime.compile", "true"),
    ]
    RunFolder(tiny_checkpoint.parent).check_same_experiment(tiny_checkpoint, other_settings(tiny_preset, *free))


def test_every_key_that_is_free_to_change_exists() -> None:
    names = list(all_keys())
    for free in FREE_TO_CHANGE:
        assert any(name.startswith(free) for name in names), free


def own_prompts(preset: Path, folder: Path) -> Settings:
    """The preset with prompt files in ``folder`` that may be edited."""
    for name in ("train", "test"):
        shutil.copy(preset.parent / f"{name}.jsonl", folder)
    files = [("prompts.train", str(folder / "train.jsonl")), ("prompts.evaluation", str(folder / "test.jsonl"))]
    return other_settings(preset, *files)


def checkpoint_of(folder: Path, settings: Settings, state: dict[str, object]) -> Path:
    """What the comparison reads of a checkpoint."""
    checkpoint = folder / "step-000001"
    checkpoint.mkdir()
    (checkpoint / "config.toml").write_text(RunFolder(folder).write_config(settings))
    (checkpoint / "state.json").write_text(json.dumps(state))
    return checkpoint


@pytest.mark.parametrize(("file", "key"), [("train.jsonl", "prompts.train"), ("test.jsonl", "prompts.evaluation")])
def test_a_prompt_file_edited_in_place_is_another_experiment(
    tmp_path: Path, tiny_preset: Path, file: str, key: str
) -> None:
    settings = own_prompts(tiny_preset, tmp_path)
    hashes = prompt_hashes(settings.config)
    assert hashes[key] == hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    checkpoint = checkpoint_of(tmp_path, settings, {"step": 1, "prompts_sha256": hashes})
    RunFolder(tmp_path).check_same_experiment(checkpoint, settings)
    with (tmp_path / file).open("a") as stream:
        stream.write('{"prompt": "one more", "tag": "x"}\n')
    with pytest.raises(ConfigError, match=rf"other settings: {key}: the content of .*{file} .*--fresh") as caught:
        RunFolder(tmp_path).check_same_experiment(checkpoint, settings)
    assert hashes[key][:12] in str(caught.value)
    assert str(caught.value).count("content") == 1


def test_prompts_of_a_checkpoint_without_hashes_are_not_compared(tmp_path: Path, tiny_preset: Path) -> None:
    settings = own_prompts(tiny_preset, tmp_path)
    checkpoint = checkpoint_of(tmp_path, settings, {"step": 1})
    (tmp_path / "train.jsonl").write_text('{"prompt": "another"}\n')
    RunFolder(tmp_path).check_same_experiment(checkpoint, settings)


def test_another_prompt_file_is_told_of_once(tmp_path: Path, tiny_preset: Path) -> None:
    settings = own_prompts(tiny_preset, tmp_path)
    hashes = prompt_hashes(settings.config)
    checkpoint = checkpoint_of(tmp_path, settings, {"step": 1, "prompts_sha256": hashes})
    (tmp_path / "more.jsonl").write_text('{"prompt": "another"}\n')
    files = [("prompts.train", str(tmp_path / "more.jsonl")), ("prompts.evaluation", str(tmp_path / "test.jsonl"))]
    with pytest.raises(ConfigError, match=r"prompts\.train: .*more\.jsonl") as caught:
        RunFolder(tmp_path).check_same_experiment(checkpoint, other_settings(tiny_preset, *files))
    assert "content" not in str(caught.value)


# -- metrics


def test_rows_are_read_back_and_nan_is_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("metrics.jsonl", {"step": 1, "loss": 0.5})
    folder.append("metrics.jsonl", {"step": 2, "loss": math.nan})
    assert folder.rows("metrics.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert folder.rows("absent.jsonl") == []


def test_a_row_of_the_same_step_is_replaced_and_steps_stay_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.put("evaluations.jsonl", {"step": 4, "eval/mean": 1.0})
    with (tmp_path / "evaluations.jsonl").open("a") as stream:
        stream.write('{"step": 6, "ev')
    folder.put("evaluations.jsonl", {"step": 0, "eval/mean": 0.5})
    folder.put("evaluations.jsonl", {"step": 4, "eval/mean": math.nan})
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "eval/mean": 0.5}, {"step": 4, "eval/mean": None}]


def test_rewinding_drops_later_rows_and_a_half_written_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (0, 1, 2, 3):
        folder.append("evaluations.jsonl", {"step": step})
        folder.append("metrics.jsonl", {"step": step + 1})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "lo')
    assert len(folder.rows("metrics.jsonl")) == 4
    folder.rewind(2)
    folder.append("metrics.jsonl", {"step": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert [row["step"] for row in folder.rows("evaluations.jsonl")] == [0, 1, 2]


def test_rewinding_an_empty_folder_makes_no_file(tmp_path: Path) -> None:
    RunFolder(tmp_path).rewind(0)
    assert list(tmp_path.iterdir()) == []


# -- nothing intact


def test_only_damaged_checkpoints_are_no_reason_to_start_over(tmp_path: Path) -> None:
    require_checkpoint(None, [])
    require_checkpoint(tmp_path, ["step-000002/state.json is missing"])
    with pytest.raises(CheckpointError, match=r"a; b; c\. .*--fresh"):
        require_checkpoint(None, ["a", "b", "c", "d"])


def test_the_folder_can_be_moved(tmp_path: Path, tiny_settings: Settings) -> None:
    folder = RunFolder(tmp_path / "here")
    with folder.locked():
        folder.write_config(tiny_settings)
    shutil.move(folder.path, tmp_path / "there")
    RunFolder(tmp_path / "there").check_owner(tiny_settings.config)
