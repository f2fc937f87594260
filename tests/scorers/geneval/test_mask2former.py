from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from ramctl.errors import DataError, MissingDependencyError, OutOfMemoryError, ScorerError, UsageError
from ramctl.prompts import Prompt
from ramctl.scorers.geneval import Detector, GenEvalScorer, mask2former, mmdet_checkpoint
from ramctl.scorers.geneval.coco import CLASS_NAMES
from ramctl.scorers.geneval.mask2former import (
    Mask2FormerDetector,
    Segment,
    full_size,
    input_size,
    network_input,
    segments,
    stop_sign,
    tight_box,
)
from ramctl.scorers.geneval.scorer import ColorNaming
from ramctl.scorers.registry import create

DOG = Prompt("a photo of a dog", {"tag": "single_object", "include": [{"class": "dog", "count": 1}]})


def noise(height, width, number=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


# --- classes


def test_the_classes_are_cocos_in_its_order_under_genevals_names():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 80
    places = {"person": 0, "stop sign": 11, "giraffe": 23, "cup": 41, "tv": 62, "toothbrush": 79}
    places |= {"computer mouse": 64, "tv remote": 65, "computer keyboard": 66, "cell phone": 67}
    assert {name: CLASS_NAMES.index(name) for name in places} == places


# --- input


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((64, 64), (800, 800)),
        ((300, 400), (800, 1067)),
        ((427, 640), (800, 1199)),
        ((640, 427), (1199, 800)),
        ((512, 1024), (667, 1333)),
        ((500, 1), (1333, 3)),
        ((1, 1), (800, 800)),
        ((1, 5000), (1, 1333)),
    ],
)
def test_sizes_of_the_networks_input(size, expected):
    assert input_size(*size) == expected


def test_pictures_are_resized_without_antialiasing_and_padded_with_128():
    images = noise(30, 40, 2)
    padded = network_input(images)
    assert padded.shape == (2, 800, 1088, 3) and padded.dtype == np.uint8
    assert (padded[:, :, 1067:] == 128).all()
    assert not (padded[:, :, 1060:1067] == 128).all()
    # Plain bilinear interpolation between pixel centres; OpenCV rounds its weights to 11 bits.
    y = np.clip((np.arange(800) + 0.5) * 30 / 800 - 0.5, 0, 29)
    x = np.clip((np.arange(1067) + 0.5) * 40 / 1067 - 0.5, 0, 39)
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    y1, x1 = np.minimum(y0 + 1, 29), np.minimum(x0 + 1, 39)
    fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
    for image, result in zip(images.astype(float), padded, strict=True):
        above = image[y0][:, x0] * (1 - fx) + image[y0][:, x1] * fx
        below = image[y1][:, x0] * (1 - fx) + image[y1][:, x1] * fx
        assert np.abs(above * (1 - fy) + below * fy - result[:800, :1067]).max() <= 1.0


def test_large_pictures_are_shrunk_by_skipping_pixels_as_opencv_does():
    stripes = np.zeros((1, 2000, 2000, 3), dtype=np.uint8)
    stripes[:, :, ::5] = 255  # samples lie at columns 0.75, 3.25, 5.75 …: antialiasing would give an even grey
    assert network_input(stripes)[0, 400, :4].tolist() == [[64] * 3, [0] * 3, [64] * 3, [0] * 3]


def test_swapped_channels_are_red_for_blue_and_leave_the_picture_alone():
    image = noise(20, 20)
    before = image.copy()
    np.testing.assert_array_equal(network_input(image, "swapped"), network_input(image[..., ::-1]))
    assert not np.array_equal(network_input(image, "swapped"), network_input(image))
    np.testing.assert_array_equal(image, before)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(DataError, match="no pixels"):
        network_input(np.zeros((1, 0, 8, 3), np.uint8))


# --- output


