from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ramctl.errors import DataError, OutOfMemoryError, UsageError
from ramctl.prompts import Prompt, read_prompts
from ramctl.scorers.geneval import Detection, Detector, GenEvalScorer, KnownPicture
from ramctl.tinyworld.grammar import KINDS, all_scenes, corrupt, scene_prompt
from ramctl.tinyworld.renderer import render_scene

BLANK = np.zeros((64, 64, 3), dtype=np.uint8)
CIRCLE = Prompt("a photo of a circle", {"tag": "single_object", "include": [{"class": "circle", "count": 1}]})


class ScriptedDetector:
    """Reports, for a picture filled with the grey n, n circles; breaks on white."""

    name, version = "scripted", "0"
    class_names, colors = ("circle",), ("red",)
    answer = True

    def load(self):
        pass

    def detect(self, images):
        if (images == 255).any():
            raise ValueError("white picture")
        return [[Detection("circle", 0.95, (0.0, 0.0, 8.0, 8.0), "red")] * int(image[0, 0, 0]) for image in images]

    def examples(self):
        return [
            KnownPicture(BLANK + 1, CIRCLE, strict=self.answer),
            KnownPicture(BLANK, CIRCLE, strict=False),
        ]


def grey(*levels):
    return np.stack([np.full((8, 8, 3), level, dtype=np.uint8) for level in levels])


@pytest.fixture(scope="module")
def scorer():
    return GenEvalScorer()


def test_pictures_drawn_for_their_prompt_are_right(scorer):
    rng = np.random.default_rng(0)
    scenes = [rows[int(rng.integers(len(rows)))] for _ in range(10) for rows in all_scenes().values()]
    prompts = [scene_prompt(scene) for scene in scenes]
    scorer.check_prompts(prompts)
    scores = scorer.score(np.stack([render_scene(scene, rng) for scene in scenes]), prompts)
    assert not scores.failed.any()
    assert scores.strict.mean() == scores.value.mean() == scores.details["official"].mean() == 1
    wanted = [sum(clause["count"] for clause in scene["include"]) for scene in scenes]
    assert scores.details["objects"].tolist() == wanted
    assert not scores.details["extra_objects"].any()
    assert all(record["reasons"] == [] for record in scores.records)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_with_one_thing_wrong_are_wrong(scorer, kind):
    rng = np.random.default_rng(1)
    rows = all_scenes()[kind]
    scenes = [rows[int(rng.integers(len(rows)))] for _ in range(12)]
    pictures = np.stack([render_scene(corrupt(scene, rng), rng) for scene in scenes])
    scores = scorer.score(pictures, [scene_prompt(scene) for scene in scenes])
    assert not scores.strict.any()
    assert (scores.value < 1).all()
    assert all(record["reasons"] for record in scores.records)


def test_extra_objects_are_forgiven_by_official_and_shown():
    scores = GenEvalScorer(detector=ScriptedDetector()).score(grey(0, 1, 5), [CIRCLE] * 3)
    assert scores.details["official"].tolist() == [0, 1, 1]
    assert scores.strict.tolist() == [0, 1, 0]
    assert scores.details["extra_objects"].tolist() == [0, 0, 4]
    assert scores.details["objects"].tolist() == [0, 1, 5]


def test_partial_modes_differ_in_value_and_version():
    clamped, peers = (GenEvalScorer(ScriptedDetector(), partial=mode) for mode in ("clamped", "flow_grpo"))
    assert clamped.score(grey(16), [CIRCLE]).value.tolist() == [0]
    assert peers.score(grey(16), [CIRCLE]).value.tolist() == [-14]
    assert clamped.version != peers.version
    assert (clamped.value_range, peers.value_range) == ((0, 1), (-14, 1))
    for part in ("partial=clamped", "0.3/0.9", "scripted-0", "rules="):
        assert part in clamped.version


def test_one_broken_picture_fails_alone():
    scores = GenEvalScorer(ScriptedDetector()).score(grey(1, 255, 0), [CIRCLE] * 3)
    assert scores.failed.tolist() == [False, True, False]
    assert scores.value[[0, 2]].tolist() == [1, 0]
    assert np.isnan(scores.value[1])
    assert scores.errors[1] == "ValueError: white picture"


def test_one_prompt_with_unusable_metadata_fails_alone(scorer):
    bad = Prompt("a dog", {"tag": "single_object", "include": [{"class": "dog", "count": 1}]})
    scores = scorer.score(np.stack([BLANK, BLANK]), [bad, CIRCLE])
    assert scores.failed.tolist() == [True, False]
    assert "'dog'" in scores.errors[0]


