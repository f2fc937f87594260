"""Options that several commands share: one declaration each, so that a word means the same wherever it is typed."""

from __future__ import annotations

from typing import Annotated

import typer

Steps = Annotated[
    int | None, typer.Option("--steps", help="Steps of the sampler. Default: the source's own.", show_default=False)
]
SamplerName = Annotated[
    str | None,
    typer.Option("--sampler", help="euler or dpm2m. Default: the source's own.", show_default=False),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option("--guidance-scale", help="1 is none. Default: the source's own.", show_default=False),
]
NegativePrompt = Annotated[
    str | None, typer.Option("--negative-prompt", help="Default: the source's own.", show_default=False)
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the noise.")]
ImagesPerPrompt = Annotated[int | None, typer.Option("--images-per-prompt", "-n", help="Pictures per prompt.")]
Weights = Annotated[str, typer.Option("--weights", help="Of a checkpoint: evaluation (the EMA), policy or old.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Where a checkpoint's base model lies, if it moved.", show_default=False),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="float32 or bfloat16. Default: the source's own.", show_default=False),
]
