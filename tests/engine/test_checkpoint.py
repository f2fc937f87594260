"""Checkpoints: bit-exact resume, damage found and named, and a loadable ``latest`` whenever the process dies."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.engine.checkpoint import (
    FULL_SET_FILES,
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    SET_FILES,
    STATE_FILE,
    CheckpointStore,
    damage,
    find_checkpoint,
    load_weights,
    write_atomically,
)
from ramctl.engine.policy import Policy
from ramctl.engine.trainer import Trainer
from ramctl.errors import CheckpointError
from ramctl.prompts import read_prompts
from ramctl.settings import load_settings
from ramctl.training import make_reward

VICTIM = Path(__file__).with_name("checkpoint_victim.py")
Build = Callable[..., Trainer]
LORA = ("lora.rank", "4")
_SETS: tuple[Literal["policy", "old", "evaluation"], ...] = ("policy", "old", "evaluation")
FULL = ("lora.rank", "0"), ("optimizer.lr", "1e-4")


@pytest.fixture
def build(tiny_preset: Path) -> Build:
    torch.set_num_threads(1)

    def make(*overrides: tuple[str, str]) -> Trainer:
        fast = ("rollout.sampling_steps", "1"), ("rollout.guidance_scale", "1"), ("noisings_per_image", "2")
        config = load_settings(str(tiny_preset), overrides=[*fast, *overrides]).config
        backbone = StableDiffusion3.load(config.model, torch.device("cpu"), None)
        policy = Policy(backbone, config.lora, seed=config.train.seed)
        return Trainer(config, backbone, policy, read_prompts(config.prompts.train), make_reward(config))

    return make


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All tensors of a trainer's state by name."""
    found = {}
    for which in _SETS:
        tensors = trainer.policy.tensors(which)
        found.update({f"{which}/{name}": value.clone() for name, value in tensors.items()})
    for name, parameter in trainer.policy.parameters.items():
        for key, value in trainer.optimizer.state[parameter].items():
            found[f"{key}/{name}"] = value.clone()
    return found


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith("seconds/") and k != "images_per_second"}


@pytest.fixture
def run_folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A run folder of two checkpoints that may be changed: step-000001 and a copy of it as step-000002."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_checkpoint, folder / "step-000001")
    shutil.copytree(tiny_checkpoint, folder / "step-000002")
    (folder / "latest").symlink_to("step-000002")
    return folder


# -- resume


@pytest.mark.parametrize(("kind", "before"), [([LORA], 2), ([*FULL], 1)], ids=["lora", "all-weights"])
def test_some_steps_a_checkpoint_and_the_rest_are_all_the_steps(
    build: Build, tmp_path: Path, kind: list[tuple[str, str]], before: int
) -> None:
    options = [*kind, ("old_ema_warmup", "0.4"), ("warmup_steps", "3")]
    whole = build(*options)
    rows = [untimed(whole.step().metrics) for _ in range(before + 1)]

    first = build(*options)
    half = [untimed(first.step().metrics) for _ in range(before)]
    folder = CheckpointStore(tmp_path).save(first, "text", {"note": "kept"})
    second = build(*options)
    state = CheckpointStore.restore(folder, second)
    assert (state.step, state.extra) == (before, {"note": "kept"})
    half.append(untimed(second.step().metrics))

    assert half == rows
    ours, theirs = everything(second), everything(whole)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("exp_avg_sq/") for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_checkpoint_holds_its_files_and_diffusers_reads_the_evaluation_lora(build: Build, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    trainer = build(LORA, ("lora.alpha", "12"))
    trainer.step()
    folder = CheckpointStore(tmp_path).save(trainer, "text", {})
    names = {path.name for path in folder.iterdir()}
    assert names == {*SET_FILES.values(), OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE, "config.toml"}
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # all as readable as the system's defaults say
    pipeline = StableDiffusion3Pipeline.from_pretrained(trainer.config.model.path)
    pipeline.load_lora_weights(folder)
    x_t = torch.randn(1, *trainer.backbone.latent_shape)
    call = x_t, torch.tensor([0.6]), trainer.backbone.encode(["a ring"])
    theirs = trainer.backbone.velocity(pipeline.transformer, *call).detach()
    ours = trainer.backbone.velocity(trainer.policy.network("evaluation"), *call)
    base = trainer.backbone.velocity(trainer.policy.network("reference"), *call)
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))


def test_all_weights_are_saved_under_their_own_names(tiny_full_checkpoint: Path) -> None:
    assert set(FULL_SET_FILES.values()) <= {path.name for path in tiny_full_checkpoint.iterdir()}
    assert damage(tiny_full_checkpoint) is None


def test_load_weights_gives_the_evaluation_set(build: Build, tmp_path: Path) -> None:
    trainer = build()
    trainer.step()
    folder = CheckpointStore(tmp_path).save(trainer, "text", {})
    other = build()
    load_weights(other.policy, other.backbone, folder)
    for name, value in trainer.policy.tensors("evaluation").items():
        assert torch.equal(other.policy.tensors("evaluation")[name], value)
    load_weights(other.policy, other.backbone, folder, "policy")
    for name, value in trainer.policy.tensors("policy").items():
        assert torch.equal(other.policy.tensors("evaluation")[name], value)