def reference(class_logits, mask_logits, padded, inner, original):
    """The published post-processing in plain loops: (class, score, box) of the hundred most probable pairs."""
    found = []
    probability = class_logits.softmax(-1)[:, :-1]
    for flat in probability.flatten().argsort(descending=True)[:100].tolist():
        query, label = divmod(flat, probability.shape[1])
        large = torch.nn.functional.interpolate(
            mask_logits[None, None, query], size=padded, mode="bilinear", align_corners=False
        )
        logits = torch.nn.functional.interpolate(
            large[..., : inner[0], : inner[1]], size=original, mode="bilinear", align_corners=False
        )[0, 0].double()
        pixels = [(x, y) for y in range(original[0]) for x in range(original[1]) if logits[y, x] > 0]
        mean = sum(1 / (1 + math.exp(-float(logits[y, x]))) for x, y in pixels) / (len(pixels) + 1e-6)
        xs, ys = [x for x, _ in pixels], [y for _, y in pixels]
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1) if pixels else (0, 0, 0, 0)
        found.append((CLASS_NAMES[label], float(probability[query, label]) * mean, box, len(pixels)))
    return found


def test_post_processing_is_the_published_one():
    generator = torch.Generator().manual_seed(0)
    class_logits = torch.randn(30, 81, generator=generator) * 6
    mask_logits = torch.randn(30, 20, 28, generator=generator) * 3
    original = (15, 20)
    inner = input_size(*original)
    assert inner == (800, 1067)
    expected = [r for r in reference(class_logits, mask_logits, (800, 1088), inner, original) if r[1] > 0.3]
    found = segments(class_logits, mask_logits, (800, 1088), original)
    assert len(found) == len(expected) > mask2former._MASKS_AT_ONCE
    for segment, (name, score, box, pixels) in zip(found, expected, strict=True):
        assert (segment.class_name, segment.box) == (name, box)
        assert segment.score == pytest.approx(score, abs=1e-6)
        assert segment.mask.shape == (box[3] - box[1], box[2] - box[0]) and segment.mask.sum() == pixels
        assert segment.color is None


def one_query(probabilities, mask):
    """Logits of one query with these class probabilities, and of its mask."""
    logits = torch.full((1, 81), -30.0)
    for label, probability in probabilities.items():
        logits[0, label] = math.log(probability)
    logits[0, 80] = math.log(max(1 - sum(probabilities.values()), 1e-9))
    return logits, torch.as_tensor(mask, dtype=torch.float32)[None]


def test_a_query_may_stand_for_two_classes():
    logits, mask = one_query({3: 0.5, 7: 0.4}, np.full((8, 8), 20.0))
    found = segments(logits, mask, (800, 800), (8, 8))
    assert [(s.class_name, round(s.score, 4)) for s in found] == [("motorcycle", 0.5), ("truck", 0.4)]


def test_scores_have_to_be_strictly_above_the_threshold():
    logits, mask = one_query({3: 0.5}, np.full((8, 8), 20.0))
    score = segments(logits, mask, (800, 800), (8, 8))[0].score
    assert not segments(logits, mask, (800, 800), (8, 8), threshold=score)
    assert segments(logits, mask, (800, 800), (8, 8), threshold=score - 1e-6)


def test_an_unsure_mask_lowers_the_score():
    logits, mask = one_query({3: 0.9}, np.full((8, 8), 0.1))
    assert segments(logits, mask, (800, 800), (8, 8))[0].score == pytest.approx(0.9 / (1 + math.exp(-0.1)), abs=1e-5)


def test_an_empty_mask_is_no_object():
    logits, mask = one_query({3: 0.99}, np.full((8, 8), -1.0))
    assert segments(logits, mask, (800, 800), (8, 8)) == []
    assert segments(logits, mask, (800, 800), (8, 8), threshold=-1.0)[0].box == (0, 0, 0, 0)


def test_boxes_are_tight_and_exclusive():
    mask = torch.zeros(10, 12, dtype=torch.bool)
    assert tight_box(mask) == (0, 0, 0, 0)
    mask[3, 4] = True
    assert tight_box(mask) == (4, 3, 5, 4)
    mask[9, 11] = True
    assert tight_box(mask) == (4, 3, 12, 10)


