"""The held-out protocol: training's own pictures and numbers, kept pictures, paired comparison, everything recorded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ramctl.config import RewardTerm
from ramctl.engine.evaluation import evaluate as engine_evaluate
from ramctl.engine.metrics import paired_interval
from ramctl.errors import ConfigError, DataError, MissingDependencyError, ScorerError, UsageError
from ramctl.evaluating import Request, evaluate, make_plan
from ramctl.evaluation_results import Evaluated, combine, compare, comparison_table, result_lines, results_table
from ramctl.images import ImageRow, load_image, read_image_folder
from ramctl.prompts import Prompt, read_prompts, spread_by_tag, write_prompts
from ramctl.scorers.base import ImageScore, Scores
from ramctl.scorers.composite import Reward, Term
from ramctl.scorers.geneval import GenEvalScorer
from ramctl.scorers.registry import create
from ramctl.scoring import ScoredImages, score_folder, summarise
from ramctl.settings import Settings, load_settings
from ramctl.sources import Source, open_source
from ramctl.weights import find_entry


@pytest.fixture
def run_folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the run, since evaluations go into it."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_checkpoint.parent, copy, symlinks=True)
    return copy


@pytest.fixture
def request_(run_folder: Path) -> Request:
    return Request(str(run_folder / "best"), rewards=("geneval",), precision="float32", device="cpu")


def scores_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return content


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def test_pictures_and_scores_are_those_of_the_evaluation_in_training(
    request_: Request, tiny_settings: Settings, tiny_prompts: list[Prompt]
) -> None:
    report = evaluate(replace(request_, settings={"images_per_prompt": 2, "sampling_steps": 3}))
    model = open_source(request_.source, device="cpu", precision="float32")
    section = tiny_settings.config.evaluation.model_copy(update={"images_per_prompt": 2, "sampling_steps": 3})
    reward = Reward([Term(create("geneval"))])
    expected = engine_evaluate(model.backbone, model.network(), tiny_prompts, reward, section)
    pictures = [load_image(row.path) for row in read_image_folder(report.evaluated.folder / "images")]
    np.testing.assert_array_equal(np.stack(pictures), expected.images)
    np.testing.assert_array_equal(report.evaluated.total.value, expected.value)
    assert expected.strict is not None and report.evaluated.total.strict is not None
    np.testing.assert_array_equal(report.evaluated.total.strict, expected.strict)


def test_everything_that_the_numbers_depend_on_is_recorded(
    request_: Request, run_folder: Path, tiny_preset: Path
) -> None:
    report = evaluate(request_)
    folder = run_folder / "evaluations" / "step-000001"
    assert report.evaluated.folder == folder
    content = scores_of(folder)
    protocol, prompts = content["protocol"], tiny_preset.with_name("test.jsonl")
    expected = {
        "weights": "evaluation",
        "sampling_steps": 2,
        "guidance_scale": 1.5,
        "negative_prompt": "",
        "seed": 1234,
        "images_per_prompt": 1,
        "prompts": 6,
        "resolution": 64,
        "precision": "float32",
        "device": "cpu",
        "sampler": "euler",
        "dtype": "float32",
        "prompt_file": str(prompts),
        "prompt_file_sha256": hashlib.sha256(prompts.read_bytes()).hexdigest(),
    }
    assert {key: protocol[key] for key in expected} == expected
    weights = run_folder / "step-000001" / "pytorch_lora_weights.safetensors"
    assert protocol["sha256"][weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "base/transformer/diffusion_pytorch_model.safetensors" in protocol["sha256"]
    assert content["scorers"]["geneval"]["version"] == create("geneval").version
    assert {"ramctl", "torch", "diffusers"} <= content["versions"].keys()
    results = content["results"]
    assert results["strict"] == report.evaluated.summary.strict
    assert results["scorers"]["geneval"]["details"].keys() >= {"official"}
    assert len(results["by_tag"]) == 6
    low, mean, high = (results["intervals"]["value"][key] for key in ("low", "mean", "high"))
    assert low <= mean <= high and mean == pytest.approx(results["mean"], abs=1e-6)
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [f"images/{i:05d}.png" for i in range(6)]
    again = score_folder(folder / "images", [create("geneval")])
    np.testing.assert_array_equal(again.scores["geneval"].value, report.evaluated.total.value)


def test_pictures_of_the_same_protocol_are_kept(request_: Request) -> None:
    first = evaluate(request_)
    folder = first.evaluated.folder
    before = files(folder)
    (folder / "images" / "00002.png").unlink()
    (folder / "scores.json").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in (folder / "images").glob("*.png")}
    second = evaluate(request_)
    assert (first.evaluated.kept, second.evaluated.kept) == (0, 5)
    assert second.evaluated.folder == folder and files(folder) == before
    assert all((folder / "images" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert second.evaluated.summary == first.evaluated.summary


def test_kept_pictures_are_not_scored_again(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    from ramctl.scorers.geneval.scorer import GenEvalScorer

    asked: list[int] = []
    original = GenEvalScorer.score_batch

    def counted(self: GenEvalScorer, images: Any, prompts: Any) -> Any:
        asked.append(len(images))
        return original(self, images, prompts)

    monkeypatch.setattr(GenEvalScorer, "score_batch", counted)
    wanted = replace(request_, self_test=False)
    first = evaluate(wanted)
    assert asked == [6] and first.evaluated.kept_scores == 0
    second = evaluate(wanted)
    assert asked == [6] and second.evaluated.kept_scores == 6
    pairs = zip(first.evaluated.scored.scores.values(), second.evaluated.scored.scores.values(), strict=True)
    for before, after in pairs:
        np.testing.assert_allclose(after.value, before.value, rtol=1e-7)
        np.testing.assert_array_equal(after.strict, before.strict)
        assert [json.loads(json.dumps(r)) for r in before.records] == list(after.records)
        assert before.details.keys() == after.details.keys()
    picture = first.evaluated.folder / "images" / "00002.png"
    shutil.copy(first.evaluated.folder / "images" / "00000.png", picture)
    third = evaluate(wanted)
    assert third.evaluated.changed == ["00002.png"] and "00002.png" in third.evaluated.notes()[0]
    assert asked == [6] and third.evaluated.kept_scores == 6  # drawn again, it is the picture that was scored
    evaluate(replace(wanted, options={"geneval": {"partial": "flow_grpo"}}))
    assert asked == [6, 6]


def test_scores_of_another_prompt_file_are_not_kept(
    request_: Request, tmp_path: Path, tiny_prompts: list[Prompt]
) -> None:
    """The same texts draw the same pictures; what a scorer reads beside them may differ."""
    write_prompts(tmp_path / "one.jsonl", tiny_prompts)
    write_prompts(tmp_path / "two.jsonl", [Prompt(p.text, {**p.metadata, "note": "x"}) for p in tiny_prompts])
    wanted = [
        replace(request_, prompts=tmp_path / name, output=tmp_path / "out") for name in ("one.jsonl", "two.jsonl")
    ]
    assert [evaluate(each).evaluated.kept_scores for each in (*wanted, wanted[1])] == [0, 0, 6]


def test_failed_scores_are_tried_again(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    from ramctl.scorers.jpeg import JpegCompressibility

    original = JpegCompressibility.score_image
    broken = iter([True])

    def first_fails(self: JpegCompressibility, image: Any, prompt: Prompt) -> ImageScore:
        if next(broken, False):
            raise OSError("out of luck")
        return original(self, image, prompt)

    monkeypatch.setattr(JpegCompressibility, "score_image", first_fails)
    wanted = replace(request_, rewards=("jpeg-compressibility",), self_test=False)
    assert evaluate(wanted).evaluated.summary.failed == 1
    again = evaluate(wanted).evaluated
    assert (again.summary.failed, again.kept_scores) == (0, 5)
    expected = score_folder(again.folder / "images", [create("jpeg-compressibility")])
    np.testing.assert_allclose(again.total.value, expected.scores["jpeg-compressibility"].value, rtol=1e-7)
    assert len(set(again.total.value)) > 1


def test_other_settings_go_into_another_folder(request_: Request, run_folder: Path) -> None:
    first = evaluate(request_)
    before = files(first.evaluated.folder), scores_of(first.evaluated.folder)
    other = evaluate(replace(request_, settings={"seed": 1}))
    assert other.evaluated.folder == run_folder / "evaluations" / "step-000001-2"
    assert (files(first.evaluated.folder), scores_of(first.evaluated.folder)) == before
    again = evaluate(replace(request_, settings={"seed": 1}))
    assert again.evaluated.folder == other.evaluated.folder and again.evaluated.kept == 6


def test_other_scorers_reuse_the_pictures_and_keep_the_earlier_results(request_: Request) -> None:
    first = evaluate(request_)
    folder = first.evaluated.folder
    before = scores_of(folder)
    second = evaluate(replace(request_, rewards=("jpeg-compressibility",)))
    assert second.evaluated.folder == folder and second.evaluated.kept == 6
    assert json.loads((folder / "scores-2.json").read_text()) == before
    assert (folder / "scores-2.jsonl").is_file()
    assert list(scores_of(folder)["scorers"]) == ["jpeg-compressibility"]


def test_an_output_folder_with_other_content_is_refused(request_: Request, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(replace(request_, output=out))
    with pytest.raises(DataError, match=r"seed: 1234 → 9"):
        evaluate(replace(request_, output=out, settings={"seed": 9}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no evaluation"):
        evaluate(replace(request_, output=tmp_path / "mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_comparing_with_the_base_is_paired_on_the_same_noise(request_: Request, run_folder: Path) -> None:
    wanted = replace(request_, compare="base", rewards=("jpeg-compressibility",), settings={"images_per_prompt": 2})
    report = evaluate(wanted)
    assert report.compared is not None
    other = report.compared.other
    assert other.folder == run_folder / "evaluations" / "base"
    baseline = evaluate(
        Request(
            "models/tinyworld",
            is_model=True,
            prompts=make_plan(wanted, open_source(wanted.source, device="cpu").config).file,
            rewards=("jpeg-compressibility",),
            settings={"images_per_prompt": 2, "sampling_steps": 2, "guidance_scale": 1.5},
            limit=0,
            output=run_folder / "baseline",
            precision="float32",
            device="cpu",
        )
    )
    np.testing.assert_array_equal(other.total.value, baseline.evaluated.total.value)
    mine, theirs = (values.reshape(6, 2).mean(1) for values in (report.evaluated.total.value, other.total.value))
    expected = paired_interval(theirs, mine)
    assert report.compared.differences["value"] == pytest.approx(expected, rel=1e-5)
    assert expected[0] != 0
    content = scores_of(report.evaluated.folder)
    assert content["comparison"]["differences"]["value"]["mean"] == pytest.approx(expected[0], rel=1e-5)
    assert content["comparison"]["other"] == "base"
    keys = dict(result_lines(report.evaluated, report.compared))
    assert keys["compare/value_difference"] == pytest.approx(expected[0], rel=1e-5)
    assert keys["value"] - keys["compare/value"] == pytest.approx(expected[0], rel=1e-4)  # type: ignore[operator]
    assert keys["compare/value_difference_low"] <= keys["compare/value_difference_high"]  # type: ignore[operator]
    columns, rows = comparison_table(report.evaluated, report.compared)
    assert {len(row) for row in rows} == {len(columns)}


def test_a_checkpoint_against_itself_differs_by_nothing(request_: Request) -> None:
    report = evaluate(replace(request_, compare=request_.source))
    assert report.compared is not None
    assert report.compared.differences["value"] == (0, 0, 0)
    assert report.compared.differences["strict"] == (0, 0, 0)


def test_the_policys_own_weights_are_another_evaluation(request_: Request, run_folder: Path) -> None:
    report = evaluate(replace(request_, weights="policy"))
    assert report.evaluated.folder == run_folder / "evaluations" / "step-000001-policy"
    assert scores_of(report.evaluated.folder)["protocol"]["weights"] == "policy"


def test_drawbench_metrics_score_prompts_of_the_users(request_: Request, tmp_path: Path) -> None:
    write_prompts(tmp_path / "drawbench.jsonl", [Prompt("a red cube"), Prompt("two dogs"), Prompt("a red cube")])
    wanted = replace(request_, drawbench_metrics=("jpeg-incompressibility",))
    report = evaluate(replace(wanted, drawbench_prompts=tmp_path / "drawbench.jsonl", compare="base"))
    assert report.drawbench is not None and report.drawbench_compared is not None
    assert report.drawbench.folder == report.evaluated.folder / "drawbench"
    assert [row.prompt.text for row in report.drawbench.scored.rows] == ["a red cube", "two dogs"]
    assert list(scores_of(report.drawbench.folder)["scorers"]) == ["jpeg-incompressibility"]
    assert report.drawbench_compared.other.folder.parent.name == "base"


def test_drawbenchs_own_prompts_come_from_the_store(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path))
    metrics = ("jpeg-incompressibility", "jpeg-compressibility")
    wanted = replace(request_, drawbench_metrics=metrics, rewards=metrics[:1])
    with pytest.raises(MissingDependencyError, match=r"ramctl download-weights drawbench; .*--drawbench-prompts"):
        evaluate(wanted)
    entry = find_entry("drawbench")
    (tmp_path / "drawbench").mkdir()
    (tmp_path / "drawbench" / entry.files[0].path).write_text(
        "Prompts,Category\na red cube,Colors\ntwo dogs,Counting\n"
    )
    report = evaluate(wanted)
    assert report.drawbench is not None
    assert [row.prompt.tag for row in report.drawbench.scored.rows] == ["Colors", "Counting"]
    # A sum of metrics of different kinds is no result.
    assert "value" not in dict(result_lines(report.drawbench, None))
    assert "mean" not in scores_of(report.drawbench.folder)["results"]
    assert "jpeg-compressibility/mean_low" in dict(result_lines(report.drawbench, None))


def test_the_limit_spreads_over_the_kinds(tiny_settings: Settings, tiny_prompts: list[Prompt], tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    write_prompts(file, [*tiny_prompts[:1] * 3, *tiny_prompts])
    plan = make_plan(Request("x", prompts=file, limit=4), tiny_settings.config)
    assert list(plan.prompts) == spread_by_tag(read_prompts(file), 4)
    assert len({prompt.tag for prompt in plan.prompts}) == 4
    assert len(make_plan(Request("x", prompts=file, limit=0), tiny_settings.config).prompts) == 9
    with pytest.raises(UsageError, match="limit"):
        make_plan(Request("x", prompts=file, limit=-1), tiny_settings.config)


def test_all_held_out_prompts_are_taken_whatever_the_checks_in_training_take(tiny_settings: Settings) -> None:
    section = tiny_settings.config.evaluation.model_copy(update={"prompts": 2})
    plan = make_plan(Request("x"), tiny_settings.config.model_copy(update={"evaluation": section}))
    assert (len(plan.prompts), plan.limit) == (6, 0)


@pytest.mark.parametrize("preset", ["geneval-tiny", "geneval-tiny-gpu"])
def test_the_embedded_presets_held_out_prompts_are_240(preset: str) -> None:
    plan = make_plan(Request("x"), load_settings(preset).config)
    assert len(plan.prompts) == 240
    assert plan.notes() == []


def test_too_few_pictures_for_genevals_protocol_are_worth_a_word() -> None:
    config = load_settings("geneval").config
    expected = {None: "-n 4 (now 1)", 3: "-n 4 (now 3)", 4: None, 8: None}
    for count, said in expected.items():
        settings = {} if count is None else {"images_per_prompt": count}
        notes = make_plan(Request("x", settings=settings), config).notes()
        assert [note.partition("prompt: ")[2] for note in notes] == ([] if said is None else [said])
    embedded = Request("x", options={"geneval": {"detector": "tinyworld"}})
    assert make_plan(embedded, config).notes() == []
    assert make_plan(Request("x"), load_settings("ocr").config).notes() == []


def test_an_output_no_scorer_reports_is_refused_before_anything_is_drawn(
    request_: Request, run_folder: Path, tiny_preset: Path, tmp_path: Path
) -> None:
    text = tiny_preset.read_text() + '\n[reward.scorers.geneval]\noutput = "offical"\n'
    (tmp_path / "other.toml").write_text(text)
    wanted = replace(request_, preset=str(tmp_path / "other.toml"), rewards=("geneval",), self_test=False)
    with pytest.raises(ConfigError, match=r"output is 'offical'.*Did you mean 'official'"):
        evaluate(wanted)
    assert not (run_folder / "evaluations").exists()


def test_scorers_keep_the_options_of_training(tiny_settings: Settings) -> None:
    term = RewardTerm(weight=2.0, scale=4.0, options={"partial": "clamped"})
    reward = tiny_settings.config.reward.model_copy(update={"scorers": {"geneval": term}})
    config = tiny_settings.config.model_copy(update={"reward": reward})
    plan = make_plan(Request("x", rewards=("geneval",), options={"geneval": {"detector": "tinyworld"}}), config)
    assert plan.terms["geneval"].options == {"partial": "clamped", "detector": "tinyworld"}
    assert plan.terms["geneval"].weight == 2.0
    with pytest.raises(UsageError, match="'ocr', which is not used"):
        make_plan(Request("x", options={"ocr": {"threads": "1"}}), config)


def test_what_is_missing_is_asked_for(tiny_preset: Path) -> None:
    with pytest.raises(UsageError, match="--preset NAME, or --prompts FILE"):
        make_plan(Request("some/model"), None)
    with pytest.raises(UsageError, match="--rewards NAME"):
        make_plan(Request("some/model", prompts=tiny_preset.with_name("test.jsonl")), None)


def test_prompts_a_scorer_cannot_use_stop_before_anything_is_drawn(request_: Request, run_folder: Path) -> None:
    with pytest.raises(DataError, match="names no text to read"):
        evaluate(replace(request_, rewards=("geneval", "ocr")))
    assert not (run_folder / "evaluations").exists()


def test_a_checkpoint_given_as_a_model_and_a_base_compared_with_itself_are_refused(request_: Request) -> None:
    with pytest.raises(UsageError, match="without --model"):
        evaluate(replace(request_, is_model=True))
    with pytest.raises(UsageError, match="base model itself"):
        evaluate(Request("models/tinyworld", compare="base", preset="geneval-tiny"))


def test_pictures_nobody_can_score_end_with_their_reason(
    request_: Request, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ramctl.scorers.jpeg import JpegCompressibility

    def broken(*_: object) -> ImageScore:
        raise OSError("the encoder is gone")

    monkeypatch.setattr(JpegCompressibility, "score_image", broken)
    with pytest.raises(ScorerError, match=r"jpeg-compressibility.*the encoder is gone"):
        evaluate(replace(request_, rewards=("jpeg-compressibility",), self_test=False))
    assert len(read_image_folder(run_folder / "evaluations" / "step-000001" / "images")) == 6


def _evaluated(values: list[float], strict: list[float] | None, per_prompt: int) -> Evaluated:
    results: list[ImageScore | str] = [
        "failed" if np.isnan(value) else ImageScore(value, None if strict is None else strict[i])
        for i, value in enumerate(values)
    ]
    scores = Scores.collect(results)
    rows = [ImageRow(Path(f"{i}.png"), Prompt("x")) for i in range(len(values))]
    summary = summarise(scores, [row.prompt for row in rows])
    scored = ScoredImages(rows, {"a": scores}, {"a": "1"})
    return Evaluated("x", Path("x"), scored, scores, summary, {"a": summary}, per_prompt, 0)


def test_intervals_are_over_prompts_and_leave_failures_out() -> None:
    nan = float("nan")
    evaluated = _evaluated([1, 3, 5, nan, nan, nan], None, 2)
    np.testing.assert_array_equal(evaluated.per_prompt(evaluated.total.value), [2, 5, nan])
    mean, low, high = evaluated.intervals()["value"]
    assert (mean, low, high) == (3.5, 2, 5)
    other = _evaluated([0, 2, nan, nan, 1, 1], None, 2)
    assert compare(evaluated, other).differences == {"value": (1, 1, 1)}  # one complete pair


def test_a_scorer_without_yes_or_no_has_no_strict_difference() -> None:
    with_strict, without = _evaluated([1, 0], [1, 0], 1), _evaluated([1, 0], None, 1)
    assert set(compare(with_strict, with_strict).differences) == {"value", "strict"}
    assert set(compare(without, with_strict).differences) == {"value"}
    assert set(compare(with_strict, without).differences) == {"value"}


def test_one_value_for_all_pictures_is_worth_a_word() -> None:
    assert _evaluated([0.5] * 7, None, 1).notes() == []
    assert "a gave all 8 pictures the same value, 0.5" in _evaluated([0.5] * 8, None, 1).notes()[0]
    assert _evaluated([0.5] * 8 + [0.6], None, 1).notes() == []


def _of_kinds(strict: dict[str, list[float]], per_prompt: int = 1) -> Evaluated:
    prompts = [Prompt(str(i), {"tag": tag}) for tag, values in strict.items() for i in range(len(values))]
    results: list[ImageScore | str] = [
        "failed" if np.isnan(v) else ImageScore(v / 2, v, {"official": v}) for values in strict.values() for v in values
    ]
    scores = Scores.collect(results)
    summary = summarise(scores, prompts)
    rows = [ImageRow(Path(f"{i}.png"), prompt) for i, prompt in enumerate(prompts)]
    return Evaluated(
        "x", Path("x"), ScoredImages(rows, {"a": scores}, {"a": "1"}), scores, summary, {"a": summary}, per_prompt, 0
    )


def test_the_official_number_is_the_mean_of_the_kinds() -> None:
    evaluated = _of_kinds({"two": [1, 1, 1, 0], "one": [0, 0], "three": [1, float("nan")]})
    said = dict(result_lines(evaluated, None))
    assert said["official"] == pytest.approx(4 / 7)
    assert said["official_macro"] == said["strict_macro"] == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert said["a/official_macro"] == said["official_macro"]
    assert said["a/tag_official/two"] == 0.75
    assert said["official_macro_low"] < said["official_macro"] < said["official_macro_high"]  # type: ignore[operator]
    columns, rows = results_table(evaluated)
    assert {len(row) for row in rows} == {len(columns)}
    assert [row[1] for row in rows] == ["two", "one", "three", "all", "macro"]
    assert "official_macro" not in dict(result_lines(_of_kinds({"one": [1, 0]}), None))


def test_macro_differences_are_paired() -> None:
    before, after = _of_kinds({"two": [0, 0, 1, 0], "one": [0, 1]}), _of_kinds({"two": [1, 0, 1, 0], "one": [1, 1]})
    found = compare(after, before).differences["strict_macro"]
    assert found[0] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert compare(after, after).differences["strict_macro"] == (0, 0, 0)
    said = dict(result_lines(after, compare(after, before)))
    assert said["compare/strict_macro_difference"] == pytest.approx(found[0])


def test_the_weighted_value_is_that_of_the_reward(tiny_prompts: list[Prompt]) -> None:
    terms = {
        "geneval": RewardTerm(weight=2.0, scale=4.0, output="extra_objects", offset=0.5),
        "jpeg-compressibility": RewardTerm(weight=0.5),
    }
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    scorers = {name: create(name) for name in terms}
    reward = Reward([Term(scorers[n], t.weight, t.scale, t.output, t.offset) for n, t in terms.items()])
    expected = reward.score(images, tiny_prompts)
    total = combine({name: scorer.score(images, tiny_prompts) for name, scorer in scorers.items()}, terms)
    np.testing.assert_array_equal(total.value, expected.value)
    assert total.strict is not None and expected.strict is not None
    np.testing.assert_array_equal(total.strict, expected.strict)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(request_: Request, tmp_path: Path) -> None:
    wanted = replace(request_, settings={"images_per_prompt": 2}, output=tmp_path / "one", compare="base")
    one = evaluate(wanted).evaluated
    words = ["evaluate", wanted.source, "base", "--rewards", "geneval", "-n", "2", "--num-processes", "2"]
    words += ["--precision", "float32", "--device", "cpu", "--output", str(tmp_path / "two")]
    command = [sys.executable, "-m", "ramctl", *words]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RESULT strict=") == 1
    two = scores_of(tmp_path / "two")
    assert two["processes"] == 2
    for name, content in files(tmp_path / "one").items():
        if name.endswith(".png"):  # other batches round differently in the last bits
            mine, theirs = load_image(one.folder / "images" / name), load_image(tmp_path / "two" / "images" / name)
            assert np.abs(mine.astype(int) - theirs.astype(int)).max() <= 1
        else:
            assert content == (tmp_path / "two" / "images" / name).read_bytes()
    assert two["results"]["mean"] == pytest.approx(one.summary.mean, abs=0.1)
    assert len((tmp_path / "two" / "scores.jsonl").read_text().splitlines()) == 12
    subprocess.run(["sha256sum", "--status", "-c", "pictures.sha256"], cwd=tmp_path / "two", check=True)
    again = evaluate(replace(wanted, output=tmp_path / "two")).evaluated
    assert (again.kept, again.changed, again.kept_scores) == (12, [], 12)


def test_prompts_without_metrics_for_them_are_not_passed_over(request_: Request, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--drawbench-metrics"):
        evaluate(replace(request_, drawbench_prompts=tmp_path / "drawbench.jsonl"))


def test_all_that_a_scorer_lacks_is_said_before_anything_is_drawn(
    request_: Request, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenEvalScorer, "missing", lambda self: ["its environment is not there: make it"])
    with pytest.raises(MissingDependencyError, match="its environment is not there"):
        evaluate(request_)
    assert not (run_folder / "evaluations").exists()


@pytest.mark.parametrize(("prompts", "told", "compiles"), [(1, None, False), (200, None, True), (200, False, False)])
def test_the_networks_are_compiled_where_many_pictures_are_drawn_unless_told(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: int, told: bool | None, compiles: bool
) -> None:
    """The config and the device have their say in ``open_source``; here, whether it is worth the while."""
    asked: list[bool] = []

    def noted(*arguments: object, compile: bool, **others: object) -> None:
        asked.append(compile)
        raise KeyboardInterrupt

    monkeypatch.setattr("ramctl.evaluating.open_source", noted)
    file = tmp_path / "many.jsonl"
    write_prompts(file, [Prompt("a photo of a cat", {})] * prompts)
    with pytest.raises(KeyboardInterrupt):
        evaluate(replace(request_, prompts=file, rewards=["jpeg-compressibility"], compile=told))
    assert asked == [compiles]


def test_a_cpu_draws_with_networks_that_are_not_compiled(tiny_preset: Path) -> None:
    config = load_settings(str(tiny_preset), overrides=[("runtime.compile", "true")]).config
    opened = open_source(Source(config.model, None, config), device="cpu", compile=True)
    assert not opened.compiled
    assert all(block._compiled_call_impl is None for block in opened.network().transformer_blocks)  # type: ignore[union-attr]
