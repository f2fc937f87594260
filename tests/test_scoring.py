"""Scoring a folder: right numbers per prompt kind, failures visible, rows that can be read back, no torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ramctl.errors import DataError, RamctlError, ScorerError, UsageError
from ramctl.images import read_image_folder, save_png, write_image_folder
from ramctl.prompts import Prompt
from ramctl.scorers.base import ImageScore, Scorer, Scores, SelfTest
from ramctl.scoring import (
    check_output,
    folder_json,
    image_rows,
    make_scorers,
    parse_options,
    result_items,
    score_folder,
    split_names,
    summarise,
    tag_table,
    write_json_lines,
)
from ramctl.tinyworld.grammar import all_scenes, scene_prompt
from ramctl.tinyworld.renderer import render_scene


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Six pictures: two colours prompts drawn right, two position prompts drawn right, two counting drawn wrong."""
    rng = np.random.default_rng(3)
    scenes = all_scenes()
    asked = [scenes[kind][i] for kind in ("colors", "position", "counting") for i in (0, 5)]
    shown = [*asked[:4], scenes["single_object"][2], scenes["single_object"][3]]
    write_image_folder(
        tmp_path / "drawn", [render_scene(scene, rng) for scene in shown], [scene_prompt(scene) for scene in asked]
    )
    return tmp_path / "drawn"


def geneval() -> list[Scorer]:
    return make_scorers(["geneval"])


def test_the_means_are_those_of_the_drawn_pictures(drawn: Path) -> None:
    scored = score_folder(drawn, geneval())
    summary = scored.summaries()["geneval"]
    assert summary.strict == pytest.approx(4 / 6) and summary.failed == 0 and summary.images == 6
    assert {tag: part.strict for tag, part in summary.by_tag.items()} == {"colors": 1, "position": 1, "counting": 0}
    assert summary.details["official"] == pytest.approx(4 / 6)
    keys = dict(result_items("geneval", summary))
    assert keys["geneval/tag_strict/counting"] == 0 and keys["geneval/tag/colors"] == 1
    assert keys["geneval/mean"] == summary.mean and keys["geneval/images"] == 6
    columns, rows = tag_table(scored.summaries())
    assert [len(row) for row in rows] == [len(columns)] * 4
    assert rows[-1][:4] == ["geneval", "all", 6, 0]


def test_genevals_own_layout_gives_the_same(drawn: Path, tmp_path: Path) -> None:
    for number, row in enumerate(read_image_folder(drawn)):
        folder = tmp_path / "theirs" / f"{number:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(row.prompt.to_json()))
        (folder / "samples" / "0000.png").write_bytes(row.path.read_bytes())
    flat, nested = (score_folder(folder, geneval()) for folder in (drawn, tmp_path / "theirs"))
    np.testing.assert_array_equal(flat.scores["geneval"].value, nested.scores["geneval"].value)
    assert flat.summaries() == nested.summaries()


def test_a_truncated_picture_is_named_and_the_rest_scored(drawn: Path) -> None:
    file = drawn / "00001.png"
    file.write_bytes(file.read_bytes()[:100])
    scored = score_folder(drawn, make_scorers(["geneval", "jpeg-compressibility"]))
    summary = scored.summaries()["geneval"]
    assert summary.failed == 1 and summary.by_tag["colors"].failed == 1
    assert summary.strict == pytest.approx(3 / 5)  # the failed one is left out, not counted as wrong
    assert [(name, path) for name, path, _ in scored.failures()] == [
        ("geneval", file),
        ("jpeg-compressibility", file),
    ]
    assert all(str(file) in reason for _, _, reason in scored.failures())
    assert scored.without_result() == []
    row = image_rows(scored)[1]
    assert row["scores"]["geneval"]["value"] is None and str(file) in row["scores"]["geneval"]["error"]


def test_nothing_but_broken_pictures_is_known(drawn: Path) -> None:
    for file in drawn.glob("*.png"):
        file.write_bytes(b"no picture")
    scored = score_folder(drawn, make_scorers(["jpeg-compressibility"]))
    assert scored.without_result() == ["jpeg-compressibility"]
    summary = scored.summaries()["jpeg-compressibility"]
    assert math.isnan(summary.mean) and summary.failed == 6
    assert json.loads(folder_json(scored))["scorers"]["jpeg-compressibility"]["mean"] is None


def test_the_rows_can_be_read_back(drawn: Path, tmp_path: Path) -> None:
    scored = score_folder(drawn, make_scorers(["geneval", "jpeg-compressibility"]))
    out = tmp_path / "deep" / "scores.jsonl"
    write_json_lines(out, image_rows(scored))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["file"] for row in rows] == [str(row.path) for row in scored.rows]
    assert [row["scores"]["geneval"]["strict"] for row in rows] == [1, 1, 1, 1, 0, 0]
    assert rows[0]["tag"] == "colors" and rows[0]["prompt"].startswith("a photo of")
    assert rows[0]["scores"]["geneval"]["record"]["detections"][0]["class_name"]
    assert rows[0]["scores"]["jpeg-compressibility"]["strict"] is None
    for row, value in zip(rows, scored.scores["jpeg-compressibility"].value, strict=True):
        assert row["scores"]["jpeg-compressibility"]["value"] == pytest.approx(float(value), rel=1e-6)
    assert [path.name for path in out.parent.iterdir()] == ["scores.jsonl"]


