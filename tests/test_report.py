from __future__ import annotations

import base64
import io
import math
import re
import time
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ramctl.charts import Panel, Series, number, points_of, smooth, spans_decades, svg
from ramctl.errors import DataError, RunFolderError
from ramctl.report import (
    MAX_PROMPTS,
    Comparison,
    ConfigRow,
    Grid,
    Report,
    data_uri,
    duration,
    render_report,
    write_report,
)

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects what the tests ask for, and fails on unbalanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        if tag == "img":
            self.images.append(named)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def rows(steps: int) -> list[dict[str, float]]:
    return [
        {
            "step": step,
            "reward/mean": 0.5 + 0.2 * step / steps,
            "reward/strict": 0.3,
            "reward_by_tag/position": 0.4,
            "reward_by_tag/color_attr": 0.3,
            "advantage/flat_groups": 0.1,
            "loss": 1.0 / step,
            "grad_norm": 1.0,
            "drift": 1e-4 * step,
            "seconds/sample": 0.2,
            "seconds/train": 0.3,
            "images_per_second": 100.0,
            "images/edges": 0.2 - 0.1 * step / steps,
            "images/saturation": 0.3,
            "images/entropy": 4.0,
            "score/extra_objects": 0.2 + step / steps,
        }
        for step in range(1, steps + 1)
    ]


def grid(label: str, step: int, prompts: list[str], shade: int = 40) -> Grid:
    return Grid(label, step, prompts, np.full((len(prompts), 8, 8, 3), shade, dtype=np.uint8))


@pytest.fixture
def full() -> Report:
    prompts = ["a photo of a red circle", "a photo of two stars"]
    return Report(
        title="first run",
        preset="geneval-tiny",
        status="finished",
        step=50,
        total_steps=50,
        started=datetime(2026, 1, 2, 3, 4),
        seconds=414.0,
        best_step=40,
        metrics=rows(50),
        evaluations=[
            {"step": 0, "eval/value": 0.5, "eval/strict": 0.331},
            {"step": 50, "eval/strict": 0.487},
        ],
        comparisons=[Comparison("Held-out, strict", 0.331, 0.487, 0.11, 0.2, 384)],
        grids=[grid("before", 0, prompts), grid("after", 50, prompts, 200)],
        config=[ConfigRow("optimizer.lr", 3e-4, "--lr"), ConfigRow("lora.rank", None, "default")],
        versions={"torch": "2.13.0"},
        commands={"Resume": "ramctl train geneval-tiny"},
        notes=["3 pictures could not be scored."],
    )


def test_the_page_tells_the_run(full: Report) -> None:
    words = Page(render_report(full)).words
    for part in [
        "first run finished",
        "Preset geneval-tiny",
        "Step 50 of 50",
        "Best checkpoint step 40",
        "Started 2026-01-02 03:04",
        "Training time 6 min 54 s",
        "Speed 100 images/s",
        "Held-out, strict 0.331 → 0.487 +0.156 · 95 % interval +0.110 to +0.200 · 384 prompts",
        "3 pictures could not be scored.",
        "Reward by prompt kind",
        "Extra objects",
        "a photo of two stars",
        "optimizer lr 0.0003 --lr",
        "lora rank none default",
        "torch 2.13.0",
        "ramctl train geneval-tiny",
    ]:
        assert part in words, part


def test_sections_come_in_reading_order(full: Report) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", render_report(full))
    assert headings == [
        "Reward",
        "Training",
        "What the reward does not see",
        "Pictures",
        "Commands",
        "Configuration",
        "Versions",
    ]


def test_the_page_loads_nothing_from_outside(full: Report) -> None:
    text = render_report(full)
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "url(http" not in text
    assert "@import" not in text
    assert "https://" not in text
    assert "http://" not in text


def test_charts_follow_the_colours_of_the_page(full: Report) -> None:
    text = render_report(full)
    assert not re.search(r"#[ab]0000\d", text)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert used <= defined
    assert "prefers-color-scheme: dark" in text
    assert text.count("<style") == 1