def test_masks_are_enlarged_in_two_steps():
    logits = torch.randn(1, 25, 34, generator=torch.Generator().manual_seed(0))
    result = full_size(logits, (800, 1088), (800, 1067), (300, 400))
    at_once = torch.nn.functional.interpolate(logits[None], size=(300, 400), mode="bilinear", align_corners=False)[0]
    assert result.shape == (1, 300, 400)
    assert float((result - at_once).abs().max()) > 0.05


@pytest.mark.parametrize("where", ["classes", "masks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_is_an_error_not_an_empty_picture(where, value):
    logits, mask = one_query({3: 0.5}, np.full((8, 8), 20.0))
    (logits if where == "classes" else mask)[0, 0] = value
    with pytest.raises(ScorerError, match="not finite"):
        segments(logits, mask, (800, 800), (8, 8))


# --- the detector with small weights


@pytest.fixture
def detector(tiny_store):
    return Mask2FormerDetector(device="cpu")


def table(detections):
    return [(d.class_name, d.box, pytest.approx(d.score, abs=1e-4)) for d in detections]


def test_it_finds_objects_with_masks_that_fit_their_boxes(detector):
    found = detector.detect(noise(40, 60, 2))
    assert [len(objects) > 3 for objects in found] == [True, True]
    for segment in found[0]:
        left, top, right, bottom = segment.box
        assert 0 <= left < right <= 60 and 0 <= top < bottom <= 40
        assert segment.mask.shape == (bottom - top, right - left) and segment.mask.any()
        assert segment.mask[0].any() and segment.mask[:, -1].any()
        assert 0.3 < segment.score < 1


def test_it_is_a_detector_that_names_colours(detector):
    assert isinstance(detector, Detector) and isinstance(detector, ColorNaming)
    assert len(detector.class_names) == 80 and len(detector.colors) == 10


def test_the_loaded_network_is_the_one_in_the_file(detector, make_network):
    """MMDetection's layout written, read and converted gives the outputs of the model it was written from."""
    detector.load()
    pixels = torch.from_numpy(network_input(noise(48, 64)))
    with torch.inference_mode():
        values = (pixels.permute(0, 3, 1, 2) - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)) / torch.tensor(
            [58.395, 57.12, 57.375]
        ).view(3, 1, 1)
        expected = make_network()(pixel_values=values)
        actual = detector._network.forward(pixels)
    torch.testing.assert_close(actual.class_queries_logits, expected.class_queries_logits, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(actual.masks_queries_logits, expected.masks_queries_logits, rtol=1e-4, atol=1e-3)


def test_batches_do_not_matter(tiny_store):
    images = noise(8, 48, 5)
    together = Mask2FormerDetector(device="cpu", batch_size=5).detect(images)
    in_pairs = Mask2FormerDetector(device="cpu", batch_size=2).detect(images)
    assert [table(found) for found in in_pairs] == [
        [(d.class_name, d.box, d.score) for d in found] for found in together
    ]


def test_swapped_is_what_the_peers_do(tiny_store):
    images = noise(32, 32)
    images[..., 0] //= 4
    straight, swapped = (Mask2FormerDetector(order, device="cpu") for order in ("rgb", "swapped"))
    exchanged = straight.detect(images[..., ::-1])[0]
    assert table(swapped.detect(images)[0]) == [(d.class_name, d.box, d.score) for d in exchanged]
    assert [d.score for d in straight.detect(images)[0]] != [d.score for d in exchanged]


def test_low_precision_runs_and_is_another_version(tiny_store):
    exact, rough = (Mask2FormerDetector(device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert exact.version != rough.version
    a, b = (d.detect(noise(32, 32))[0] for d in (exact, rough))
    assert a and b and [d.score for d in a] != [d.score for d in b]
    assert abs(a[0].score - b[0].score) < 0.1


def test_a_batch_too_large_for_the_memory_is_halved(detector, monkeypatch):
    detector.load()
    network, sizes = detector._network, []

    def small(images, order):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(images, order)

    monkeypatch.setattr(detector, "_network", small)
    images = noise(4, 32, 5)
    assert len(detector.detect(images)) == 5
    assert sizes == [5, 2, 2, 1]
    monkeypatch.setattr(detector, "_network", lambda images, order: small(np.repeat(images, 3, axis=0), order))
    with pytest.raises(OutOfMemoryError, match=r"'geneval' at 2 images.*dtype"):
        detector.detect(images)


def test_the_global_random_state_is_left_alone(detector):
    torch.manual_seed(5)
    detector.load()
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))


# --- options, versions, files


def test_the_version_names_weights_channels_precision_and_clip(tiny_store, tmp_path, make_network, as_mmdetection):
    detector = Mask2FormerDetector(device="cpu")
    for part in ("mmdet-2.28.2", "channels=rgb", "dtype=float32", "clip-vit-l14-"):
        assert part in detector.version
    same = tmp_path / "copy.pth"
    shutil.copy(tiny_store / mmdet_checkpoint.ENTRY / mmdet_checkpoint.FILE, same)
    assert Mask2FormerDetector(device="cpu", weights=str(same)).version == detector.version
    torch.save({"state_dict": as_mmdetection(make_network(seed=1).state_dict())}, same)
    assert Mask2FormerDetector(device="cpu", weights=str(same)).version != detector.version
    assert Mask2FormerDetector("swapped", device="cpu").version != detector.version


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_order": "bgr"}, "known: rgb, swapped"),
        ({"dtype": "int8"}, "known: float32, bfloat16, float16"),
        ({"batch_size": 0}, "1 or more"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        Mask2FormerDetector(**options)


def test_an_unknown_device_is_refused(tiny_store):
    with pytest.raises(UsageError, match="'tpu'"):
        Mask2FormerDetector(device="tpu").load()


def test_absent_weights_are_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path))
    for make in (Mask2FormerDetector, lambda: Mask2FormerDetector(weights=str(tmp_path / "mine.pth"))):
        for act in (lambda d: d.version, lambda d: d.load()):
            with pytest.raises(MissingDependencyError, match="ramctl download-weights mask2former-swin-s-coco"):
                act(make())


def test_other_weights_are_refused_before_a_network_is_built(tiny_store, tmp_path, monkeypatch):
    monkeypatch.delenv("RAMCTL_OTHER_WEIGHTS")
    monkeypatch.setattr(mask2former, "_Network", pytest.fail)
    for act in (lambda d: d.version, lambda d: d.load(), lambda d: d.detect(noise(8, 8))):
        with pytest.raises(MissingDependencyError, match=rf"{mmdet_checkpoint.FILE} .*one that starts with 743b7d99"):
            act(Mask2FormerDetector(device="cpu"))


def test_a_file_of_ones_own_is_not_held_against_the_official_one(tiny_store, tmp_path, monkeypatch):
    own = shutil.copy(tiny_store / mmdet_checkpoint.ENTRY / mmdet_checkpoint.FILE, tmp_path / "mine.pth")
    monkeypatch.delenv("RAMCTL_OTHER_WEIGHTS")
    detector = Mask2FormerDetector(device="cpu", weights=str(own))
    monkeypatch.setattr(detector, "_colors", None)
    with pytest.raises(AttributeError):  # it came to CLIP
        detector.load()


@pytest.mark.parametrize("package", ["cv2", "scipy", "transformers"])
def test_an_absent_package_is_named(package, tiny_store, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match="pip install") as caught:
        Mask2FormerDetector(device="cpu").load()
    assert {"cv2": "opencv-python-headless"}.get(package, package) in str(caught.value)


def test_the_official_architecture_refuses_the_small_weights(tiny_store, monkeypatch):
    monkeypatch.undo()
    file = tiny_store / mmdet_checkpoint.ENTRY / mmdet_checkpoint.FILE
    with pytest.raises(ScorerError, match="is not MMDetection's Mask2Former Swin-S"):
        mask2former._Network(file, torch.device("cpu"), "float32")


# --- as the scorer's detector


@pytest.fixture
def scorer(tiny_store):
    return create("geneval", {"detector": "mask2former", "device": "cpu", "partial": "flow_grpo"})


def prompt(tag, *include):
    return Prompt(tag, {"tag": tag, "include": [{"count": 1, **clause} for clause in include]})


def test_colours_are_named_where_the_prompt_is_about_them(scorer, monkeypatch):
    images = noise(40, 40, 2)
    scorer.ensure_loaded()
    best = scorer.detector.detect(images[:1])[0]
    name = max({d.class_name for d in best}, key=lambda n: sum(d.class_name == n for d in best))
    assert sum(d.class_name == name for d in best) > 2
    asked = []
    original = scorer.detector.name_colors
    monkeypatch.setattr(scorer.detector, "name_colors", lambda objects: asked.append(objects) or original(objects))
    colored = prompt("colors", {"class": name, "count": 2, "color": "red"}, {"class": "dog"})
    scores = scorer.score(images, [colored, prompt("two_object", {"class": name}, {"class": "dog"})])
    assert not scores.failed.any()
    rows = scores.records[0]["detections"]
    named = [row for row in rows if row["color"] is not None]
    assert {row["class_name"] for row in named} == {name} and len(named) == 2
    assert min(row["score"] for row in named) >= max(
        (row["score"] for row in rows if row["class_name"] == name and row["color"] is None), default=0
    )
    assert all(row["color"] is None for row in scores.records[1]["detections"])
    assert [len(objects) for objects in asked] == [2]
    assert all(image is not None and np.array_equal(image, images[0]) for image, _ in asked[0])
    assert json.loads(json.dumps(scores.records[0])) == scores.records[0]


def test_scores_do_not_depend_on_the_batch(scorer):
    images = noise(8, 48, 8)
    prompts = [prompt("colors", {"class": name, "color": "red"}) for name in ("bear", "fork") for _ in range(4)]
    together = scorer.score(images, prompts)
    alone = [scorer.score(images[i : i + 1], prompts[i : i + 1]) for i in range(8)]
    np.testing.assert_allclose(together.value, [s.value[0] for s in alone], atol=1e-5)
    assert [[d["color"] for d in r["detections"]] for r in together.records] == [
        [d["color"] for d in s.records[0]["detections"]] for s in alone
    ]


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(noise(1, 1)[0], id="1x1"),
        pytest.param(noise(1, 500)[0], id="1x500"),
        pytest.param(noise(900, 2)[0], id="900x2"),
        pytest.param(noise(33, 61)[0], id="odd sides"),
        pytest.param(np.zeros((64, 64, 3), np.uint8), id="black"),
        pytest.param(np.full((64, 64, 3), 255, np.uint8), id="white"),
        pytest.param(noise(64, 64)[0][:, ::-1], id="a view that is not contiguous"),
    ],
)
def test_odd_pictures_are_scored(scorer, image):
    scores = scorer.score(image[None], [prompt("colors", {"class": "bear", "color": "red"})])
    assert not scores.failed[0], scores.errors[0]
    assert np.isfinite(scores.value[0])


