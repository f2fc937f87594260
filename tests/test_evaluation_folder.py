"""The folder of an evaluation: what of an earlier call in it still holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ramctl.errors import DataError
from ramctl.evaluation_folder import KeptScores, choose_folder, set_aside
from ramctl.scorers.base import ImageScore

KNOWN = {"scorer": "reader", "version": "1", "options": {"threads": 2}, "file": "images/0.png", "sha256": "a" * 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as an evaluation leaves it: a scored picture, a failed one, one with a detail that is no number."""

    def row(i: int, digit: str, **score: Any) -> str:
        whole = {
            "value": 0.5,
            "strict": 1.0,
            "details": {"length": 3.0},
            "record": {"text": "x"},
            "error": None,
            **score,
        }
        return json.dumps({"file": f"images/{i}.png", "sha256": digit * 64, "scores": {"reader": whole}})

    lines = [
        row(0, "a"),
        row(1, "b", value=None, error="it broke"),
        row(2, "c", strict=None, details={"length": None}),
    ]
    (tmp_path / "scores.jsonl").write_text("\n".join(lines) + "\n")
    scorers = {"reader": {"version": "1", "options": {"threads": 2}, "weight": 1.0, "scale": 1.0}}
    content = {"protocol": {"prompt_file_sha256": "p"}, "scorers": scorers}
    (tmp_path / "scores.json").write_text(json.dumps(content))
    return tmp_path


def test_a_score_is_found_for_the_same_picture_and_scorer(folder: Path) -> None:
    kept = KeptScores(folder, "p")
    assert kept.find(**KNOWN) == ImageScore(0.5, 1.0, {"length": 3.0}, {"text": "x"})
    third = kept.find(**{**KNOWN, "file": "images/2.png", "sha256": "c" * 64})
    assert third is not None and third.strict is None and math.isnan(third.details["length"])


@pytest.mark.parametrize(
    "other",
    [
        {"scorer": "writer"},
        {"version": "2"},
        {"options": {"threads": 3}},
        {"options": {}},
        {"sha256": "c" * 64},
        {"file": "images/2.png"},
        {"file": "images/1.png", "sha256": "b" * 64},
    ],
)
def test_nothing_is_found_for_another_one(folder: Path, other: dict[str, Any]) -> None:
    assert KeptScores(folder, "p").find(**{**KNOWN, **other}) is None


def test_nothing_is_found_where_nothing_can_be_trusted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert KeptScores(folder, "q").find(**KNOWN) is None
    assert KeptScores(tmp_path_factory.mktemp("empty"), "p").find(**KNOWN) is None
    lines = (folder / "scores.jsonl").read_text()
    for damaged in (lines[:40], "[]\n", '{"file": "images/0.png"}\n'):
        (folder / "scores.jsonl").write_text(damaged)
        assert KeptScores(folder, "p").find(**KNOWN) is None
    (folder / "scores.jsonl").write_text(lines)
    (folder / "scores.json").write_text("{}")
    assert KeptScores(folder, "p").find(**KNOWN) is None


def test_results_of_other_scorers_are_kept_under_a_number(folder: Path) -> None:
    same = json.loads((folder / "scores.json").read_text())["scorers"]
    set_aside(folder, same)
    assert not (folder / "scores-2.json").exists()
    for count in (2, 3):
        (folder / "scores.json").write_text(json.dumps({"scorers": {"reader": count}}))
        set_aside(folder, same)
        assert json.loads((folder / f"scores-{count}.json").read_text()) == {"scorers": {"reader": count}}
    assert (folder / "scores-2.jsonl").is_file() and not (folder / "scores.jsonl").exists()


def test_a_folder_is_used_by_one_protocol(tmp_path: Path) -> None:
    default = tmp_path / "step-000001"
    assert choose_folder(None, default, {"seed": 1}) == default
    default.mkdir()
    (default / "protocol.json").write_text('{"seed": 1}')
    assert choose_folder(None, default, {"seed": 1}) == default
    assert choose_folder(None, default, {"seed": 2}) == tmp_path / "step-000001-2"
    with pytest.raises(DataError, match="seed: 1 → 2"):
        choose_folder(default, default, {"seed": 2})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        choose_folder(tmp_path / "file", default, {})


def test_a_line_separator_in_a_text_does_not_cost_the_scores(folder: Path) -> None:
    lines = folder / "scores.jsonl"
    first, rest = lines.read_text().split("\n", 1)
    odd = {**json.loads(first), "prompt": "one\u2028two\u0085three"}
    lines.write_text(json.dumps(odd, ensure_ascii=False) + "\n" + rest, encoding="utf-8")
    assert KeptScores(folder, "p").find(**KNOWN) is not None