def test_scores_do_not_depend_on_the_batch(scorer):
    rng = np.random.default_rng(2)
    scenes = [all_scenes()["color_attr"][i] for i in range(0, 160, 20)]
    pictures = np.stack([render_scene(scene, rng) for scene in scenes])
    prompts = [scene_prompt(scene) for scene in scenes]
    together = scorer.score(pictures, prompts)
    alone = [scorer.score(pictures[i : i + 1], prompts[i : i + 1]) for i in range(len(scenes))]
    assert together.value.tolist() == [s.value[0] for s in alone]
    assert list(together.records) == [s.records[0] for s in alone]


def test_records_are_json(scorer):
    picture = render_scene(CIRCLE.metadata, np.random.default_rng(3))
    record = scorer.score(picture[None], [CIRCLE]).records[0]
    assert json.loads(json.dumps(record)) == record
    assert record["detections"][0]["class_name"] == "circle"


def test_empty_batch(scorer):
    assert len(scorer.score(np.zeros((0, 64, 64, 3), np.uint8), [])) == 0


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tag": "single_object"}, "'include'"),
        ({"tag": "single_object", "include": [{"class": "circel", "count": 1}]}, "Did you mean 'circle'"),
        ({"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "brown"}]}, "'brown'"),
        ({"tag": "counting", "include": [{"class": "circle", "count": 0}]}, "at least 1"),
        ({"tag": "counting", "include": [{"class": "circle", "count": 17}]}, "include[0]"),
        ({"tag": "colors", "include": [{"class": "circle", "count": 1, "colour": "red"}]}, "Did you mean 'color'"),
    ],
)
def test_check_prompts_names_the_prompt(scorer, metadata, message):
    with pytest.raises(DataError) as error:
        scorer.check_prompts([CIRCLE, Prompt("the second", metadata)])
    assert "Prompt 2 ('the second')" in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("detector", "name", "count"),
    [
        ("mask2former", "geneval/test.jsonl", 553),
        ("mask2former", "geneval/train.jsonl.gz", 50_000),
        ("tinyworld", "geneval-tiny/test.jsonl", 240),
        ("tinyworld", "geneval-tiny/train.jsonl", 1452),
    ],
)
def test_every_shipped_prompt_is_accepted(detector, name, count):
    prompts = read_prompts(Path(__file__).parents[3] / "prompts" / name)
    assert len(prompts) == count
    GenEvalScorer(detector).check_prompts(prompts)


@pytest.mark.parametrize("options", [{"detector": "tinywold"}, {"partial": "clampd"}])
def test_unknown_options_list_the_known_ones(options):
    with pytest.raises(UsageError) as error:
        GenEvalScorer(**options)
    assert ("tinyworld" if "detector" in options else "clamped, flow_grpo") in str(error.value)


def test_self_test_passes_and_notices_a_wrong_detector(scorer):
    good = scorer.self_test()
    assert good.passed
    assert "12 of 12" in good.summary
    scripted = ScriptedDetector()
    assert GenEvalScorer(scripted).self_test().passed
    scripted.answer = False
    bad = GenEvalScorer(scripted).self_test()
    assert not bad.passed
    assert "a photo of a circle" in bad.summary


def test_self_test_fails_for_a_detector_that_sees_nothing():
    class Blind(ScriptedDetector):
        def detect(self, images):
            return [[] for _ in images]

    assert not GenEvalScorer(Blind()).self_test().passed


def test_detectors_satisfy_the_protocol(scorer):
    assert isinstance(scorer.detector, Detector)
    assert isinstance(ScriptedDetector(), Detector)


def test_importing_the_scorer_loads_nothing_heavy():
    names = "('torch', 'cv2', 'scipy', 'PIL')"
    code = f"import sys, ramctl.scorers.geneval; print([m for m in {names} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_gpu_without_room_is_nobodys_picture(monkeypatch):
    """Every picture would fail alike, one slow attempt each: the run is told instead."""

    def full(images):
        raise OutOfMemoryError("The GPU's memory does not hold it: batch_size")

    scorer = GenEvalScorer(ScriptedDetector())
    monkeypatch.setattr(scorer.detector, "detect", full)
    with pytest.raises(OutOfMemoryError, match="batch_size"):
        scorer.score(grey(1, 2), [CIRCLE] * 2)