def test_every_picture_and_chart_has_words(full: Report) -> None:
    text = render_report(full)
    page = Page(text)
    assert [image["alt"] for image in page.images] == [
        "before (step 0): a photo of a red circle",
        "after (step 50): a photo of a red circle",
        "before (step 0): a photo of two stars",
        "after (step 50): a photo of two stars",
    ]
    charts = text.count('<svg class="chart"')
    assert charts > 8
    assert text.count('role="img" aria-label="') == charts
    assert "Drift by training step: drift from" in text


def test_small_pictures_are_inlined_exactly_and_shown_as_pixels(full: Report) -> None:
    page = Page(render_report(full))
    assert all(image["class"] == "pixels" for image in page.images)
    source = str(page.images[1]["src"])
    assert source.startswith("data:image/png;base64,")
    decoded = np.array(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    assert (decoded == 200).all()
    assert decoded.shape == (8, 8, 3)


def test_large_pictures_are_scaled_down() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    uri = data_uri(np.array(Image.fromarray(coarse).resize((1024, 1024))))
    assert uri.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (512, 512)


def test_text_of_users_is_never_markup(full: Report) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y> $x_{1$"
    text = render_report(
        replace(
            full,
            title=evil,
            preset=evil,
            reason=evil,
            grids=[grid(evil, 0, [evil])],
            metrics=[{"step": 1, f"reward_by_tag/{evil}": 1.0, "reward_by_tag/b": 0.1, f"score/{evil}": 1.0}],
            config=[ConfigRow(f"a.{evil}", evil, evil)],
            versions={evil: evil},
            commands={evil: evil},
            notes=[evil],
            comparisons=[Comparison(evil, 0.0, 1.0)],
        )
    )
    page = Page(text)
    assert "script" not in page.tags
    assert [image for image in page.images if image.get("src") == "x"] == []
    assert page.words.count("alert(1)") >= 8


def test_an_empty_run_is_a_page() -> None:
    page = Page(render_report(Report(title="new", total_steps=10)))
    assert "new running" in page.words
    assert "Step 0 of 10" in page.words
    assert "No step has been trained yet." in page.words
    assert "svg" not in page.tags


@pytest.mark.parametrize("metrics", [[{"step": 1, "loss": 0.5}], [{"step": 1, "loss": math.nan}], [{"step": 1}]])
def test_missing_metrics_leave_their_panels_out(metrics: list[dict[str, float]]) -> None:
    text = render_report(Report(title="t", metrics=metrics))
    assert ("<h3>Loss</h3>" in text) == (metrics[0].get("loss") == 0.5)
    assert "<h3>Drift</h3>" not in text
    assert "What the reward does not see" not in text
    assert "nan" not in Page(text).words.split()


def test_without_comparisons_first_and_last_evaluation_are_compared() -> None:
    evaluations = [{"step": step, "eval/strict": 0.3 + step / 100} for step in (0, 10, 20)]
    words = Page(render_report(Report(title="t", evaluations=evaluations))).words
    assert "Held-out prompts, strictly correct 0.300 → 0.500 +0.200" in words
    assert "interval" not in words


def test_a_reward_that_is_no_share_has_its_own_axis() -> None:
    metrics = [{"step": step, "reward/mean": 21.0 + step, "reward/strict": 0.5} for step in (1, 2)]
    assert "<h3>Strictly correct pictures</h3>" in render_report(Report(title="t", metrics=metrics))
    assert "<h3>Strictly correct pictures</h3>" not in render_report(Report(title="t", metrics=rows(4)))


def test_a_notable_change_is_set_off(full: Report) -> None:
    text = render_report(full)
    assert re.search(r'class="notable">\(\+\d+ %\)', text)
    assert re.search(r'class="notable">\(−\d+ %\)', text)
    calm = [{"step": step, "images/saturation": 0.3} for step in range(1, 20)]
    assert 'class="notable"' not in render_report(Report(title="t", metrics=calm))


def test_an_early_stop_gives_its_reason(full: Report) -> None:
    stopped = replace(full, status="stopped", reason="The reward fell while the drift rose.")
    assert "first run stopped early The reward fell while the drift rose." in Page(render_report(stopped)).words


def test_prompts_missing_from_a_grid_and_too_many_prompts() -> None:
    many = [f"prompt {i}" for i in range(MAX_PROMPTS + 3)]
    page = Page(render_report(Report(title="t", grids=[grid("before", 0, many[1:]), grid("after", 9, many)])))
    assert len(page.images) == 2 * MAX_PROMPTS
    assert "3 more prompts are in the run folder's samples." in page.words


@pytest.mark.parametrize(
    "wrong",
    [
        Grid("before", 0, ["a"], np.zeros((2, 8, 8, 3), dtype=np.uint8)),
        Grid("before", 0, ["a"], np.zeros((1, 8, 8, 3), dtype=np.uint8), scores=[1.0, 2.0]),
        Grid("before", 0, ["a"], np.zeros((1, 8, 8, 3), dtype=np.float32)),  # type: ignore[arg-type]
    ],
)
def test_a_grid_that_does_not_fit_together_is_refused(wrong: Grid) -> None:
    with pytest.raises(DataError, match="Report grid 'before'"):
        render_report(Report(title="t", grids=[wrong]))


def test_writing_replaces_the_page_and_leaves_nothing_else(full: Report, tmp_path: Path) -> None:
    path = tmp_path / "run" / "report.html"
    write_report(path, Report(title="old"))
    write_report(path, full)
    assert path.read_text(encoding="utf-8") == render_report(full)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_write_that_fails_keeps_the_old_page(full: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(path, Report(title="old"))
    before = path.read_text(encoding="utf-8")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(RunFolderError, match="No space left on device"):
        write_report(path, full)
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_same_run_gives_the_same_page(full: Report) -> None:
    assert render_report(full) == render_report(full)


def test_five_hundred_steps_take_less_than_three_seconds(full: Report) -> None:
    report = replace(full, metrics=rows(500), total_steps=500)
    render_report(full)
    start = time.process_time()
    render_report(report)
    assert time.process_time() - start < 3.0


def test_points_are_finite_sorted_and_the_last_of_a_step() -> None:
    wanted = [
        {"step": 2, "a": 1.0},
        {"step": 1, "a": 5.0},
        {"step": 2, "a": 3.0},
        {"step": 3, "a": math.inf},
        {"b": 1.0},
    ]
    assert points_of(wanted, "a") == [(1.0, 5.0), (2.0, 3.0)]


def test_smoothing_keeps_steps_and_lines() -> None:
    line = [(float(step), 2.0 * step) for step in range(100)]
    smoothed = smooth(line)
    assert [step for step, _ in smoothed] == [step for step, _ in line]
    assert smoothed[50] == pytest.approx(line[50])


def test_a_logarithmic_axis_only_where_it_helps() -> None:
    assert spans_decades([(0, 0.001), (1, 1.0)])
    assert not spans_decades([(0, 0.5), (1, 1.0)])
    assert not spans_decades([(0, 0.0), (1, 1.0)])
    assert not spans_decades([])


def test_charts_of_one_point_and_of_equal_values() -> None:
    for points in ([(1.0, 0.5)], [(1.0, 0.0), (2.0, 0.0)]):
        assert svg(Panel("p", [Series("s", points)])).startswith('<svg class="chart"')


def test_numbers_and_durations_are_for_people() -> None:
    values = [0, 0.5, 0.05123, 0.00012, 1.0, 12.345, 123.4, 12345.6, -0.5]
    assert [number(value) for value in values] == [
        "0",
        "0.500",
        "0.0512",
        "1.20e-04",
        "1.00",
        "12.3",
        "123",
        "12,346",
        "-0.500",
    ]
    assert [duration(value) for value in (4.6, 414, 11_520)] == ["5 s", "6 min 54 s", "3 h 12 min"]
