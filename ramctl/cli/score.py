"""``ramctl score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ramctl.cli._output import result, say, table, write

_SHOWN_FAILURES = 10
_EPILOG = (
    "Example: ramctl score pictures/ --scorer geneval --scorer ocr --output scores.jsonl. The folder is flat "
    "(pictures and metadata.jsonl) or in GenEval's layout. A picture that cannot be scored is reported and left "
    "out of the means; the exit code is 1 only when a scorer could score none."
)


def register(app: typer.Typer) -> None:
    """Add ``score`` to the command line."""
    app.command("score", epilog=_EPILOG)(score)


def score(
    images: Annotated[Path, typer.Argument(help="Folder of pictures with their prompts.", show_default=False)],
    scorer: Annotated[
        list[str] | None,
        typer.Option("--scorer", "-s", help="Name of a scorer; repeatable.", show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="SCORER.KEY=VALUE; repeatable.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSONL file: one line per picture.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object in place of the RESULT lines.")
    ] = False,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Check each scorer on known pictures first.")
    ] = True,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Most pictures scored at once.")] = 64,
) -> None:
    """Score a folder of pictures, whoever made them."""
    from ramctl.cli._counting import counting
    from ramctl.scoring import (
        check_output,
        folder_json,
        image_rows,
        make_scorers,
        parse_options,
        result_items,
        score_folder,
        split_names,
        tag_table,
        write_json_lines,
    )

    names = split_names(scorer or ())
    scorers = make_scorers(names, parse_options(option or ()))
    if output is not None:
        check_output(output)
    with counting() as progress:
        scored = score_folder(images, scorers, self_test=self_test, batch_size=batch_size, progress=progress)
    summaries = scored.summaries()
    table(f"Scores of {images}", *tag_table(summaries))
    for note in scored.notes():
        say(note, style="yellow")
    failures = scored.failures()
    for name, file, reason in failures[:_SHOWN_FAILURES]:
        say(f"not scored by {name}: {reason}" if str(file) in reason else f"{file} not scored by {name}: {reason}")
    if len(failures) > _SHOWN_FAILURES:
        say(f"… and {len(failures) - _SHOWN_FAILURES} more failures")
    if output is not None:
        write_json_lines(output, image_rows(scored))
    if as_json:
        write(folder_json(scored))
    else:
        for name, summary in summaries.items():
            for key, value in result_items(name, summary):
                result(key, value)
        if output is not None:
            result("output", output)
    if scored.without_result():
        say(f"No picture could be scored by {', '.join(scored.without_result())}.")
        raise typer.Exit(1)