def test_an_unwritable_place_is_said(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RamctlError, match="cannot be written"):
        write_json_lines(tmp_path / "file" / "scores.jsonl", [])
    for path in (tmp_path / "file" / "scores.jsonl", tmp_path):
        with pytest.raises(RamctlError, match="cannot be written"):
            check_output(path)
    check_output(tmp_path / "new" / "scores.jsonl")
    assert list((tmp_path / "new").iterdir()) == []


class _Liar(Scorer):
    """Gives a wrong answer on its own test; its records hold NumPy values."""

    name = "liar"
    version = "1"

    def self_test(self) -> SelfTest:
        return SelfTest(passed=False, summary="1 of 2 right")

    def score_image(self, image: Any, prompt: Prompt) -> ImageScore:
        return ImageScore(1.0, record={"n": np.float32(0.5), "box": np.arange(2)})


def test_a_scorer_that_fails_its_self_test_scores_nothing(drawn: Path) -> None:
    with pytest.raises(ScorerError, match=r"'liar' fails its self-test: 1 of 2 right"):
        score_folder(drawn, [_Liar()])
    assert score_folder(drawn, [_Liar()], self_test=False).summaries()["liar"].mean == 1


def test_numpy_in_a_record_is_written(drawn: Path, tmp_path: Path) -> None:
    write_json_lines(tmp_path / "o.jsonl", image_rows(score_folder(drawn, [_Liar()], self_test=False)))
    first = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])
    assert first["scores"]["liar"]["record"] == {"n": 0.5, "box": [0, 1]}


def test_prompts_without_what_the_scorer_needs_are_refused_before_the_self_test(tmp_path: Path) -> None:
    save_png(np.zeros((8, 8, 3), dtype=np.uint8), tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "a star"}\n')
    with pytest.raises(DataError, match=r"a star.*'tag'.*geneval"):
        score_folder(tmp_path, [_Liar(), *geneval()])


def test_a_broken_line_names_file_and_line(tmp_path: Path) -> None:
    save_png(np.zeros((8, 8, 3), dtype=np.uint8), tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "a star"}\n{"file_name": \n')
    with pytest.raises(DataError, match=r"metadata.jsonl, line 2: not valid JSON"):
        score_folder(tmp_path, make_scorers(["jpeg-compressibility"]))


def test_names_are_split_and_checked() -> None:
    assert split_names(["geneval,ocr", "jpeg-compressibility"]) == ["geneval", "ocr", "jpeg-compressibility"]
    for texts, said in (
        (["genevl"], "Did you mean 'geneval'"),
        (["ocr", "ocr"], "given twice"),
        ([], "The scorers are geneval"),
    ):
        with pytest.raises(UsageError, match=said):
            split_names(texts)


def test_options_reach_the_scorer() -> None:
    options = parse_options(["geneval.partial=flow_grpo", "geneval.detector=tinyworld"])
    assert options == {"geneval": {"partial": "flow_grpo", "detector": "tinyworld"}}
    assert "partial=flow_grpo" in make_scorers(["geneval"], options)[0].version
    for text in ("geneval.partial", "partial=x", ".x=1", "geneval.=1"):
        with pytest.raises(UsageError, match=r"SCORER.KEY=VALUE"):
            parse_options([text])
    with pytest.raises(UsageError, match="'ocr', which is not used"):
        make_scorers(["geneval"], {"ocr": {"threads": "1"}})
    with pytest.raises(UsageError, match="no option 'partail'"):
        make_scorers(["geneval"], {"geneval": {"partail": "x"}})


def test_a_kind_of_failures_only_has_no_mean() -> None:
    prompts = [Prompt("a", {"tag": "x"}), Prompt("b", {"tag": "y"}), Prompt("c", {"tag": "y"})]
    summary = summarise(Scores.collect(["broken", ImageScore(1.0, 1.0), ImageScore(3.0, 0.0)]), prompts)
    assert math.isnan(summary.by_tag["x"].mean) and summary.by_tag["x"].failed == 1
    assert (summary.mean, summary.std, summary.strict, summary.by_tag["y"].mean) == (2, 1, 0.5, 2)


def test_scoring_loads_no_torch(drawn: Path) -> None:
    code = (
        "import sys\n"
        "from ramctl.cli.app import main\n"
        "try:\n"
        f"    main(['score', {str(drawn)!r}, '-s', 'geneval', '-s', 'jpeg-compressibility'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "import ramctl.scorers.ocr\n"
        "print([name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
