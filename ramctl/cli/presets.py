"""``ramctl presets``: which experiments there are, what a preset resolves to, what a key means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ramctl.cli._output import result, say, table, write

commands = typer.Typer(help="List presets, show one resolved, explain a key.", invoke_without_command=True)


def register(app: typer.Typer) -> None:
    """Add ``presets`` to the command line."""
    app.add_typer(commands, name="presets")


@commands.callback()
def _list(context: typer.Context) -> None:
    """List the presets; `show NAME` resolves one, `explain KEY` says what a key means."""
    if context.invoked_subcommand is not None:
        return
    from ramctl.errors import ConfigError
    from ramctl.settings import list_presets, load_settings

    rows = []
    presets = list_presets()
    for preset in presets:
        try:
            model = load_settings(preset.name).config.model.path
            rows.append((preset.name, preset.description, model, preset.path))
        except ConfigError as error:
            rows.append((preset.name, f"✗ {error}", "", preset.path))
    table("Presets", ("name", "description", "model", "where"), rows)
    say("Next: ramctl presets show NAME, or ramctl train NAME")
    result("presets", ",".join(preset.name for preset in presets))


@commands.command(
    "show",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: ramctl presets show geneval-tiny --lr 1e-4 --reward-multiplier 50",
)
def _show(
    context: typer.Context,
    preset: Annotated[str, typer.Argument(help="A preset's name or a TOML file.", show_default=False)],
    config: Annotated[
        Path | None, typer.Option("--config", help="A TOML file laid over the preset.", show_default=False)
    ] = None,
) -> None:
    """Print a preset as TOML with all values, and where each came from. Settings may follow: --KEY VALUE."""
    from ramctl.settings import load_settings, parse_overrides, settings_toml

    overrides = parse_overrides(context.args, options=("--config", "--help"))
    settings = load_settings(preset, config_file=config, overrides=overrides)
    write(settings_toml(settings, [f"{settings.config.name}, resolved; comments say where a value came from"]))


@commands.command("explain", epilog="Example: ramctl presets explain reward-multiplier")
def _explain(
    key: Annotated[str, typer.Argument(help="A key (ram.min_time), its last name, or a section.", show_default=False)],
) -> None:
    """Say what a key means, what it takes and its default; for a section, all its keys."""
    from ramctl.settings import find_keys

    blocks = []
    for info in find_keys(key):
        takes = f"{info.type}; {info.range}" if info.range else info.type
        blocks.append(f"{info.key}\n  {info.description}\n  takes    {takes}\n  default  {info.default}\n")
    write("\n".join(blocks))
