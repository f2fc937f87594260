"""Scoring pictures that lie on disk: batches of one size each, one unreadable file never stops the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ramctl.images import ImageRow, UnreadableImage, batches_by_size
from ramctl.scorers.base import ImageScore, Scorer, Scores


def score_rows(
    scorer: Scorer,
    rows: Sequence[ImageRow],
    batch_size: int = 64,
    on_progress: Callable[[int], None] | None = None,
) -> Scores:
    """Scores of N pictures in the rows' order; one that cannot be read is failed, its reason names the file.

    Args:
        scorer: what scores them; its ``check_prompts`` is asked first.
        rows: N pictures with their prompts, as :func:`ramctl.images.read_image_folder` gives them.
        batch_size: most pictures handed over at once.
        on_progress: called after each batch with the number of pictures it held.

    Raises:
        DataError: a prompt the scorer cannot use.
    """
    scorer.check_prompts([row.prompt for row in rows])
    results: list[ImageScore | str] = [""] * len(rows)
    for batch in batches_by_size(rows, batch_size):
        if isinstance(batch, UnreadableImage):
            results[batch.index] = batch.reason
            done = 1
        else:
            scores = scorer.score(batch.images, batch.prompts)
            for place, index in enumerate(batch.indices):
                results[index] = _one(scores, place)
            done = len(batch.indices)
        if on_progress is not None:
            on_progress(done)
    return Scores.collect(results)


def _one(scores: Scores, place: int) -> ImageScore | str:
    """The result of one picture of a batch, as the scorer gave it."""
    reason = scores.errors[place]
    if reason is not None:
        return reason
    strict = math.nan if scores.strict is None else float(scores.strict[place])
    details = {name: float(column[place]) for name, column in scores.details.items()}
    return ImageScore(
        value=float(scores.value[place]),
        strict=None if math.isnan(strict) else strict,
        details={name: number for name, number in details.items() if not math.isnan(number)},
        record=scores.records[place],
    )
