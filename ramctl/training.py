"""A training run from settings to report: resume, the loop, evaluations, checkpoints, tracking, pictures."""

from __future__ import annotations

import platform
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

import ramctl
from ramctl.backbones.float8 import has_float8_products
from ramctl.backbones.registry import load_backbone
from ramctl.config import Config
from ramctl.engine.checkpoint import CheckpointStore
from ramctl.engine.distributed import World, connect
from ramctl.engine.guard import Guard
from ramctl.engine.policy import Policy
from ramctl.engine.trainer import StepResult, Trainer
from ramctl.errors import ConfigError, DataError, RamctlError
from ramctl.heldout import HeldOut
from ramctl.image_stats import image_statistics
from ramctl.observer import Observer, SilentObserver
from ramctl.prompts import Prompt, read_prompts, spread_by_tag
from ramctl.report import Comparison, ConfigRow, Report, write_report
from ramctl.resources import find_resource
from ramctl.runfolder import PROMPT_HASHES, RunFolder, numbered, prompt_hashes, require_checkpoint, resume_command
from ramctl.scorers.composite import Reward, Term
from ramctl.scorers.registry import create
from ramctl.settings import Settings
from ramctl.tracking import NoTracker, Tracker, make_tracker

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "mlflow")


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``comparisons``: metric → (before, after, low, high) of the held-out pictures' difference."""

    status: Literal["finished", "stopped"]
    folder: Path
    step: int
    seconds: float
    reason: str = ""
    best: Path | None = None
    evaluations: list[dict[str, float]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


def make_reward(config: Config) -> Reward:
    """The preset's scorers with their weights (nothing is loaded yet)."""
    return Reward(
        [
            Term(create(name, dict(term.options)), term.weight, term.scale, term.output, term.offset)
            for name, term in config.reward.scorers.items()
        ]
    )


def _check_prompts(reward: Reward, path: str, prompts: Sequence[Prompt]) -> None:
    """Let the scorers refuse a file's prompts; the error names the file."""
    try:
        reward.check_prompts(prompts)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"ramctl": ramctl.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _terminated_like_interrupt() -> Iterator[None]:
    """A SIGTERM ends the run as Ctrl+C does: cleanly, with the last checkpoint intact."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def train(
    settings: Settings, *, output: Path | None = None, fresh: bool = False, observer: Observer | None = None
) -> Outcome:
    """Run a preset to its end, resuming from the run folder's newest intact checkpoint.

    Args:
        settings: the resolved preset.
        output: the run folder; ``outputs/<name>`` by default.
        fresh: start over in a new folder (``<output>-2``, …) instead of resuming.

    Raises:
        RamctlError: whatever a user can cause; the run folder then holds everything up to the last checkpoint.
        KeyboardInterrupt: after Ctrl+C or SIGTERM, with the report written.
    """
    config = settings.config
    world, device = connect(config.runtime.device)
    told: Observer = observer if observer is not None and world.is_main else SilentObserver()
    folder = output or Path("outputs") / config.name
    path = world.broadcast(str(numbered(folder) if fresh else folder))
    run_folder = RunFolder(Path(path))
    with _terminated_like_interrupt(), _main_lock(run_folder, world, config, told):
        run = Run(settings, run_folder, world, device, told)
        outcome = run.go()
    # Only after a good end: a process that waits here for one that failed would wait for long.
    world.leave()
    return outcome


@contextmanager
def _main_lock(folder: RunFolder, world: World, config: Config, observer: Observer) -> Iterator[None]:
    """The main process holds the lock; the others wait until it has it, and stop when it does not get it."""
    with ExitStack() as stack:
        problem: str | None = None
        refusal: RamctlError | None = None
        if world.is_main:
            try:
                stack.enter_context(folder.locked(observer.note))
                folder.check_owner(config)
            except RamctlError as error:
                problem, refusal = str(error), error
        problem = world.broadcast(problem)
        if problem is not None:
            raise refusal or RamctlError(problem)
        yield


class Run:
    """One run in its folder."""

    def __init__(
        self, settings: Settings, folder: RunFolder, world: World, device: torch.device, observer: Observer
    ) -> None:
        self.settings, self.config = settings, settings.config
        self.folder, self.world, self.device, self.observer = folder, world, device, observer
        self.store = CheckpointStore(folder.path, keep=self.config.checkpoint.keep)
        self.guard = Guard()
        self.tracker: Tracker = NoTracker()
        self.run_id = ""
        self.seconds_before = 0.0
        self.began = datetime.now(UTC)
        self.started = time.perf_counter()
        self.best_value = -np.inf
        self.constant: set[str] = set()
        self.config_text = ""
        self.prompt_hashes: dict[str, str] = {}
        self.report_failed = False

    # -- set-up -----------------------------------------------------------------------------------------------------

    def go(self) -> Outcome:
        """Set up, resume, loop, finish."""
        config = self.config
        self._set_threads()
        if self.world.size > config.images_per_step:
            raise ConfigError(
                f"{self.world.size} processes cannot share {config.images_per_step} pictures per step "
                "(rollout.prompts_per_step times rollout.images_per_prompt). Use fewer processes."
            )
        if config.rollout.float8 and not has_float8_products(self.device):
            raise ConfigError(
                f"rollout.float8 needs a GPU with 8-bit matrix products (compute capability 8.9 or more), which "
                f"{self.device} is not. Leave it false."
            )
        train_prompts = read_prompts(find_resource(config.prompts.train))
        held_out = self._held_out()
        self.prompt_hashes = prompt_hashes(config)
        reward = make_reward(config)
        _check_prompts(reward, config.prompts.train, train_prompts)
        _check_prompts(reward, config.prompts.evaluation or "", held_out)
        if self.world.is_main and config.reward.self_test:
            self.observer.note(f"Checking the scorers {', '.join(reward.names)} on pictures with known answers")
            reward.self_test()
        reward.load()
        checkpoint = self._find_checkpoint()
        self.observer.note(f"Loading {config.model.path} on {self.device}")
        backbone = load_backbone(config, self.device)
        policy = Policy(backbone, config.lora, seed=config.train.seed)
        if config.train.gradient_checkpointing:
            backbone.enable_gradient_checkpointing(policy.live)
        if config.runtime.compile and self.device.type == "cuda":
            self.observer.note(
                "Compiling during the first pictures and the first step, which take longer than the others"
            )
            for network in (policy.live, policy.frozen):
                backbone.compile(network)
        self.trainer = Trainer(
            config, backbone, policy, train_prompts, reward, self.world, progress=self.observer.phase
        )
        extra = self._resume(checkpoint)
        self.evaluator = HeldOut(config, backbone, policy, held_out, reward, self.world, self.folder, self.observer)
        self._start_tracking(str(extra.get("run_id", "")), reward)
        try:
            outcome = self._loop(extra)
        except KeyboardInterrupt:
            with suppress(Exception):
                self._finish("killed", "interrupted")
            raise
        except BaseException as error:
            # A full disk stops the report, too; what is told must be the first failure.
            with suppress(Exception):
                self._finish("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise
        return outcome

    def _set_threads(self) -> None:
        if self.config.runtime.threads and self.device.type == "cpu":  # else connect() has shared the cores
            torch.set_num_threads(self.config.runtime.threads)

    def _held_out(self) -> list[Prompt]:
        config = self.config
        if config.prompts.evaluation is None:
            return []
        prompts = read_prompts(find_resource(config.prompts.evaluation))
        count = config.evaluation.prompts
        return spread_by_tag(prompts, count) if count else prompts

    def _find_checkpoint(self) -> Path | None:
        path: Path | None = None
        problems: list[str] = []
        if self.world.is_main:
            self.store.sweep_leftovers()
            path, problems = self.store.newest_intact()
        path, problems = self.world.broadcast((path, problems))
        require_checkpoint(path, problems)
        for problem in problems:
            self.observer.note(f"Damaged checkpoint left aside: {problem}")
        if path is not None:
            self.folder.check_same_experiment(path, self.settings)
        return path

    def _resume(self, checkpoint: Path | None) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if checkpoint is not None:
            extra = dict(self.store.restore(checkpoint, self.trainer).extra)
            self.guard.restore(extra["guard"])
            self.best_value = extra["best_value"] if extra["best_value"] is not None else -np.inf
            self.seconds_before = extra["seconds"]
            self.began = datetime.fromisoformat(extra["started"])
            self.observer.note(f"Resuming from {checkpoint} (step {self.trainer.step_index})")
        if self.world.is_main:
            self.config_text = self.folder.write_config(self.settings)
            self.folder.rewind(self.trainer.step_index)
        self.world.barrier()
        return extra

    def _start_tracking(self, run_id: str, reward: Reward) -> None:
        if not self.world.is_main:
            return
        tracking = self.config.tracking
        self.tracker = make_tracker(tracking.kind, tracking.uri, tracking.experiment)
        params = {
            **self.config.model_dump(),
            "scorer_versions": reward.versions,
            "run_folder": str(self.folder.path.resolve()),
            "versions": versions(),
        }
        self.run_id = self.tracker.start(self.config.name, params, run_id or None)
        self.tracker.log(self.trainer.step_index, {}, [self.folder.path / "config.toml"], "config")

    # -- the loop ---------------------------------------------------------------------------------------------------

    def _loop(self, resumed: Mapping[str, Any]) -> Outcome:
        """Step, save, evaluate, to the end; ``resumed`` is what the checkpoint knows besides tensors, if there is one.

        A checkpoint is saved before its evaluation: whatever goes wrong there must not cost the step's weights.
        """
        config, trainer = self.config, self.trainer
        self.observer.started(trainer.step_index, config.train.steps, self.folder.path)
        if not self.evaluator.done_at(0):
            self._evaluate("reference", 0)
        reason = self._make_up_for(resumed)
        while reason is None and trainer.step_index < config.train.steps:
            result = trainer.step()
            reason = self._record(result)
            last = trainer.step_index >= config.train.steps or reason is not None
            every = config.evaluation.every
            due = bool(self.evaluator.prompts) and (last or bool(every and trainer.step_index % every == 0))
            if last or due or trainer.step_index % config.checkpoint.every == 0:
                self._save(evaluation_due=due, reason=reason)
            if due:
                self._evaluate_checkpoint(reason)
        return self._finish("finished", "") if reason is None else self._finish("stopped", reason)

    def _make_up_for(self, resumed: Mapping[str, Any]) -> str | None:
        """Do what should have followed the checkpoint that the run goes on from; the reason to stop found with it."""
        step, reason = self.trainer.step_index, resumed.get("stopped")
        due = resumed.get("evaluation_due", False) or step >= self.config.train.steps
        if step == 0 or not due or not self.evaluator.prompts:
            return None
        if self.evaluator.done_at(step):
            self._rank(step, self.evaluator.mean_at(step), diverged=reason is not None)
            return None
        self._evaluate_checkpoint(reason)
        return reason if self.config.train.guard else None

    def _record(self, result: StepResult) -> str | None:
        """Write a step's metrics; the guard's reason to stop, if it has one (the same on every process)."""
        metrics = dict(result.metrics)
        self._warn_of_constant_rewards(metrics)
        reason = self.guard.update(metrics["reward/mean"], metrics["drift"])
        metrics.update(self._image_metrics(result.images))
        if self.world.is_main:
            self.folder.append("metrics.jsonl", metrics)
            self.tracker.log(int(metrics["step"]), metrics)
            self.observer.step(metrics, self.config.train.steps)
        return reason if self.config.train.guard else None

    def _warn_of_constant_rewards(self, metrics: dict[str, float]) -> None:
        """A scorer with one value for all of a step's pictures teaches nothing, and is often broken."""
        own = {k: v for k, v in metrics.items() if k.startswith("score/") and k.endswith("/std")}
        stds = {"the reward": metrics["reward/std"]}
        stds |= {k.removeprefix("score/").removesuffix("/std"): v for k, v in own.items()}
        constant = {name for name, std in stds.items() if std == 0}
        for name in sorted(constant - self.constant):
            self.observer.note(
                f"Step {int(metrics['step'])}: {name} was the same for all {self.config.images_per_step} pictures, so "
                "it taught nothing. If the pictures differ, look whether the scorer works: ramctl doctor."
            )
        self.constant = constant

    def _image_metrics(self, images: NDArray[np.uint8]) -> dict[str, float]:
        """Image statistics over the pictures of all processes."""
        parts = self.world.gather((len(images), image_statistics(images)))
        total = sum(count for count, _ in parts)
        return {f"images/{name}": sum(count * part[name] for count, part in parts) / total for name in parts[0][1]}

    def _evaluate(self, which: Literal["reference", "evaluation"], step: int) -> float | None:
        """Evaluate, write the row and the pictures of ``step``; the mean held-out value, None without prompts."""
        row = self.evaluator.evaluate(which, step)
        if row is None:
            return None
        if self.world.is_main:
            self.folder.put("evaluations.jsonl", row)
            self.tracker.log(
                step,
                {k: v for k, v in row.items() if k != "step"},
                self.evaluator.grid_files(step),
                "samples",
            )
            self.observer.evaluated(row)
        return row["eval/mean"]

    def _evaluate_checkpoint(self, reason: str | None) -> None:
        """Evaluate the checkpoint of this step; ``reason``: why the guard stops the run there, if it does."""
        step = self.trainer.step_index
        self._rank(step, self._evaluate("evaluation", step), diverged=reason is not None)
        if self.world.is_main:
            self._write_report("running", "")

    def _rank(self, step: int, value: float | None, *, diverged: bool) -> None:
        """Mark the checkpoint of ``step`` as the best where its held-out value is the highest so far."""
        if value is not None and value > self.best_value and not diverged:
            self.best_value = value
            if self.world.is_main:
                self.store.mark_best(step)

    def _save(self, *, evaluation_due: bool, reason: str | None) -> None:
        """Checkpoint; without held-out prompts the best has the highest training reward."""
        best = False
        if not self.evaluator.prompts:
            reward = float(np.mean(self.guard.rewards[-self.guard.window :]))
            best = reward > self.best_value and reason is None
            self.best_value = reward if best else self.best_value
        if self.world.is_main:
            extra = {
                "run_id": self.run_id,
                "guard": self.guard.state(),
                "best_value": self.best_value if np.isfinite(self.best_value) else None,
                # With these a resumed run does what a kill kept from following this checkpoint.
                "evaluation_due": evaluation_due,
                "stopped": reason,
                "started": self.began.isoformat(),
                "seconds": self._seconds(),
                "versions": versions(),
                PROMPT_HASHES: self.prompt_hashes,
            }
            self.store.save(self.trainer, self.config_text, extra, best=best)
        self.world.barrier()

    # -- the end ----------------------------------------------------------------------------------------------------

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _finish(self, status: Literal["finished", "stopped", "failed", "killed"], reason: str) -> Outcome:
        outcome = Outcome(
            status="finished" if status == "finished" else "stopped",
            folder=self.folder.path,
            step=self.trainer.step_index,
            seconds=self._seconds(),
            reason=reason,
            best=self.store.best if self.world.is_main else None,
            evaluations=self.folder.rows("evaluations.jsonl") if self.world.is_main else [],
            comparisons=self.evaluator.comparisons(self.trainer.step_index) if self.world.is_main else [],
        )
        if self.world.is_main:
            self._write_report("failed" if status == "failed" else outcome.status, reason)
            for comparison in outcome.comparisons:
                self.tracker.log(
                    self.trainer.step_index, {f"gain/{comparison.name}": comparison.after - comparison.before}
                )
            report = self.folder.path / "report.html"
            self.tracker.log(self.trainer.step_index, {}, [report] if report.is_file() else [])
            self.tracker.finish("killed" if status == "killed" else "failed" if status == "failed" else "finished")
        return outcome

    def _write_report(self, status: Literal["running", "finished", "stopped", "failed"], reason: str) -> None:
        """Write the page anew; a run does not stop for want of it, whatever is wrong: the first failure is told."""
        try:
            self._write_page(status, reason)
        except Exception as error:
            if not self.report_failed:
                told = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.observer.note(f"The report could not be written, and the run goes on without it: {told}")
            self.report_failed = True

    def _write_page(self, status: Literal["running", "finished", "stopped", "failed"], reason: str) -> None:
        step, folder = self.trainer.step_index, self.folder.path
        best = self.store.best
        write_report(
            folder / "report.html",
            Report(
                title=self.config.name,
                preset=self.config.description,
                status=status,
                reason=reason,
                step=step,
                total_steps=self.config.train.steps,
                started=self.began,
                seconds=self._seconds(),
                best_step=int(best.name.removeprefix("step-")) if best else None,
                metrics=self.folder.rows("metrics.jsonl"),
                evaluations=self.folder.rows("evaluations.jsonl"),
                comparisons=self.evaluator.comparisons(step),
                grids=self.evaluator.grids(step),
                config=config_rows(self.settings),
                versions=versions(),
                commands={
                    "Resume": resume_command(folder),
                    "Evaluate": shlex.join(["ramctl", "evaluate", f"{folder}/latest"]),
                    "Sample": shlex.join(["ramctl", "sample", f"{folder}/latest", "--compare-base"]),
                },
            ),
        )


def config_rows(settings: Settings) -> list[ConfigRow]:
    """Every key, its value and where it came from."""
    rows = []
    for key, source in settings.provenance.items():
        value: Any = settings.config.model_dump()
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        rows.append(ConfigRow(key, value, source))
    return rows
