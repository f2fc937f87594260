"""``ramctl download-weights``."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ramctl.cli._output import console, result, say, table

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ramctl.download import Need, Options, Outcome
    from ramctl.weights import Entry

_EPILOG = (
    "Example: ramctl download-weights geneval. NAME is a preset, an entry of --list or a scorer, looked for in that "
    "order; preset:NAME and scorer:NAME tell them apart. Sizes and licences are shown first. Files are verified, "
    "broken downloads resume, files put there by hand count. Gated models need HF_TOKEN or `hf auth login`; "
    "HTTPS_PROXY is respected; RAMCTL_WEIGHTS names the folder."
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
            help="What to fetch; without a name, all that the paper's presets and the evaluation need, except what "
            "only comes when named: deqa (16 GB, needs a Python environment of its own) and the models of the ocr "
            "scorer's engine paddleocr (scorer:ocr, 10 MB).",
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
    if not needs and not dry_run:
        say(f"Nothing has to be downloaded for {', '.join(names or ())}.")
        return
    # A dry run asks the servers for sizes; what was named is fetched without waiting for such answers.
    plan = _plan(needs, options, ask=dry_run)
    _show_plan(plan, options, complete=not names)
    if dry_run:
        _report_plan(plan, options)
        return
    if not names and not _confirmed(plan, yes=yes):
        raise typer.Exit(1)
    _fetch(needs, options)


def _listed(names: Sequence[str] | None, without: Sequence[str] | None) -> list[Need]:
    """The named things, or all entries with all their parts."""
    from ramctl.download import inventory, resolve

    return resolve(names, without or ()) if names else inventory(without or ())


# -- showing ----------------------------------------------------------------------------------------------------------


def _show_list(needs: Sequence[Need], options: Options, *, rehash: bool, named: bool) -> None:
    """The table of entries, and a line for each damaged file.

    With ``rehash`` damage is a failure, and so is the absence of what was ``named``.
    """
    from ramctl.download import argument_for
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
            rows.append(_list_row(entry, part, size, condition))
            lines.append((f"weights.{entry.name}{f'.{part}' if part else ''}", condition))
        problems += [f"{entry.name}/{s.file.path}: {s.detail}" for s in found if s.condition == "damaged"]
    columns = ("name", "size", "state", "used by", "gated", "licence")
    table(f"Downloads in {options.root or weights_root()}", columns, rows)
    for problem in problems:
        say(f"damaged: {problem}")
    for key, condition in lines:
        result(key, condition)
    absent = list(dict.fromkeys(key.split(".", 1)[1] for key, c in lines if c in ("missing", "partial")))
    if problems:
        entries = {need.entry.name: need.entry for need in needs}
        names = sorted({problem.partition("/")[0] for problem in problems})
        arguments = " ".join(argument_for(entries[name]) for name in names)
        say(f"Fetch again what is damaged: ramctl download-weights {arguments}")
    if rehash and named and absent:
        say(f"Not all there, so not verified: {', '.join(absent)}")
    if rehash and (problems or (named and absent)):
        raise typer.Exit(1)


def _list_row(entry: Entry, part: str, size: int, condition: str) -> tuple[str, ...]:
    """An entry in the list, or an optional part of it under the entry's own terms."""
    if part:
        return f"  part {part}", _size(size), condition, "", "", ""
    users = ", ".join(user.partition(":")[2] for user in entry.used_by)
    return entry.name, _size(size), condition, users, _gated(entry), entry.licence


class _Planned(NamedTuple):
    """A need with the bytes still to come, whether they are exact, and how it is now."""

    need: Need
    size: int
    exact: bool
    condition: str


def _plan(needs: Sequence[Need], options: Options, *, ask: bool) -> list[_Planned]:
    from ramctl.download import plan_sizes
    from ramctl.weights import condition_of, states

    return [
        _Planned(need, size, exact, condition_of(states(need.entry, need.parts, root=options.root)))
        for need, size, exact in plan_sizes(needs, options, ask=ask)
    ]


def _show_plan(plan: Sequence[_Planned], options: Options, *, complete: bool) -> None:
    """The table of what would come, the room there is for it and, of the ``complete`` set, what is not in it."""
    from ramctl.download import left_out, space_at
    from ramctl.weights import condition_of, states, weights_root

    root = options.root or weights_root()
    rows = [
        (_name(row.need), _about(row.size, row.exact), row.condition, _gated(row.need.entry), row.need.entry.licence)
        for row in plan
    ]
    what = "For the paper's presets and the evaluation, into" if complete else "To fetch into"
    table(f"{what} {root}", ("name", "still to come", "state", "gated", "licence"), rows)
    say(f"{_about(*_total(plan))} to fetch, {_size(space_at(root))} free")
    for entry in left_out(row.need for row in plan) if complete else ():
        if condition_of(states(entry, entry.parts, root=options.root)) != "present":
            size = _about(entry.bytes_about(frozenset(entry.parts)), exact=False)
            say(f"left out: {entry.name} ({size}, `ramctl download-weights {entry.name}`)")


def _report_plan(plan: Sequence[_Planned], options: Options) -> None:
    """The plan for scripts."""
    from ramctl.download import space_at
    from ramctl.weights import weights_root

    (total, exact), free = _total(plan), space_at(options.root or weights_root())
    for row in plan:
        result(f"bytes_to_fetch.{row.need.entry.name}", row.size)
    result("bytes_to_fetch", total)
    result("bytes_exact", exact)
    result("bytes_free", free)
    result("fits", total <= free)


def _confirmed(plan: Sequence[_Planned], *, yes: bool) -> bool:
    """Ask whether everything that was shown may come.

    Raises:
        UsageError: there is nobody to ask.
    """
    from ramctl.errors import UsageError

    if yes or all(row.condition == "present" for row in plan):
        return True
    size = _size(_total(plan)[0])
    if not (sys.stdin.isatty() and console.is_terminal):
        raise UsageError(
            f"About {size} would be fetched, and there is no terminal to ask on. "
            "Agree with: ramctl download-weights --yes"
        )
    return typer.confirm(f"Fetch about {size}?", err=True)


def _total(plan: Sequence[_Planned]) -> tuple[int, bool]:
    return sum(row.size for row in plan), all(row.exact for row in plan)


def _name(need: Need) -> str:
    return need.entry.name + "".join(f" + {part}" for part in sorted(need.parts))


def _gated(entry: Entry) -> str:
    return "yes" if entry.gated else "no"


def _about(size: int, exact: bool) -> str:
    """A size in bytes for people; where nothing is known of it, "unknown size"."""
    if exact:
        return _size(size)
    return f"about {_size(size)}" if size else "unknown size"


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
    _say_environment(outcomes)
    if not _all_there(outcomes):
        raise typer.Exit(1)


def _say_environment(outcomes: Sequence[Outcome]) -> None:
    """Where DeQA's weights are there and the interpreter that they need is not: the command that makes it."""
    from ramctl.errors import MissingDependencyError
    from ramctl.scorers.deqa.environment import find_python

    if not any(outcome.error is None and "scorer:deqa" in outcome.need.entry.used_by for outcome in outcomes):
        return
    try:
        find_python()
    except MissingDependencyError as error:
        say(str(error))


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