@pytest.mark.parametrize("rank", ["1", "2", "0"])
def test_a_checkpoint_of_another_lora_is_refused(build: Build, tiny_checkpoint: Path, rank: str) -> None:
    trainer = build(("lora.rank", rank))
    with pytest.raises(CheckpointError):
        CheckpointStore.restore(tiny_checkpoint, trainer)
    with pytest.raises(CheckpointError):
        load_weights(trainer.policy, trainer.backbone, tiny_checkpoint)


# -- damage


def files_of(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.iterdir())


@pytest.mark.parametrize(
    "name", [*SET_FILES.values(), OPTIMIZER_FILE, STATE_FILE, "config.toml"], ids=lambda name: name.split(".")[0]
)
@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing", "grown"])
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(run_folder: Path, name: str, harm: str) -> None:
    path = run_folder / "step-000002" / name
    data = bytearray(path.read_bytes())
    if harm == "flipped":
        data[len(data) // 2] ^= 1
    elif harm == "truncated":
        del data[-1]
    elif harm == "grown":
        data.append(0)
    path.write_bytes(data)
    if harm == "missing":
        path.unlink()
    problem = damage(path.parent)
    assert problem is not None
    assert str(path) in problem
    newest, problems = CheckpointStore(run_folder).newest_intact()
    assert newest == run_folder / "step-000001"
    assert problems == [problem]
    assert find_checkpoint(run_folder) == newest


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "null", '{"sha256": null}', '{"sha256": [1, 2]}', '{"sha256": "x"}']
)
def test_a_damaged_manifest_is_named(run_folder: Path, text: str | None) -> None:
    path = run_folder / "step-000002" / MANIFEST_FILE
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    problem = damage(path.parent)
    assert problem is not None
    assert str(path) in problem
    assert CheckpointStore(run_folder).newest_intact()[0] == run_folder / "step-000001"


@pytest.mark.parametrize("position", range(7, 600, 29))
def test_no_flipped_bit_of_the_manifest_goes_unnoticed(run_folder: Path, position: int) -> None:
    path = run_folder / "step-000002" / MANIFEST_FILE
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    folder = path.parent
    if damage(folder) is None:  # white space may change: the contents are what counts
        assert json.loads(data) == json.loads((run_folder / "step-000001" / MANIFEST_FILE).read_bytes())


def test_an_unlisted_file_does_not_matter_but_an_empty_list_does(run_folder: Path) -> None:
    folder = run_folder / "step-000002"
    (folder / "notes.txt").write_text("mine")
    assert damage(folder) is None
    (folder / MANIFEST_FILE).write_text('{"sha256": {}}')
    assert damage(folder) is not None


def test_restore_refuses_a_damaged_checkpoint(build: Build, run_folder: Path) -> None:
    path = run_folder / "step-000002" / OPTIMIZER_FILE
    path.write_bytes(path.read_bytes()[:-4])
    trainer = build()
    before = everything(trainer)
    with pytest.raises(CheckpointError, match=r"step-000002 cannot be used: .*optimizer\.safetensors is damaged"):
        CheckpointStore.restore(path.parent, trainer)
    with pytest.raises(CheckpointError, match="cannot be used"):
        load_weights(trainer.policy, trainer.backbone, path.parent)
    assert all(torch.equal(value, before[name]) for name, value in everything(trainer).items())


# -- finding


def test_find_checkpoint_takes_what_a_user_may_mean(run_folder: Path) -> None:
    (run_folder / "best").symlink_to("step-000001")
    assert find_checkpoint(run_folder) == run_folder / "step-000002"
    assert find_checkpoint(run_folder / "latest") == run_folder / "step-000002"
    assert find_checkpoint(run_folder / "best") == run_folder / "step-000001"
    assert find_checkpoint(run_folder / "step-000001") == run_folder / "step-000001"


def test_find_checkpoint_says_what_is_wrong(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "empty")
    for step in (1, 2):
        (run_folder / f"step-00000{step}" / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"No intact checkpoint .*step-000002/state\.json is missing"):
        find_checkpoint(run_folder)


def test_latest_that_points_at_nothing_means_the_newest_intact_one(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "step-000002")
    assert find_checkpoint(run_folder / "latest") == run_folder / "step-000001"


def test_pointers_work_without_symbolic_links(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: object, target_is_directory: bool = False) -> None:
        raise OSError(errno.EPERM, "symbolic links are not allowed here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    trainer, store = build(), CheckpointStore(tmp_path)
    trainer.step_index = 7
    saved = store.save(trainer, "text", {}, best=True)
    assert (tmp_path / "latest").is_file()
    assert find_checkpoint(tmp_path / "latest") == saved == store.best
    trainer.step_index = 8
    store.save(trainer, "text", {})
    assert find_checkpoint(tmp_path / "latest").name == "step-000008"


# -- keeping


def test_the_newest_and_the_best_are_kept(build: Build, tmp_path: Path) -> None:
    trainer, store = build(), CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4, 5):
        trainer.step_index = step
        store.save(trainer, "text", {}, best=step == 2)
    assert list(store.steps()) == [2, 4, 5]
    assert store.best == tmp_path / "step-000002"
    assert (tmp_path / "latest").readlink() == Path("step-000005")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best",
        "latest",
        *(f"step-00000{k}" for k in (2, 4, 5)),
    ]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-999999", ".step-000001.1.tmp", "samples", "step-12"):
        (tmp_path / name).mkdir()
    assert list(CheckpointStore(tmp_path).steps()) == [999_999, 1_000_000]


