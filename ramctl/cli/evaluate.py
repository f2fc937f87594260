"""``ramctl evaluate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ramctl.cli._output import result, say, table

if TYPE_CHECKING:
    from ramctl.evaluating import Report
    from ramctl.evaluation_results import Compared, Evaluated

_EPILOG = (
    "Examples: ramctl evaluate outputs/geneval-tiny/best --compare base; "
    "ramctl evaluate --model models/tinyworld --preset geneval-tiny (the untrained baseline). "
    "Pictures already drawn with the same settings are kept. Runs in one process, or in several under "
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
    model: Annotated[
        str | None,
        typer.Option("--model", help="A base model instead: diffusers folder or hub id.", show_default=False),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            help="A second source on the same prompts and noise; `base` is the checkpoint's base model.",
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
    images_per_prompt: Annotated[
        int | None, typer.Option("--images-per-prompt", "-n", help="Pictures per prompt.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Euler steps.", show_default=False)] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="1 is none.", show_default=False)
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the noise.", show_default=False)] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Prompts used, spread over the tags; 0 is all.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the evaluation. Default: evaluations/… beside the checkpoint.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str, typer.Option("--weights", help="Of a checkpoint: evaluation (the EMA), policy or old.")
    ] = "evaluation",
    base: Annotated[
        str | None,
        typer.Option("--base", help="Where a checkpoint's base model lies, if it moved.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str | None, typer.Option("--precision", help="float32 or bfloat16.", show_default=False)
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Check each scorer on known pictures first.")
    ] = True,
    drawbench_metrics: Annotated[
        list[str] | None,
        typer.Option("--drawbench-metrics", help="Scorers for DrawBench's prompts.", show_default=False),
    ] = None,
    drawbench_prompts: Annotated[
        Path | None,
        typer.Option("--drawbench-prompts", help="Your copy of DrawBench's prompts.", show_default=False),
    ] = None,
) -> None:
    """Draw held-out prompts and score them, as training did or as told; writes scores.json with the protocol."""
    from ramctl.cli._counting import counting
    from ramctl.errors import UsageError
    from ramctl.scoring import parse_options, split_names

    if (checkpoint is None) == (model is None):
        raise UsageError("Name one source: a checkpoint, or --model with a diffusers folder or a hub id.")
    rewarded = split_names(rewards) if rewards else []
    metrics = split_names(drawbench_metrics) if drawbench_metrics else []
    options = parse_options(option or ())
    settings: dict[str, int | float | str | None] = {
        "images_per_prompt": images_per_prompt,
        "sampling_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "seed": seed,
    }
    from ramctl.evaluating import Request
    from ramctl.evaluating import evaluate as run

    request = Request(
        source=checkpoint or model or "",
        is_model=model is not None,
        compare=compare,
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
        self_test=self_test,
        drawbench_metrics=metrics,
        drawbench_prompts=drawbench_prompts,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"Evaluating {request.source}")
    with counting() as progress:
        report = run(request, progress)
    if report.is_main:
        _show(report)


def _show(report: Report) -> None:
    _show_part("", report.evaluated, report.compared)
    if report.drawbench is not None:
        _show_part("drawbench/", report.drawbench, report.drawbench_compared)


def _show_part(prefix: str, evaluated: Evaluated, compared: Compared | None) -> None:
    from ramctl.evaluating import SCORES
    from ramctl.evaluation_results import comparison_table, result_lines
    from ramctl.scoring import tag_table

    if evaluated.kept:
        say(f"{evaluated.kept} pictures in {evaluated.folder} were drawn before and kept")
    table(f"{evaluated.label}: {len(evaluated.scored.rows)} pictures", *tag_table(evaluated.summaries))
    if compared is not None:
        table(f"{evaluated.label} against {compared.other.label}", *comparison_table(evaluated, compared))
    for name, file, reason in evaluated.scored.failures()[:10]:
        say(f"{file.name} not scored by {name}: {reason}")
    for key, value in result_lines(evaluated, compared):
        result(f"{prefix}{key}", value)
    result(f"{prefix}folder", evaluated.folder)
    result(f"{prefix}scores", evaluated.folder / SCORES)
