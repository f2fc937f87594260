"""``ramctl sample``."""

from __future__ import annotations

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
from ramctl.cli._output import result, say

if TYPE_CHECKING:
    from ramctl.sources import Source

_EPILOG = (
    "Examples: ramctl sample outputs/geneval-tiny/best --prompt 'a photo of two red stars' --images-per-prompt 4 "
    "--compare-base; ramctl sample outputs/geneval/best --export-lora geneval.safetensors --lora-format kohya "
    "(for ComfyUI); ramctl sample models/tinyworld --lora mine.safetensors --prompt 'a red star'."
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
    images_per_prompt: ImagesPerPrompt = 1,
    seed: Seed = 0,
    steps: Steps = None,
    sampler: SamplerName = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
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
    lora: Annotated[
        Path | None,
        typer.Option("--lora", help="A LoRA file for a base model, in diffusers or kohya layout.", show_default=False),
    ] = None,
    export_lora: Annotated[
        Path | None,
        typer.Option(
            "--export-lora",
            help="Write the checkpoint's LoRA (or --lora) as a .safetensors file; without prompts, only that.",
            show_default=False,
        ),
    ] = None,
    lora_format: Annotated[
        str, typer.Option("--lora-format", help="Of the exported file: diffusers, or kohya (ComfyUI, sd-scripts).")
    ] = "diffusers",
    weights: Weights = "evaluation",
    base: Base = None,
    device: Device = "auto",
    precision: Precision = None,
) -> None:
    """Draw pictures from a checkpoint or a base model, as PNG files that `ramctl score` reads, and a grid.

    Runs in one process.
    """
    from ramctl.errors import UsageError
    from ramctl.launch import is_launched
    from ramctl.lora_export import check_export, check_lora
    from ramctl.prompts import Prompt, read_prompts
    from ramctl.sampling import DrawSettings, check_request
    from ramctl.sources import find_source

    if is_launched():
        raise UsageError("`ramctl sample` runs in one process; start it without a launcher.")
    found = find_source(source, base=base)
    settings = DrawSettings.of(found.evaluation).changed(
        sampling_steps=steps,
        sampler=sampler,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        seed=seed,
        images_per_prompt=images_per_prompt,
    )
    if export_lora is None and lora_format != "diffusers":
        raise UsageError("--lora-format says how --export-lora writes; give --export-lora FILE, too.")
    wanted = [Prompt(text) for text in prompt or ()] + (read_prompts(prompts) if prompts else [])
    if lora is not None:
        check_lora(found)
    if export_lora is not None:
        check_export(found, lora, export_lora, lora_format)
    draws = bool(wanted) or export_lora is None
    if draws:
        check_request(found, wanted, output, compare_base=compare_base, with_lora=lora is not None)
    if export_lora is not None:
        _export(found, export_lora, lora_format, weights, lora)
    if not draws:
        return
    from ramctl.cli._counting import counting
    from ramctl.lora_export import read_lora, with_lora
    from ramctl.sampling import sample as draw_samples
    from ramctl.sources import open_source

    updates = None if lora is None else read_lora(lora)  # before the model: a wrong file shows at once
    say(f"Loading {found.label}")
    model = open_source(found, device=device, precision=precision, which=weights)
    if lora is not None:
        model = with_lora(model, lora, updates)
    with counting() as progress:
        samples = draw_samples(model, wanted, settings, output=output, compare_base=compare_base, progress=progress)
    result("images", samples.images)
    result("folder", samples.folder)
    if samples.base is not None:
        result("tuned", samples.tuned)
        result("base", samples.base)
    result("grid", samples.grid)


def _export(found: Source, target: Path, layout: str, weights: str, lora: Path | None) -> None:
    from ramctl.lora_export import export_lora

    layers = export_lora(found, target, layout=layout, which=weights, lora=lora)
    say(f"{layers} layers in {target}")
    result("lora", target)
