"""``ramctl download-weights``."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from ramctl.cli._output import console, result, say, table

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ramctl.download import Need, Options, Outcome

_EPILOG = (
    "Example: ramctl download-weights geneval. NAME is an entry of --list, a scorer or a preset; scorer:NAME and "
    "preset:NAME tell them apart. Files are verified, broken downloads resume, files put there by hand count. Gated "
    "models need HF_TOKEN or `hf auth login`; HTTPS_PROXY is respected; RAMCTL_WEIGHTS names the folder."
)
#: Seconds between two lines about a file where there is no terminal.
_LINE_EVERY = 15.0


def register(app: typer.Typer) -> None:
    """Add ``download-weights`` to the command line."""
    app.command("download-weights", epilog=_EPILOG)(download_weights)


def download_weights(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME",
            help="What to fetch; without a name, all that the paper's presets and the evaluation need.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show what there is and what is here; fetch nothing.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file again and compare its hash.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be fetched, and the free space.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before fetching everything.")] = False,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", help="Optional part to leave out, such as t5; repeatable.", show_default=False),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            "--mirror", help="Address in place of https://huggingface.co (or HF_ENDPOINT).", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of all downloads.", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, max=32, help="Files fetched at once.")] = 4,
) -> None:
    """Fetch the weights and prompts that scorers and presets need."""
    from ramctl.download import Options, everything, hub_address, resolve
    from ramctl.errors import UsageError

    if show + verify + dry_run > 1:
        raise UsageError("--list, --verify and --dry-run exclude each other.")
    if output is not None and output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file; name a folder.")
    hub_address(mirror)
    options = Options(root=output.expanduser() if output else None, mirror=mirror, jobs=jobs)
    if show or verify:
        _show_list(_listed(names, without), options, rehash=verify, named=bool(names))
        return
    needs = resolve(names, without or ()) if names else everything(without or ())
    if dry_run:
        _show_plan(needs, options)
        return
    if not names and not _confirmed(needs, options, yes=yes):
        raise typer.Exit(1)
    if not needs:
        say(f"Nothing has to be downloaded for {', '.join(names or ())}.")
        return
    _fetch(needs, options)


def _listed(names: Sequence[str] | None, without: Sequence[str] | None) -> list[Need]:
    """The named things, or all entries with all their parts."""
    from ramctl.download import resolve
    from ramctl.weights import load_manifest

    return resolve(names or [*load_manifest()], without or ())


# -- showing ----------------------------------------------------------------------------------------------------------


def _show_list(needs: Sequence[Need], options: Options, *, rehash: bool, named: bool) -> None:
    """The table of entries, and a line for each damaged file.

    With ``rehash`` damage is a failure, and so is the absence of what was ``named``.
    """
    from ramctl.weights import condition_of, states, weights_root

    rows, lines, problems = [], [], []
    for need in needs:
        entry = need.entry
        if rehash and console.is_terminal:
            say(f"reading {entry.name} …")
        found = states(entry, need.parts, root=options.root, rehash=rehash)
        for part in ("", *sorted(need.parts)):
            here = [state for state in found if (state.file.part or "") == part]
            condition = condition_of(here)
            about = sum(s.bytes_here if s.condition == "present" else s.file.bytes_about for s in here)
            size = about if part else max(about, entry.about_bytes or 0)
            rows.append((f"  part {part}" if part else entry.name, _size(size), condition, _users(entry.used_by, part)))
            lines.append((f"weights.{entry.name}{f'.{part}' if part else ''}", condition))
        problems += [f"{entry.name}/{s.file.path}: {s.detail}" for s in found if s.condition == "damaged"]
    table(f"Downloads in {options.root or weights_root()}", ("name", "size", "state", "used by"), rows)
    for problem in problems:
        say(f"damaged: {problem}")
    for key, condition in lines:
        result(key, condition)
    absent = list(dict.fromkeys(key.split(".", 1)[1] for key, c in lines if c in ("missing", "partial")))
    if problems:
        names = sorted({problem.partition("/")[0] for problem in problems})
        say(f"Fetch again what is damaged: ramctl download-weights {' '.join(names)}")
    if rehash and named and absent:
        say(f"Not all there, so not verified: {', '.join(absent)}")
    if rehash and (problems or (named and absent)):
        raise typer.Exit(1)


def _show_plan(needs: Sequence[Need], options: Options) -> None:
    from ramctl.download import plan_sizes, space_at
    from ramctl.weights import weights_root

    plan = plan_sizes(needs, options)
    root = options.root or weights_root()
    table(
        f"To fetch into {root}",
        ("name", "still to come", "licence"),
        [(_name(need), ("" if exact else "about ") + _size(size), need.entry.licence) for need, size, exact in plan],
    )
    total, free = sum(size for _, size, _ in plan), space_at(root)
    exact = all(exact for _, _, exact in plan)
    say(f"{'' if exact else 'about '}{_size(total)} to fetch, {_size(free)} free")
    for need, size, _ in plan:
        result(f"bytes_to_fetch.{need.entry.name}", size)
    result("bytes_to_fetch", total)
    result("bytes_exact", exact)
    result("bytes_free", free)
    result("fits", total <= free)


def _confirmed(needs: Sequence[Need], options: Options, *, yes: bool) -> bool:
    """Show everything that would come, and ask.

    Raises:
        UsageError: there is nobody to ask.
    """
    from ramctl.download import estimate
    from ramctl.errors import UsageError
    from ramctl.weights import condition_of, states, weights_root

    rows, total, complete = [], 0, True
    for need in needs:
        here = condition_of(states(need.entry, need.parts, root=options.root)) == "present"
        size = estimate(need, options)
        total, complete = total + size, complete and here
        gated = ", gated" if need.entry.gated else ""
        rows.append((_name(need), "here" if here else _size(size), need.entry.licence + gated))
    table(f"For the paper's presets and the evaluation, into {options.root or weights_root()}", _COLUMNS, rows)
    if yes or complete:
        return True
    if not (sys.stdin.isatty() and console.is_terminal):
        raise UsageError(
            f"About {_size(total)} would be fetched, and there is no terminal to ask on. "
            "Agree with: ramctl download-weights --yes"
        )
    return typer.confirm(f"Fetch about {_size(total)}?", err=True)


_COLUMNS = ("name", "still to come", "licence")


def _name(need: Need) -> str:
    return need.entry.name + "".join(f" + {part}" for part in sorted(need.parts))


def _users(used_by: Sequence[str], part: str) -> str:
    return "" if part else ", ".join(user.partition(":")[2] for user in used_by)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


# -- fetching ---------------------------------------------------------------------------------------------------------


def _fetch(needs: Sequence[Need], options: Options) -> None:
    from ramctl.download import fetch_all
    from ramctl.weights import ROOT_VARIABLE, weights_root

    try:
        with _Bars() as bars:
            outcomes = fetch_all(needs, options, bars)
    except KeyboardInterrupt:
        say("What came is kept: the same command goes on from there.")
        raise
    for outcome in outcomes:
        result(f"weights.{outcome.need.entry.name}", "present" if outcome.error is None else "failed")
    result("bytes_fetched", sum(outcome.bytes_fetched for outcome in outcomes))
    result("folder", options.root or weights_root())
    if options.root is not None and options.root.absolute() != weights_root().absolute():
        say(f"ramctl looks there when told so: export {ROOT_VARIABLE}={shlex.quote(str(options.root.absolute()))}")
    if not _all_there(outcomes):
        raise typer.Exit(1)


def _all_there(outcomes: Sequence[Outcome]) -> bool:
    """Say what came and what failed; whether nothing failed."""
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in outcomes:
        name = outcome.need.entry.name
        if outcome.error is not None:
            say(f"✗ {name}: {outcome.error}", style="red")
        elif outcome.fetched:
            say(f"✓ {name}: {len(outcome.fetched)} files, {_size(outcome.bytes_fetched)}, verified")
        else:
            say(f"✓ {name}: already here")
    return not failed


class _Bars:
    """How far each file is: bars on a terminal, now and then a line elsewhere. Use as a context manager."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(),
            Speed(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line above the bars."""
        say(text)

    def moved(self, name: str, here: int, total: int | None) -> None:
        """Move a file's bar; without a terminal, print a line when the last is some seconds old."""
        with self._lock:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total, completed=here)
                self._said[name] = time.monotonic()
            self._progress.update(self._tasks[name], completed=here, total=total)
            if console.is_terminal or time.monotonic() - self._said[name] < _LINE_EVERY:
                return
            self._said[name] = time.monotonic()
        say(f"{name}: {_size(here)}{f' of {_size(total)}' if total else ''}")

    def ended(self, name: str) -> None:
        """Take the file's bar away."""
        with self._lock:
            task = self._tasks.pop(name, None)
            if task is not None:
                self._progress.remove_task(task)