def test_saving_a_step_again_replaces_it(build: Build, tmp_path: Path) -> None:
    trainer, store = build(), CheckpointStore(tmp_path)
    store.save(trainer, "first", {})
    folder = store.save(trainer, "second", {})
    assert (folder / "config.toml").read_text() == "second"
    assert damage(folder) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000000"]


# -- a full disk


def test_a_disk_that_fills_up_at_any_moment_loses_nothing(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that writes is refused in turn, the first, the second, …, until a save gets through."""
    trainer, store = build(), CheckpointStore(tmp_path / "run")
    trainer.step_index = 1
    kept = store.save(trainer, "text", {})
    trainer.step_index = 2
    fullness = _FullDisk(monkeypatch)
    refused = 0
    while True:
        fullness.room = refused
        try:
            with fullness:
                store.save(trainer, "text", {})
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC
        refused += 1
        newest, problems = store.newest_intact()
        assert newest in (kept, tmp_path / "run" / "step-000002")
        assert problems == []
        assert damage(find_checkpoint(tmp_path / "run" / "latest")) is None
        assert not list((tmp_path / "run").glob(".*"))  # what was begun is cleaned up
        shutil.rmtree(tmp_path / "run" / "step-000002", ignore_errors=True)
        (tmp_path / "run" / "latest").unlink()
        (tmp_path / "run" / "latest").symlink_to("step-000001")
    assert refused >= 10
    assert store.newest_intact()[0] == tmp_path / "run" / "step-000002"


class _FullDisk:
    """Inside ``with``, the calls that need room fail with ENOSPC after ``room`` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.room, self.context = monkeypatch, 0, monkeypatch.context()

    def __enter__(self) -> None:
        import safetensors.torch

        self.context = self.monkeypatch.context()
        patch = self.context.__enter__()
        for holder, name in (
            (os, "mkdir"),
            (os, "fsync"),
            (os, "symlink"),
            (os, "rename"),
            (os, "replace"),
            (Path, "write_text"),
            (safetensors.torch, "save_file"),
            (StableDiffusion3, "save_set"),
        ):
            patch.setattr(holder, name, self._limited(getattr(holder, name)))

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)

    def _limited(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*arguments: Any, **options: Any) -> Any:
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            self.room -= 1
            return call(*arguments, **options)

        return limited


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.toml"
    write_atomically(path, "first")

    def failing(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "second")
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["config.toml"]


# -- kill -9


def victim(kind: str, preset: Path, folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(VICTIM), kind, str(preset), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "child:" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_loadable(row: dict[str, Any], least: int, most: int) -> None:
    for when in ("before", "after"):
        seen = row[when]
        assert seen["newest"] is not None, row
        assert seen["whole"], row
        assert least <= int(seen["newest"].removeprefix("step-")) <= most, row
        assert seen["folder"] == [seen["newest"], None], row
    assert row["left"] == [], row


@pytest.mark.slow
def test_death_before_any_file_system_call_of_a_save(tiny_preset: Path, tmp_path: Path) -> None:
    rows = victim("calls", tiny_preset, tmp_path)
    for situation, least, most in (("next", 3, 4), ("again-damaged", 2, 3), ("again-intact", 2, 3)):
        mine = [row for row in rows if row["situation"] == situation]
        *deaths, survivor = mine
        assert survivor["code"] == 0
        assert survivor["after"]["newest"] == f"step-00000{most}"
        assert len(deaths) > 30
        assert {row["code"] for row in deaths} == {77}
        assert {"open", "os.rename", "os.mkdir", "os.symlink"} <= {row["event"] for row in deaths}
        for row in mine:
            assert_loadable(row, least, most)
            for when in ("before", "after"):
                if situation != "again-damaged":  # there `latest` was damaged from the start
                    assert row[when]["latest"][1] is None, row
            if situation == "again-intact":  # the step was there: sweeping brings it back
                assert row["after"]["newest"] == "step-000003", row


@pytest.mark.slow
def test_sigkill_at_random_moments(tiny_preset: Path, tmp_path: Path) -> None:
    rows = victim("random", tiny_preset, tmp_path / "run")
    assert len(rows) >= 20
    assert {row["code"] for row in rows} == {-9}
    last = 1
    for row in rows:
        assert row["first"] == last + 1
        assert_loadable(row, last, last + 10_000)
        assert row["before"]["latest"][1] is None, row
        assert row["after"]["latest"][1] is None, row
        last = int(row["after"]["newest"].removeprefix("step-"))
    assert last > 20  # it did save in between