def test_a_picture_without_pixels_fails_and_is_not_scored_zero(scorer):
    scores = scorer.score(np.zeros((1, 0, 8, 3), np.uint8), [DOG])
    assert scores.failed[0] and np.isnan(scores.value[0])
    assert scores.errors[0] == "the picture has no pixels"


def test_nan_out_of_the_network_fails_that_picture_only(scorer, monkeypatch):
    scorer.ensure_loaded()
    network = scorer.detector._network
    original = network.forward

    def sometimes(pixels):
        output = original(pixels)
        output.class_queries_logits[(pixels == 255).all(dim=(1, 2, 3))] = float("nan")
        return output

    monkeypatch.setattr(network, "forward", sometimes)
    images = np.stack([noise(16, 16)[0], np.full((16, 16, 3), 255, np.uint8)])
    scores = scorer.score(images, [DOG, DOG])
    assert scores.failed.tolist() == [False, True]
    assert scores.errors[1] == "ScorerError: the detector's output is not finite"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "'tag'"),
        ({"tag": "counting", "include": [{"class": "mouse", "count": 1}]}, "'computer mouse'"),
        ({"tag": "counting", "include": [{"class": "remote", "count": 1}]}, "no class 'remote'"),
        ({"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "grey"}]}, "'grey'"),
        ({"tag": "counting", "include": [{"class": "dog", "count": 0}]}, "at least 1"),
        ({"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["left of", 1]}]}, "earlier clause"),
    ],
)
def test_prompts_it_cannot_judge_are_refused_before_anything_is_loaded(metadata, message):
    with pytest.raises(DataError, match=message):
        GenEvalScorer("mask2former").check_prompts([DOG, Prompt("bad", metadata)])


def test_the_self_test_reports_the_drawn_sign_without_deciding_by_it(scorer):
    # Random weights do not know a stop sign, and this seed's do not see dogs or stop signs in grey either.
    outcome = scorer.self_test()
    assert outcome.passed
    assert outcome.summary.startswith("2 of 3 known pictures")
    assert "'a photo of a red stop sign': expected True, got False (not counted)" in outcome.summary


def test_the_self_test_fails_for_a_detector_that_sees_what_is_not_there(scorer, monkeypatch):
    def everywhere(images):
        return [[Segment("dog", 0.9, (0.0, 0.0, 4.0, 4.0), mask=np.ones((4, 4), dtype=bool))] for _ in images]

    monkeypatch.setattr(scorer.detector, "detect", everywhere)
    outcome = scorer.self_test()
    assert not outcome.passed and "'a photo of a dog': expected False, got True" in outcome.summary


def test_the_drawn_stop_sign_is_red_with_white_on_it():
    picture = stop_sign()
    assert picture.shape == (512, 512, 3) and picture.dtype == np.uint8
    inside = picture[150:250, 170:342].reshape(-1, 3).astype(int)
    red = (inside[:, 0] > 150) & (inside[:, 1] < 80)
    white = inside.min(axis=1) > 200
    assert red.mean() > 0.3 and white.mean() > 0.1


@pytest.mark.parametrize("option", [{"channel_order": "swapped"}, {"device": "cpu"}, {"weights": "x.pth"}])
def test_options_of_the_network_do_not_fit_the_drawn_worlds_detector(option):
    with pytest.raises(UsageError, match=f"'tinyworld' has no option '{next(iter(option))}'; it takes none"):
        create("geneval", {"detector": "tinyworld", **option})
    with pytest.raises(UsageError, match="ready made"):
        GenEvalScorer(Mask2FormerDetector(), **option)


def test_options_reach_the_detector():
    options = {"channel_order": "swapped", "device": "cpu", "dtype": "bfloat16", "batch_size": "3", "weights": "x"}
    detector = create("geneval", {"detector": "mask2former", **options}).detector
    assert (detector.channel_order, detector.device, detector.dtype) == ("swapped", "cpu", "bfloat16")
    assert (detector.batch_size, str(detector.weights)) == (3, "x")
    assert Mask2FormerDetector().channel_order == create("geneval", {"detector": "mask2former"}).detector.channel_order


def test_choosing_it_imports_nothing_heavy():
    code = (
        "import sys; from ramctl.scorers.registry import create; create('geneval', {'detector': 'mask2former'}); "
        "print([m for m in ('torch', 'cv2', 'scipy', 'PIL', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_full_size_network_loads_and_runs(tmp_path, make_network, as_mmdetection):
    config = mask2former.network_config()
    model = make_network(config, sharpness=1.0)
    file = tmp_path / "full.pth"
    torch.save({"state_dict": as_mmdetection(model.state_dict(), 3)}, file)
    network = mask2former._Network(file, torch.device("cpu"), "float32")
    assert sum(weight.numel() for weight in network._model.parameters()) == 68_739_547 + 2 * 768
    picture = noise(12, 80)  # a strip: the network's input is 224 x 1344 instead of 800 x 1088
    pixels = torch.from_numpy(network_input(picture))
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    with torch.inference_mode():
        expected = model(pixel_values=((pixels - mean) / std).permute(0, 3, 1, 2).contiguous())
        actual = network.forward(pixels)
    torch.testing.assert_close(actual.class_queries_logits, expected.class_queries_logits, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(actual.masks_queries_logits, expected.masks_queries_logits, rtol=1e-3, atol=1e-2)
