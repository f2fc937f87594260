"""``ramctl sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ramctl.cli._output import result, say

_EPILOG = (
    "Example: ramctl sample outputs/geneval-tiny/best --prompt 'a photo of two red stars' --images-per-prompt 4 "
    "--compare-base"
)


def register(app: typer.Typer) -> None:
    """Add ``sample`` to the command line."""
    app.command("sample", epilog=_EPILOG)(sample)


def sample(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint, its latest or best link, a run folder, a diffusers folder or a hub id.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What to draw; repeatable.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Prompt file: .jsonl, or .txt with a prompt a line.", show_default=False),
    ] = None,
    images_per_prompt: Annotated[int, typer.Option("--images-per-prompt", "-n", help="Pictures per prompt.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Euler steps. Default: the source's own.", show_default=False)
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", help="1 is none. Default: the source's own.", show_default=False),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", help="Default: the source's own.", show_default=False)
    ] = None,
    compare_base: Annotated[
        bool,
        typer.Option("--compare-base", help="Draw with the untrained model, too, from the same noise."),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="New or empty folder. Default: outputs/samples/<source>, numbered when taken.",
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
        str | None,
        typer.Option("--precision", help="float32 or bfloat16. Default: the source's own.", show_default=False),
    ] = None,
) -> None:
    """Draw pictures from a checkpoint or a base model, as PNG files that `ramctl score` reads, and a grid.

    Runs in one process.
    """
    from ramctl.cli._counting import counting
    from ramctl.errors import UsageError
    from ramctl.launch import is_launched
    from ramctl.prompts import Prompt, read_prompts
    from ramctl.sampling import DrawSettings, check_request
    from ramctl.sampling import sample as draw_samples
    from ramctl.sources import find_source, open_source

    if is_launched():
        raise UsageError("`ramctl sample` runs in one process; start it without a launcher.")
    found = find_source(source, base=base)
    settings = DrawSettings.of(found.evaluation).changed(
        sampling_steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        seed=seed,
        images_per_prompt=images_per_prompt,
    )
    wanted = [Prompt(text) for text in prompt or ()] + (read_prompts(prompts) if prompts else [])
    check_request(found, wanted, output, compare_base=compare_base)
    say(f"Loading {found.label}")
    model = open_source(found, device=device, precision=precision, which=weights)
    with counting() as progress:
        samples = draw_samples(model, wanted, settings, output=output, compare_base=compare_base, progress=progress)
    result("images", samples.images)
    result("folder", samples.folder)
    if samples.base is not None:
        result("tuned", samples.tuned)
        result("base", samples.base)
    result("grid", samples.grid)
