"""``ramctl train``: what it refuses and how; killed, interrupted or split over processes it is the same run."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ramctl.cli import app
from ramctl.engine.checkpoint import find_checkpoint
from ramctl.runfolder import RunFolder
from ramctl.scorers.base import Images, ImageScore
from ramctl.scorers.jpeg import JpegCompressibility
from ramctl.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]
FAST = (
    *("--rollout.sampling-steps", "1", "--rollout.guidance-scale", "1"),
    *("--evaluation.sampling-steps", "1", "--evaluation.guidance-scale", "1"),
    *("--picture-prompts", "2", "--threads", "1"),
)
Ramctl = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ramctl(
    tiny_preset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Ramctl:
    """``ramctl train PRESET …`` in this process: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

    def run(*words: str | Path, preset: str | Path = tiny_preset) -> tuple[int, str, str]:
        arguments = ["train", str(preset), *FAST, *map(str, words)]
        monkeypatch.setattr(sys, "argv", ["ramctl", *arguments])
        with pytest.raises(SystemExit) as caught:
            app.main(arguments)
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return run


def one_line(error: str) -> str:
    """The message; a mistake of the user's is one line or two, and no traceback."""
    lines = [
        line for line in error.splitlines() if not line.startswith(("Checking the scorers", "Loading ", "held-out"))
    ]
    lines = [line for line in lines if not line.startswith(("step ", "Training in", "Resuming from"))]
    assert 1 <= len(lines) <= 2, error
    assert "Traceback" not in error
    assert "unexpected error" not in error
    return "\n".join(lines)


# -- the command line


