"""``ramctl evaluate``."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ramctl.cli._options import (
    Base,
    Device,
    GuidanceScale,
    ImagesPerPrompt,
    NegativePrompt,
    Precision,
    SamplerName,
    Seed,
    Steps,
    Weights,
)
from ramctl.cli._output import result, say, table

if TYPE_CHECKING:
    from ramctl.evaluating import Request
    from ramctl.evaluation_results import Compared, Evaluated

_EPILOG = (
    "Examples: ramctl evaluate outputs/geneval-tiny/best base (against its base model); "
    "ramctl evaluate --model models/tinyworld --preset geneval-tiny (the untrained baseline); "
    "ramctl evaluate outputs/geneval/best --rewards geneval -n 4 --drawbench-metrics imagereward,pickscore. "
    "Pictures already drawn with the same settings are kept, and so are their scores. Several processes also under "
    "`accelerate launch -m ramctl evaluate …` or torchrun."
)


def register(app: typer.Typer) -> None:
    """Add ``evaluate`` to the command line."""
    app.command("evaluate", epilog=_EPILOG)(evaluate)


def evaluate(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="A checkpoint, its latest or best link, or a run folder.", show_default=False),
    ] = None,
    other: Annotated[
        str | None,
        typer.Argument(
            help="What to compare it with on the same prompts and noise: another one, a base model, or `base`.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A base model instead: diffusers folder or hub id.", show_default=False),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            help="The same as a second argument; `base` is the checkpoint's base model.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Take prompts, scorers and settings from this preset.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Prompt file. Default: the held-out prompts.", show_default=False),
    ] = None,
    rewards: Annotated[
        list[str] | None,
        typer.Option("--rewards", help="Scorers, e.g. geneval,ocr. Default: the rewards.", show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="SCORER.KEY=VALUE; repeatable.", show_default=False),
    ] = None,
    images_per_prompt: ImagesPerPrompt = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    seed: Seed = None,
    limit: Annotated[
        int,
        typer.Option("--limit", help="Prompts used, spread over the tags. Default: all.", show_default=False),
    ] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the evaluation. Default: evaluations/… beside the checkpoint.",
            show_default=False,
        ),
    ] = None,
    weights: Weights = "evaluation",
    base: Base = None,
    device: Device = "auto",
    precision: Precision = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Whether runtime.compile of the training config counts. Default: where many pictures are drawn.",
            show_default=False,
        ),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Check each scorer on known pictures first.")
    ] = True,
    drawbench_metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--drawbench-metrics",
            help="Scorers for DrawBench's prompts, e.g. imagereward,pickscore.",
            show_default=False,
        ),
    ] = None,
    drawbench_prompts: Annotated[
        Path | None,
        typer.Option(
            "--drawbench-prompts",
            help="Other prompts in their place: .csv, .jsonl or .txt. Default: the downloaded ones.",
            show_default=False,
        ),
    ] = None,
    num_processes: Annotated[
        int, typer.Option("--num-processes", min=1, help="Processes on this machine (GPUs, or CPU processes).")
    ] = 1,
) -> None:
    """Draw held-out prompts and score them, as training did or as told.

    Writes scores.json with the protocol and evaluation.html with the pictures.
    """
    from ramctl.errors import UsageError
    from ramctl.scoring import parse_options, split_names

    if (checkpoint is None) == (model is None):
        raise UsageError("Name one source: a checkpoint, or --model with a diffusers folder or a hub id.")
    if other is not None and compare is not None:
        raise UsageError(f"Compare with one other source: {other} or --compare {compare}, not both.")
    rewarded = split_names(rewards) if rewards else []
    metrics = split_names(drawbench_metrics) if drawbench_metrics else []
    options = parse_options(option or ())
    settings: dict[str, int | float | str | None] = {
        "images_per_prompt": images_per_prompt,
        "sampling_steps": steps,
        "sampler": sampler,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "seed": seed,
    }
    if num_processes > 1:
        from ramctl.launch import is_launched, launch

        if not is_launched():
            raise typer.Exit(launch(sys.argv[1:], num_processes))
    from ramctl.evaluating import Request

    request = Request(
        source=checkpoint or model or "",
        is_model=model is not None,
        compare=other or compare,
        preset=preset,
        prompts=prompts,
        rewards=rewarded,
        options=options,
        limit=limit,
        settings=settings,
        output=output,
        weights=weights,
        base=base,
        device=device,
        precision=precision,
        compile=compile,
        self_test=self_test,
        drawbench_metrics=metrics,
        drawbench_prompts=drawbench_prompts,
    )
    _run(request)


def _run(request: Request) -> None:
    from ramctl.cli._counting import counting
    from ramctl.evaluating import evaluate as run

    if int(os.environ.get("RANK", "0")) == 0:
        say(f"Evaluating {request.source}")
    with counting() as progress:
        report = run(request, progress, partial(say, style="yellow"))
    if report.is_main:
        _show_part("", report.evaluated, report.compared)
        if report.drawbench is not None:
            _show_part("drawbench/", report.drawbench, report.drawbench_compared)


def _show_part(prefix: str, evaluated: Evaluated, compared: Compared | None) -> None:
    from ramctl.evaluation_folder import PAGE, SCORES
    from ramctl.evaluation_results import comparison_table, result_lines, results_table

    for each in (evaluated,) if compared is None else (evaluated, compared.other):
        if each.kept:
            again = f", and {each.kept_scores} of their scores" if each.kept_scores else ""
            say(f"{each.kept} pictures in {each.folder} were drawn before and kept{again}")
        for note in each.notes():
            say(f"{each.label}: {note}", style="yellow")
    table(f"{evaluated.label}: {len(evaluated.scored.rows)} pictures", *results_table(evaluated))
    if compared is not None:
        table(f"{evaluated.label} against {compared.other.label}", *comparison_table(evaluated, compared))
    for name, file, reason in evaluated.scored.failures()[:10]:
        say(f"{file.name} not scored by {name}: {reason}")
    for key, value in result_lines(evaluated, compared):
        result(f"{prefix}{key}", value)
    result(f"{prefix}folder", evaluated.folder)
    result(f"{prefix}scores", evaluated.folder / SCORES)
    result(f"{prefix}page", evaluated.folder / PAGE)
