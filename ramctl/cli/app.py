"""The command ``ramctl``: its subcommands, its options for all of them, and how it ends.

Each subcommand is a module of this package with a function ``register(app: typer.Typer) -> None`` that adds
it. These modules import at their top only what ``--help`` needs; the rest is imported when the command runs.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, NoReturn

import typer

from ramctl import __version__
from ramctl.cli._errors import report, warn_plainly
from ramctl.launch import Ending

#: The modules of the subcommands, in the order of the help.
COMMANDS: tuple[str, ...] = ("train", "sample", "score", "evaluate", "download_weights", "presets", "doctor")

app = typer.Typer(
    name="ramctl",
    help="Post-train text-to-image models with a reward, by Reinforce Adjoint Matching.",
    epilog="Start with `ramctl doctor`, then `ramctl presets`. Results are RESULT lines on standard output.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ramctl {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; works after a subcommand, too.")
    ] = False,
) -> None:
    # main() takes --debug out of the command line before it is parsed; the option stands here for the help.
    del version, debug


for _name in COMMANDS:
    import_module(f"ramctl.cli.{_name}").register(app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (``sys.argv`` when none is given) and exit: 0, 1, 2 or 130 as the README says."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if "OMP_WAIT_POLICY" not in os.environ:
        # OpenMP's threads wait for one another by spinning, by default so long that other programs at work slow
        # training several-fold. Read when torch is loaded; a quiet machine is as fast with it as without.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warn_plainly()
    ending = Ending()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character gets a stand-in, not a crash.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app([word for word in words if word != "--debug"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except (Exception, KeyboardInterrupt) as error:
        code = report(error, debug=debug)
        if isinstance(error, BrokenPipeError):
            # The interpreter would complain of the closed pipe when it flushes on its way out.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    ending.code = code
    sys.exit(code)