# -- mistakes in the settings: exit code 2, before anything is loaded or written


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizer.lrr", "1e-4"], ["Unknown key", "'optimizer.lrr'", "optimizer.lr"]),
        (["--reward-multiplyer", "3"], ["Unknown key", "reward_multiplier"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr must be", '"fast"']),
        (["--train.steps", "2.5"], ["train.steps must be", "2.5"]),
        (["--rollout.images-per-prompt", "1"], ["rollout.images_per_prompt must be", "2", "got 1"]),
        (["--noisings-per-image", "0"], ["ram.noisings_per_image must be", "got 0"]),
        (["--old-ema-decay", "1"], ["ram.old_ema_decay must be", "got 1"]),
        (["--evaluation.ema-decay", "1.0"], ["evaluation.ema_decay must be", "got 1"]),
        (["--optimizer.lr", "-1e-4"], ["optimizer.lr must be", "got -0.0001"]),
        (["--updates-per-step", "9"], ["updates_per_step (9) cannot exceed noisings_per_image (1)"]),
        (["--lr"], ["--lr needs a value"]),
        (["extra"], ["Unexpected argument 'extra'"]),
        (["--images-per-prompt", "4"], ["rollout.images_per_prompt", "evaluation.images_per_prompt"]),
        (["--reward.scorers.geneva.weight", "1"], ["There is no scorer 'geneva'", "'geneval'"]),
        (["--config", "absent.toml"], ["absent.toml does not exist"]),
        (["--prompts.train", "absent.jsonl"], ["absent.jsonl does not exist"]),
        (["--model.resolution", "65"], ["model.resolution 65 does not fit"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    ramctl: Ramctl, tmp_path: Path, words: list[str], said: list[str]
) -> None:
    code, out, error = ramctl("--output", "run", *words)
    assert code == 2, error
    message = one_line(error)
    for part in said:
        assert part in message
    assert out == ""
    assert not (tmp_path / "run" / "config.toml").exists()


def test_an_unknown_preset_lists_the_near_and_the_known_ones(ramctl: Ramctl) -> None:
    code, _, error = ramctl(preset="geneval-tinny")
    assert code == 2
    assert "There is no preset 'geneval-tinny'. Did you mean 'geneval-tiny'" in one_line(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompts"),
        ("\n  \n", "holds no prompts"),
        ('{"prompt": "a ring"}\n\n{"prompt": "a star"\n', "line 3: not valid JSON"),
        ('{"prompt": "a ring"}\n"a star"\n', "line 2: expected a JSON object"),
        ('{"prompt": "a ring"}\n{"text": "a star"}\n', 'line 2: the key "prompt" must be a non-empty string'),
        ('{"prompt": "  "}\n', "line 1: "),
    ],
    ids=["empty", "blank", "broken", "no-object", "no-prompt", "blank-prompt"],
)
def test_a_bad_prompt_file_names_its_line(ramctl: Ramctl, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.jsonl").write_text(text)
    code, _, error = ramctl("--output", "run", "--prompts.train", tmp_path / "mine.jsonl")
    assert code == 2
    message = one_line(error)
    assert "mine.jsonl" in message
    assert said in message


def test_prompts_without_the_scorers_fields_are_refused(ramctl: Ramctl, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a ring\na star\n")
    code, _, error = ramctl(
        "--output", "run", "--prompts.train", tmp_path / "mine.txt", "--reward.scorers.geneval.weight", "1"
    )
    assert code == 2
    assert "mine.txt: Prompt 1 ('a ring') has no" in one_line(error)


def test_a_missing_model_folder_says_what_to_set(
    ramctl: Ramctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, error = ramctl("--output", "run", "--model.path", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere" in one_line(error)
    assert "--model.path models/tinyworld" in error


# -- the run folder


def write_config(folder: Path, preset: Path, *overrides: tuple[str, str]) -> None:
    folder.mkdir(parents=True)
    RunFolder(folder).write_config(load_settings(str(preset), overrides=overrides))


def test_another_presets_folder_is_refused(ramctl: Ramctl, tmp_path: Path, tiny_preset: Path) -> None:
    write_config(tmp_path / "run", tiny_preset, ("name", "other"))
    code, _, error = ramctl("--output", "run")
    assert code == 1
    assert "belongs to preset 'other', not 'tiny-test'" in one_line(error)


def test_a_folder_of_other_files_is_refused_and_left_alone(ramctl: Ramctl, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    code, _, error = ramctl("--output", "run")
    assert code == 1
    assert "is not empty and is no run folder" in one_line(error)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused(ramctl: Ramctl, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, _, error = ramctl("--output", "file/run")
    assert code == 1
    assert "Run folder file/run cannot be written" in one_line(error)


def test_a_folder_in_use_names_the_other_process(ramctl: Ramctl, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked():
        code, _, error = ramctl("--output", "run")
    assert code == 1
    assert f"is in use by process {os.getpid()} on " in one_line(error)


# -- a run


def test_a_run_its_results_its_resumption_and_fresh(
    ramctl: Ramctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, error = ramctl("--output", "run", "--checkpoint.every", "1")
    assert code == 0, error
    results = dict(line.removeprefix("RESULT ").split("=", 1) for line in out.splitlines())
    assert all(line.startswith("RESULT ") for line in out.splitlines())
    assert results["steps"] == "2"
    assert results["checkpoint"] == "run/latest"
    assert results["report"] == "run/report.html"
    gain = float(results["value_after"]) - float(results["value_before"])
    assert float(results["value_gain"]) == pytest.approx(gain, abs=1e-4)
    assert float(results["value_gain_low"]) <= gain + 1e-4
    assert "step 2/2" in error
    assert "held-out after step 0" in error
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 2
    assert "tiny-test" in (tmp_path / "run" / "report.html").read_text()

    # The report takes most of the time of so short a run; from here on it is left out.
    no_report = monkeypatch.context()
    no_report.__enter__().setattr("ramctl.training.write_report", lambda *arguments: None)

    # config.toml is a preset again, and gives the same configuration.
    settings = load_settings(str(tmp_path / "run" / "config.toml"))
    assert settings.config.rollout.sampling_steps == 1
    assert "sampling_steps = 1  # command line" in (tmp_path / "run" / "config.toml").read_text()

    # Other settings are refused with the key and both values.
    code, _, error = ramctl("--output", "run", "--optimizer.lr", "1e-3")
    assert code == 2
    assert "optimizer.lr: 0.02 → 0.001" in one_line(error)

    # The same command again has nothing to do; with one step more it makes that step.
    code, _, error = ramctl("--output", "run", "--checkpoint.every", "1")
    assert code == 0
    assert "run is complete" in error
    assert "step " not in [line[:5] for line in error.splitlines()]
    code, out, error = ramctl("--output", "run", "--checkpoint.every", "1", "--train.steps", "3")
    assert code == 0
    assert "Resuming from run/step-000002 (step 2)" in error
    assert next(line for line in error.splitlines() if line.startswith("step ")).startswith("step 3/3")

    # Damaged, the newest checkpoint is named and the one before is used.
    broken = tmp_path / "run" / "step-000003" / "state.json"
    broken.write_text(broken.read_text().replace('"step": 3', '"step": 4'))
    code, _, error = ramctl("--output", "run", "--train.steps", "3")
    assert code == 0
    assert "Damaged checkpoint left aside: run/step-000003/state.json is damaged" in error
    assert "Resuming from run/step-000002 (step 2)" in error

    # All damaged, nothing is started; --fresh starts beside and deletes nothing.
    for state in (tmp_path / "run").glob("step-*/state.json"):
        state.unlink()
    before = {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"
    }
    code, out, error = ramctl("--output", "run")
    assert code == 1
    assert "No intact checkpoint to resume from" in one_line(error)
    assert "--fresh" in error
    assert out == ""
    no_report.__exit__(None, None, None)
    code, out, error = ramctl("--output", "run", "--fresh", "--prompts.evaluation", "none")
    assert code == 0
    assert "RESULT checkpoint=run-2/latest" in out
    assert find_checkpoint(tmp_path / "run-2" / "latest").name == "step-000002"
    assert {path: path.read_bytes() for path in before} == before
    assert "--output run-2" in (tmp_path / "run-2" / "report.html").read_text()


def test_the_run_folder_is_named_after_the_preset(
    ramctl: Ramctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ramctl.training.write_report", lambda *arguments: None)
    code, out, _ = ramctl("--train.steps", "1", "--prompts.evaluation", "none")
    assert code == 0
    assert "RESULT checkpoint=outputs/tiny-test/latest" in out
    assert (tmp_path / "outputs" / "tiny-test" / "latest").is_symlink()


def failing(monkeypatch: pytest.MonkeyPatch, outcome: ImageScore | Exception) -> None:
    """Every second training picture has this outcome."""
    count = 0
    score = JpegCompressibility.score_image

    def maybe(self: JpegCompressibility, image: Images, prompt: object) -> ImageScore:
        nonlocal count
        count += image.shape[0] == 64
        if image.shape[0] != 64 or count % 2:
            return score(self, image, prompt)  # type: ignore[arg-type]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(JpegCompressibility, "score_image", maybe)


@pytest.mark.parametrize(
    ("outcome", "said"),
    [(ValueError("bad pixels"), "ValueError: bad pixels"), (ImageScore(float("nan")), "non-finite value (nan)")],
)
def test_a_scorer_that_fails_too_often_stops_the_run(
    ramctl: Ramctl, monkeypatch: pytest.MonkeyPatch, outcome: ImageScore | Exception, said: str
) -> None:
    failing(monkeypatch, outcome)
    code, out, error = ramctl("--output", "run", "--prompts.evaluation", "none")
    assert code == 1
    assert "Step 1: 2 of 4 pictures could not be scored (numbers 1, 3)" in one_line(error)
    assert said in error
    assert out == ""


def test_an_absurd_multiplier_names_step_and_pictures(ramctl: Ramctl, tmp_path: Path) -> None:
    code, _, error = ramctl("--output", "run", "--reward-multiplier", "1e39", "--prompts.evaluation", "none")
    assert code == 1
    assert "Step 1: the loss of 4 of 4 pictures is not finite (numbers 0, 1, 2, 3)" in one_line(error)


def test_a_stopped_run_exits_with_1_and_names_the_best_checkpoint(
    ramctl: Ramctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def update(*arguments: object) -> str | None:
        nonlocal calls
        calls += 1
        return "the reward fell" if calls == 2 else None

    monkeypatch.setattr("ramctl.engine.guard.Guard.update", update)
    monkeypatch.setattr("ramctl.training.Guard.rewards", [0.5], raising=False)
    code, out, error = ramctl("--output", "run", "--train.steps", "5", "--evaluation.every", "1")
    assert code == 1
    assert "RESULT best=run/step-000001" in out
    assert "Stopped at step 2: the reward fell. The best checkpoint is run/step-000001." in one_line(error)
    assert "--fresh" in error
    assert find_checkpoint(tmp_path / "run" / "best").name == "step-000001"


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    ramctl: Ramctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--output", "run", "--prompts.evaluation", "none", "--checkpoint.every", "1")
    append = RunFolder.append

    def full(self: RunFolder, file_name: str, row: dict[str, object]) -> None:
        if row["step"] == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / file_name))
        append(self, file_name, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", full)
        code, _, error = ramctl(*options)
    assert code == 1
    assert "No space is left on the disk (run/metrics.jsonl)" in one_line(error)
    code, _, error = ramctl(*options)
    assert code == 0
    assert "Resuming from run/step-000001 (step 1)" in error
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_dry_run_trains_nothing(ramctl: Ramctl, tmp_path: Path) -> None:
    code, out, error = ramctl("--output", "run", "--dry-run")
    assert code == 0, error
    assert not list(tmp_path.iterdir())
    assert "RESULT plan." in out


# -- real processes


def command(preset: Path, output: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "ramctl", "train", str(preset), *FAST, "--output", str(output), *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}


def started(words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(words: Sequence[str], code: int = 0) -> str:
    process = started(words)
    _, error = process.communicate(timeout=240)
    assert process.returncode == code, error
    return error


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: the three weight sets and the optimizer's moments."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update({f"{path.name}/{name}": value for name, value in load_file(path).items()})
    assert len(found) > 100
    return found


def metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds/", "images_per_second"))} for row in rows]


def steps_written(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.slow
def test_a_killed_run_resumed_by_the_same_command_is_the_uninterrupted_run(tiny_preset: Path, tmp_path: Path) -> None:
    options = ("--train.steps", "6", "--checkpoint.every", "3", "--evaluation.every", "3", "--old-ema-warmup", "0.2")
    finish(command(tiny_preset, tmp_path / "whole", *options))
    killed = started(command(tiny_preset, tmp_path / "killed", *options))
    wait_for(lambda: (tmp_path / "killed" / "latest").is_symlink() and steps_written(tmp_path / "killed") >= 4, killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert find_checkpoint(tmp_path / "killed" / "latest").name == "step-000003"
    error = finish(command(tiny_preset, tmp_path / "killed", *options))
    assert "(step 3)" in error
    ours, theirs = weights(tmp_path / "killed" / "latest"), weights(tmp_path / "whole" / "latest")
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    assert len(metrics(tmp_path / "whole")) == 6
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert metrics(tmp_path / "killed", name) == metrics(tmp_path / "whole", name)


@pytest.mark.slow
def test_one_process_and_two_are_the_same_run(tiny_preset: Path, tmp_path: Path) -> None:
    """3 prompts × 3 pictures: the first process has 4 of the 9, so the second prompt's group is split.

    What may differ is the order of sums, in batches and over processes. Adam turns a rounding error of a gradient near
    zero into a step of the learning rate; with ε = 1e-3 the weights, which move by more than 1e-2, must agree to 1e-6
    and metrics to 1e-4. The reward is GenEval's, which a pixel rounded to the next grey level does not change; the size
    of a JPEG would jump by a byte.
    """
    preset = tmp_path / "counted.toml"
    preset.write_text(tiny_preset.read_text().replace("jpeg-compressibility", "geneval"))
    options = [
        *("--prompts-per-step=3", "--rollout.images-per-prompt=3", "--noisings-per-image=2", "--evaluation.prompts=5"),
        *("--optimizer.epsilon=1e-3", "--optimizer.lr=1e-2", "--checkpoint.every=1", "--train.steps=3"),
        *("--rollout.sampling-steps=8", "--evaluation.sampling-steps=8"),
    ]
    finish(command(preset, tmp_path / "one", *options))
    error = finish(command(preset, tmp_path / "two", *options, "--num-processes", "2"))
    assert error.count("step 3/3") == 1
    ours, theirs = weights(tmp_path / "two" / "latest"), weights(tmp_path / "one" / "latest")
    assert ours.keys() == theirs.keys()
    assert max(float(v.abs().max()) for k, v in theirs.items() if k.startswith("policy") and "lora_B" in k) > 1e-2
    assert all(row["advantage/abs_mean"] > 0.1 for row in metrics(tmp_path / "one"))
    for name, value in theirs.items():
        if not name.startswith("optimizer"):
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6, msg=name)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        one, two = metrics(tmp_path / "one", name), metrics(tmp_path / "two", name)
        assert len(one) == len(two) >= 2
        for left, right in zip(one, two, strict=True):
            assert left.keys() == right.keys()
            assert right == pytest.approx(left, rel=1e-4, abs=1e-6)
    # A run begun with two processes may be resumed with one.
    error = finish(command(preset, tmp_path / "two", *options, "--train.steps", "4"))
    assert "(step 3)" in error


@pytest.mark.slow
def test_two_nodes_under_torchrun_and_accelerate_launch_are_the_same_run(tiny_preset: Path, tmp_path: Path) -> None:
    """Two launches of one process each, joined over a port, as on two machines that share a folder."""
    options = ["--train.steps=1", "--checkpoint.every=1", "--prompts.evaluation=none", "--optimizer.epsilon=1e-3"]
    options += ["--noisings-per-image=1", "--rollout.sampling-steps=2"]

    def train(name: str) -> list[str]:
        return ["-m", "ramctl", *command(tiny_preset, tmp_path / name, *options)[3:]]

    python = [sys.executable, "-m"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [*python, "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    nodes = [started([*torchrun, f"--master-port={port}", f"--node-rank={rank}", *train("nodes")]) for rank in range(2)]
    for node in nodes:
        _, error = node.communicate(timeout=240)
        assert node.returncode == 0, error
    accelerate = ["accelerate.commands.launch", "--cpu", "--num_processes=2", f"--main_process_port={port}"]
    finish([*python, *accelerate, *train("accelerate")])
    finish(command(tiny_preset, tmp_path / "one", *options))
    expected = weights(tmp_path / "one" / "latest")
    for name in ("nodes", "accelerate"):
        found = weights(tmp_path / name / "latest")
        for key, value in expected.items():
            if not key.startswith("optimizer"):
                torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_exits_130_says_how_to_resume_and_the_resumption_works(
    tiny_preset: Path, tmp_path: Path, processes: int
) -> None:
    run = tmp_path / "run"
    options = ["--train.steps", "200", "--checkpoint.every", "1", "--prompts.evaluation", "none"]
    if processes == 2:
        options += ["--num-processes", "2"]
    process = started(command(tiny_preset, run, *options))
    wait_for(lambda: (run / "latest").is_symlink() and steps_written(run) >= 2, process)
    # With several processes `kill` is used, which reaches the launching one alone.
    process.send_signal(signal.SIGINT if processes == 1 else signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    (advice,) = [line for line in error.splitlines() if "resume with: ramctl train" in line]
    assert f"--output {run}" in advice
    assert ("--num-processes 2" in advice) == (processes == 2)
    assert "interrupted" in (run / "report.html").read_text()
    done = int(find_checkpoint(run / "latest").name.removeprefix("step-"))
    assert done >= 1  # the signal may have come while step 2 was being saved
    error = finish(command(tiny_preset, run, *options[2:], "--train.steps", str(done + 1)))
    assert f"(step {done})" in error
    assert f"step {done + 1}/{done + 1}" in error
    assert len(metrics(run)) == done + 1


@pytest.mark.slow
def test_two_runs_at_once_in_one_folder(tiny_preset: Path, tmp_path: Path) -> None:
    options = ("--train.steps", "200", "--prompts.evaluation", "none")
    first = started(command(tiny_preset, tmp_path / "run", *options))
    try:
        wait_for(lambda: steps_written(tmp_path / "run") >= 1, first)
        error = finish(command(tiny_preset, tmp_path / "run", *options), code=1)
        assert f"is in use by process {first.pid} on " in error
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
