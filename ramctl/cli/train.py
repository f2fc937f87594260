"""``ramctl train``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ramctl.cli._output import result, say
from ramctl.errors import RamctlError, UsageError

if TYPE_CHECKING:
    from ramctl.settings import Settings
    from ramctl.training import Outcome

_EPILOG = (
    "Any key of the preset can be given as --section.key VALUE, or --key VALUE where the name is unique: "
    "`ramctl train geneval-tiny --lr 5e-4 --reward-multiplier 20`. `ramctl presets explain KEY` describes one."
)


#: the command's own options, for the suggestion after a typo.
_OPTIONS = ("--config", "--output", "--fresh", "--dry-run", "--gpu-memory", "--num-processes", "--help", "--debug")


def train(
    context: typer.Context,
    preset: Annotated[str, typer.Argument(help="Name of a preset (`ramctl presets`) or a TOML file.")],
    config: Annotated[Path | None, typer.Option(help="A TOML file laid over the preset.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder. Default: outputs/<preset>.")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over in a new folder (<output>-2, …); nothing is deleted.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show settings, derived sizes, memory and weights; train nothing."),
    ] = False,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="With --dry-run: plan for a GPU of this many GB (as on the box: 24 is 24 GiB), on any machine.",
            show_default=False,
        ),
    ] = None,
    num_processes: Annotated[int, typer.Option(min=1, help="Processes on this machine (GPUs, or CPU processes).")] = 1,
) -> None:
    """Post-train a model. Running the same command again resumes from the newest checkpoint."""
    from ramctl.settings import load_settings, parse_overrides

    if gpu_memory is not None and not dry_run:
        raise UsageError("--gpu-memory only plans: give it with --dry-run. A run takes the GPU that is there.")
    settings = load_settings(preset, config_file=config, overrides=parse_overrides(context.args, _OPTIONS))
    if dry_run:
        from ramctl.cli._plan import show_plan

        show_plan(settings, processes=num_processes, gpu_memory=gpu_memory, output=output)
        return
    if num_processes > 1:
        from ramctl.launch import is_launched, launch

        if not is_launched():
            raise typer.Exit(launch(sys.argv[1:], num_processes))
    _run(settings, output, fresh=fresh)


def _run(settings: Settings, output: Path | None, *, fresh: bool) -> None:
    from ramctl.cli._progress import TrainingProgress
    from ramctl.runfolder import resume_command
    from ramctl.training import train as run_training

    is_main = int(os.environ.get("RANK", "0")) == 0
    progress = TrainingProgress()
    try:
        with progress:
            outcome = run_training(settings, output=output, fresh=fresh, observer=progress)
    except KeyboardInterrupt:
        if is_main and progress.folder is not None:
            say(f"The last checkpoint is intact; resume with: {resume_command(progress.folder)}")
        raise
    if is_main:
        _show(outcome)
    if outcome.status == "stopped":
        best = f" The best checkpoint is {outcome.best}." if outcome.best else ""
        raise RamctlError(
            f"Stopped at step {outcome.step}: {outcome.reason}.{best} "
            "Lower optimizer.lr or ram.reward_multiplier and start over with --fresh."
        )


def _show(outcome: Outcome) -> None:
    folder = outcome.folder
    for comparison in outcome.comparisons:
        result(f"{comparison.name}_before", comparison.before)
        result(f"{comparison.name}_after", comparison.after)
        result(f"{comparison.name}_gain", comparison.after - comparison.before)
        result(f"{comparison.name}_gain_low", comparison.low)
        result(f"{comparison.name}_gain_high", comparison.high)
    result("steps", outcome.step)
    result("seconds", outcome.seconds)
    result("checkpoint", folder / "latest")
    if outcome.best:
        result("best", outcome.best)
    result("report", folder / "report.html")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "train",
        epilog=_EPILOG,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(train)
