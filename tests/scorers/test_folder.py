"""Scoring pictures on disk: the order of the rows is kept and a damaged file fails alone, by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ramctl.errors import DataError
from ramctl.images import load_image, read_image_folder, write_image_folder
from ramctl.prompts import Prompt
from ramctl.scorers.folder import score_rows
from ramctl.scorers.jpeg import JpegCompressibility
from ramctl.scorers.ocr import OcrScorer
from ramctl.tinyworld.grammar import sign_prompt
from ramctl.tinyworld.renderer import render_sign


def test_mixed_sizes_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8 * (1 + i % 3), 16, 3), dtype=np.uint8) for i in range(10)]
    rows = write_image_folder(tmp_path, images, [Prompt(f"picture {i}") for i in range(10)])
    seen: list[int] = []
    scores = score_rows(JpegCompressibility(), rows, batch_size=2, on_progress=seen.append)
    single = [JpegCompressibility().score(load_image(row.path)[None], [row.prompt]).value[0] for row in rows]
    np.testing.assert_array_equal(scores.value, single)
    np.testing.assert_array_equal(scores.details["kilobytes"], -scores.value)
    assert scores.strict is None and sum(seen) == 10 and max(seen) <= 2


def test_a_truncated_picture_fails_alone_and_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    words = ["lamp", "tree", "moon"]
    write_image_folder(tmp_path, [render_sign(word, rng) for word in words], [sign_prompt(word) for word in words])
    broken = tmp_path / "00001.png"
    broken.write_bytes(broken.read_bytes()[:300])
    scores = score_rows(OcrScorer(detector_side=192, threads=1), read_image_folder(tmp_path))
    assert scores.failed.tolist() == [False, True, False]
    assert scores.errors[1] is not None and str(broken) in scores.errors[1]
    np.testing.assert_array_equal(scores.value, [1, np.nan, 1])
    assert scores.strict is not None
    np.testing.assert_array_equal(scores.strict, [1, np.nan, 1])
    assert [record.get("target") for record in scores.records] == ["lamp", None, "moon"]


def test_a_prompt_the_scorer_cannot_use_stops_before_any_picture_is_read(tmp_path: Path) -> None:
    rows = write_image_folder(tmp_path, [np.zeros((8, 8, 3), dtype=np.uint8)], [Prompt("no quotes")])
    rows[0].path.unlink()
    with pytest.raises(DataError, match="no quotes"):
        score_rows(OcrScorer(), rows)


def test_no_rows_give_no_scores() -> None:
    assert len(score_rows(JpegCompressibility(), [])) == 0
