"""The page of an evaluation: all in one file, worst and best pictures of each kind, what changed, all escaped."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ramctl.errors import DataError
from ramctl.evaluation_page import describe_record, write_page
from ramctl.evaluation_results import Evaluated, compare
from ramctl.images import ImageRow, save_png
from ramctl.prompts import Prompt
from ramctl.scorers.base import ImageScore, Scores
from ramctl.scoring import ScoredImages, summarise

NAN = float("nan")


class Page(HTMLParser):
    """Tags that open and close, addresses, and the text between."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "a":
            self.links.append(str(dict(attrs)["href"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.extend(data.split())

    @property
    def text(self) -> str:
        return " ".join(self.words)


def evaluated(
    folder: Path,
    values: Sequence[float],
    *,
    tags: Sequence[str] = (),
    label: str = "mine",
    side: int = 16,
    per_prompt: int = 1,
    strict: bool = True,
    prompt: str = "prompt",
) -> Evaluated:
    """An evaluation folder with real pictures, a gray each, and a scorer that said these values."""
    tags = tags or ["all"] * len(values)
    prompts = [Prompt(f"{prompt} {i // per_prompt}", {"tag": tag}) for i, tag in enumerate(tags)]
    rows = [ImageRow(folder / "images" / f"{i:05d}.png", each) for i, each in enumerate(prompts)]
    for i, row in enumerate(rows):
        save_png(np.full((side, side, 3), i, dtype=np.uint8), row.path)
    results: list[ImageScore | str] = [
        "it broke"
        if np.isnan(v)
        else ImageScore(v, float(v > 0.5) if strict else None, record={"text": f"read {i}", "nothing": None})
        for i, v in enumerate(values)
    ]
    scores = Scores.collect(results)
    summary = summarise(scores, prompts)
    scored = ScoredImages(rows, {"reader": scores}, {"reader": "reader 1"})
    protocol = {
        "prompts": len(values) // per_prompt,
        "images_per_prompt": per_prompt,
        "prompt_file": "prompts/test.jsonl",
        "resolution": side,
        "sampling_steps": 40,
        "sampler": "euler",
        "guidance_scale": 4.5,
        "negative_prompt": "ugly & <b>blurry</b>",
        "seed": 1234,
        "weights": "evaluation",
        "precision": "float32",
        "sha256": {"a.safetensors": "f" * 64},
        "use_t5": False,
    }
    content = {
        "created": "2026-01-02T03:04:05+00:00",
        "protocol": protocol,
        "scorers": {"reader": {"version": "reader 1", "weight": 2.0, "scale": 1.0, "options": {"device": "cpu"}}},
        "versions": {"ramctl": "9.9"},
    }
    (folder / "scores.json").write_text(json.dumps(content))
    return Evaluated(label, folder, scored, scores, summary, {"reader": summary}, per_prompt, 0)


def page_of(*parts: Evaluated) -> Page:
    mine, *others = parts
    write_page(mine.folder / "evaluation.html", mine, compare(mine, others[0]) if others else None)
    return Page((mine.folder / "evaluation.html").read_text(encoding="utf-8"))


def test_the_page_stands_alone_and_links_to_the_files(tmp_path: Path) -> None:
    page = page_of(evaluated(tmp_path, [0.1, 0.9, 0.4]))
    assert page.images and all(str(image["src"]).startswith("data:image/png;base64,") for image in page.images)
    assert page.links and all((tmp_path / link).is_file() for link in page.links)
    text = (tmp_path / "evaluation.html").read_text()
    assert not re.search(r"(?:https?:)?//[a-z]", text)
    assert "prefers-color-scheme: dark" in text


def test_the_protocol_is_told_in_full(tmp_path: Path) -> None:
    page = page_of(evaluated(tmp_path, [0.1, 0.9]))
    for said in (
        "3 4" not in page.text and "40 euler steps, guidance 4.5",
        "2 of test.jsonl",
        "2026-01-02 03:04 UTC",
        "ugly & <b>blurry</b>",
        "sha256 a.safetensors",
        "f" * 64,
        "use t5 false" in page.text.replace("_", " ") and "reader 1",
        "device=cpu, weight 2",
        "ramctl 9.9",
    ):
        assert said and said in page.text


def test_prompts_and_labels_are_escaped(tmp_path: Path) -> None:
    page = page_of(evaluated(tmp_path, [0.1, 0.9], prompt="<script>alert(1)</script> &", label='"><i>x'))
    assert "<script>alert(1)</script> &" in page.text and '"><i>x' in page.text


def shown(page: Page) -> list[str]:
    return [Path(link).stem for link in page.links]


def test_each_kind_shows_its_worst_and_best(tmp_path: Path) -> None:
    values = [*np.linspace(0, 1, 10), *np.linspace(1, 0, 10)]
    page = page_of(evaluated(tmp_path, values, tags=["two_objects"] * 10 + ["text"] * 10))
    assert shown(page) == [
        *("00000", "00001", "00002", "00009", "00008", "00007"),
        *("00019", "00018", "00017", "00010", "00011", "00012"),
    ]
    assert "Two objects" in page.text and "text: read 0" in page.text
    assert page.text.index("Worst") < page.text.index("Best")


def test_pictures_of_one_prompt_do_not_crowd_out_the_others(tmp_path: Path) -> None:
    many = [prompt / 10 + picture / 100 for prompt in range(6) for picture in range(2)]
    page = page_of(evaluated(tmp_path / "many", many, per_prompt=2))
    assert shown(page) == ["00000", "00002", "00004", "00011", "00009", "00007"]
    # With few prompts that would show bad pictures among the best.
    page = page_of(evaluated(tmp_path / "few", many[:8], per_prompt=2))
    assert shown(page) == ["00000", "00001", "00002", "00007", "00006", "00005"]


def test_a_perfect_picture_is_never_among_the_worst(tmp_path: Path) -> None:
    page = page_of(evaluated(tmp_path, [1, 1, 0.2, 1, 1, 1, 1, 1]))
    assert shown(page)[0] == "00002" and len(page.links) == 4
    alike = page_of(evaluated(tmp_path / "b", [1, 1, 1, 1]))
    assert "Worst" not in alike.text and "all pictures scored 1" in alike.text and len(alike.links) == 3


def test_failures_are_listed_and_never_shown_as_the_worst(tmp_path: Path) -> None:
    page = page_of(evaluated(tmp_path, [NAN, 0.3, *[0.9] * 4, *[NAN] * 11]))
    assert "Failed" in page.text and "00000.png, reader: it broke" in page.text
    assert "2 more are in scores.jsonl" in page.text
    assert shown(page)[0] == "00001"
    assert "Failed" not in page_of(evaluated(tmp_path / "b", [0.1, 0.2])).text


def test_a_comparison_shows_the_pairs_that_changed_most(tmp_path: Path) -> None:
    mine = evaluated(tmp_path / "mine", [0.9, 0.5, 0.1, 0.5, 0.6])
    other = evaluated(tmp_path / "other", [0.1, 0.5, 0.9, 0.4, 0.6], label="base")
    page = page_of(mine, other)
    gained, lost = page.text.index("Gained most"), page.text.index("Lost most")
    assert gained < lost < page.text.index("Worst")
    pairs = [link for link in page.links if link.startswith("..")]
    assert pairs == [f"../other/images/{name}.png" for name in ("00000", "00003", "00002")]
    assert page.links[:2] == ["../other/images/00000.png", "images/00000.png"]
    assert "mine against base" in page.text
    assert "mean value 0.500 → 0.520" in page.text
    unchanged = page_of(mine, mine)
    assert "Gained most" not in unchanged.text and "Largest changes" not in unchanged.text


def test_the_table_has_a_change_per_kind(tmp_path: Path) -> None:
    tags = ["a", "a", "a", "b", "b", "b"]
    mine = evaluated(tmp_path / "mine", [0.9, 0.9, 0.9, 0.9, 0.1, 0.2], tags=tags)
    other = evaluated(tmp_path / "other", [0.1, 0.1, 0.1, 0.9, 0.1, 0.2], tags=tags, label="base")
    page = page_of(mine, other)
    assert "change of strictly correct" in page.text
    assert "A 3 0.900 0.900 to 0.900 1.00 1.00 to 1.00 +1.00 +1.00 to +1.00" in page.text
    assert "B 3" in page.text and "Mean of the kinds" in page.text


def test_values_outside_zero_and_one_get_no_bars(tmp_path: Path) -> None:
    def bars(values: list[float], name: str) -> int:
        page_of(evaluated(tmp_path / name, values, strict=False))
        return (tmp_path / name / "evaluation.html").read_text().count('class="track"')

    assert bars([0.1, 0.9], "share") == 1
    assert bars([-2.0, 7.0], "score") == 0


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    page = page_of(evaluated(tmp_path, [0.1, 0.9], side=600))
    for image in page.images:
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/jpeg;base64"
        assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).size == (320, 320)


def test_a_picture_that_is_gone_is_named(tmp_path: Path) -> None:
    mine = evaluated(tmp_path, [0.1, 0.9])
    (tmp_path / "images" / "00001.png").unlink()
    with pytest.raises(DataError, match=r"00001.png"):
        write_page(tmp_path / "evaluation.html", mine, None)
    assert not (tmp_path / "evaluation.html").exists()


def test_records_become_a_few_short_lines() -> None:
    detections = [
        {"class_name": "circle", "color": "red", "score": 0.8, "box": [0, 0, 1, 1]},
        {"class_name": "star", "color": None, "score": 0.9, "box": [0, 0, 1, 1]},
        {"class_name": "circle", "color": "red", "score": 0.7, "box": [0, 0, 1, 1]},
    ]
    lines = describe_record({"detections": detections, "reasons": ["expected 3"], "similarity": 0.12345, "empty": []})
    assert lines == ["found star, red circle ×2", "expected 3", "similarity: 0.123"]
    assert describe_record({"text": "x" * 500})[0] == "text: " + "x" * 133 + "…"
    assert len(describe_record({f"k{i}": i for i in range(9)})) == 4
    assert describe_record({}) == []
