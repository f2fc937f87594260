"""The OCR reward: Flow-GRPO's rule, what is read on drawn signs, and inputs that must not break it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ramctl.errors import DataError, MissingDependencyError, ScorerError
from ramctl.prompts import Prompt, read_prompts
from ramctl.scorers.base import Images, Scores
from ramctl.scorers.ocr import OcrScorer, capped_distance, limit_aspect, normalise, rapid, target_text
from ramctl.tinyworld.grammar import sign_prompt
from ramctl.tinyworld.renderer import render_sign

PROMPTS = Path(__file__).parents[2] / "prompts"


@pytest.fixture(scope="module")
def scorer() -> OcrScorer:
    made = OcrScorer(detector_side=192, threads=1)
    made.ensure_loaded()
    return made


def signs(*words: str, seed: int = 5) -> Images:
    rng = np.random.default_rng(seed)
    return np.stack([render_sign(word, rng) for word in words])


def reads(monkeypatch: pytest.MonkeyPatch, scorer: OcrScorer, *lines: str) -> None:
    """Let the engine of this scorer find these lines, to test the rule apart from the reading."""
    monkeypatch.setattr(scorer, "_read", lambda image: list(lines))


def score_one(scorer: OcrScorer, image: Images, prompt: Prompt) -> Scores:
    return scorer.score(image[None], [prompt])


BLANK = np.full((64, 64, 3), 90, dtype=np.uint8)


# --- the target


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        (Prompt('a sign that says "Open Late"'), "Open Late"),
        (Prompt('"first" and then "second"'), "first"),
        (Prompt('a "torn quotation" mark " here'), "torn quotation"),
        (Prompt('a sign that says "open"', {"target": "shut"}), "shut"),
        (Prompt("a sign without quotes", {"target": "shut"}), "shut"),
        (Prompt('nothing in ""'), ""),
        (Prompt('a label "E=mc²\nO₂"'), "E=mc²\nO₂"),
    ],
)
def test_the_target(prompt: Prompt, target: str) -> None:
    assert target_text(prompt) == target


@pytest.mark.parametrize("text", ["a plain picture", 'one " quote', "a “curly” sign", "a 'single' sign"])
def test_prompts_without_a_target_are_refused_before_any_image(text: str) -> None:
    with pytest.raises(DataError) as caught:
        OcrScorer().check_prompts([sign_prompt("fine"), Prompt(text)])
    assert f"Prompt 2 ({text!r})" in str(caught.value) and "double quotes" in str(caught.value)


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt('a sign ""'),
        Prompt('a sign "   "'),
        Prompt('a sign "" and a "word"'),  # the first pair counts
        Prompt('a sign "word"', {"target": " "}),
    ],
)
def test_prompts_with_nothing_to_read_are_refused_before_any_image(prompt: Prompt) -> None:
    with pytest.raises(DataError, match="nothing to read") as caught:
        OcrScorer().check_prompts([sign_prompt("fine"), prompt])
    assert str(caught.value).startswith(f"Prompt 2 ({prompt.text!r})")


@pytest.mark.parametrize("target", ["!", "…", "?!", " a ", "4", "灯", "\t", "💡"])
def test_short_and_odd_targets_are_legal(target: str) -> None:
    OcrScorer().check_prompts([Prompt(f'a sign "{target}"'), Prompt("a sign", {"target": target})])


@pytest.mark.parametrize(
    "name", ["ocr/test.jsonl", "ocr/train.jsonl.gz", "ocr-tiny/test.jsonl", "ocr-tiny/train.jsonl"]
)
def test_every_shipped_prompt_can_be_scored(name: str) -> None:
    OcrScorer().check_prompts(read_prompts(PROMPTS / name))


@pytest.mark.parametrize("target", [3, None, ["a"]])
def test_a_target_that_is_no_string_is_refused(target: Any) -> None:
    with pytest.raises(DataError, match="must be a string"):
        OcrScorer().check_prompts([Prompt("a sign", {"target": target})])


# --- the rule


@pytest.mark.parametrize(
    ("lines", "target", "value", "distance", "extra"),
    [
        (["OPEN"], "open", 1.0, 0, 0),
        (["OP", "EN"], "open", 1.0, 0, 0),  # lines are joined without a separator
        (["op en"], "o pen", 1.0, 0, 0),  # spaces do not count on either side
        (["we are open today"], "open", 1.0, 0, 10),  # a hit anywhere is a hit; the rest shows in the details
        (["opem"], "open", 0.75, 1, 0),
        (["ope"], "open", 0.75, 1, 0),
        (["oxpen"], "open", 0.75, 1, 1),
        ([], "open", 0.0, 4, 0),
        (["zzzzzzzzzz"], "open", 0.0, 4, 6),  # ten edits, capped at the target's four letters
        (["op.en"], "open", 0.75, 1, 1),  # punctuation is not folded
        (["cafe"], "café", 0.75, 1, 0),  # nor are accents
        (["a\tb"], "ab", 0.5, 1, 1),  # only ASCII spaces are removed
        (["ÄRGER"], "ärger", 1.0, 0, 0),
        (["short"], "a much longer target", 4 / 17, 13, 0),
    ],
)
def test_the_rule(
    scorer: OcrScorer,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    target: str,
    value: float,
    distance: int,
    extra: int,
) -> None:
    reads(monkeypatch, scorer, *lines)
    scores = score_one(scorer, BLANK, Prompt(f'a sign "{target}"'))
    assert scores.value[0] == pytest.approx(value, abs=1e-4)
    assert scores.details["distance"][0] == distance
    assert scores.details["extra_characters"][0] == extra
    assert scores.strict is not None and scores.strict[0] == float(value == 1)
    assert scores.records[0] == {"text": " ".join(lines), "target": target}


def test_the_distance_is_never_more_than_the_target() -> None:
    assert capped_distance("q" * 500, "open") == 4
    assert capped_distance("", "open") == 4
    assert capped_distance("xxopenxx", "open") == 0


@pytest.mark.parametrize("target", ["", " ", "    "])
def test_an_empty_target_is_a_failure_not_a_zero(scorer: OcrScorer, target: str) -> None:
    scores = scorer.score(signs("open", "open"), [Prompt("a sign", {"target": target}), sign_prompt("open")])
    assert scores.failed.tolist() == [True, False]
    assert np.isnan(scores.value[0]) and scores.value[1] == 1
    assert scores.errors[0] is not None and "nothing to read" in scores.errors[0]


# --- the reading


def test_drawn_words_are_read_and_misspelled_ones_are_read_as_they_stand(scorer: OcrScorer) -> None:
    shown = ["lamp", "tree", "bok", "gost", "vet"]
    asked = ["lamp", "tree", "book", "ghost", "vat"]
    scores = scorer.score(signs(*shown), [sign_prompt(word) for word in asked])
    assert [normalise(str(record["text"])) for record in scores.records] == shown
    np.testing.assert_allclose(scores.value, [1, 1, 0.75, 0.8, 2 / 3], rtol=1e-6)
    assert scores.strict is not None and scores.strict.tolist() == [1, 1, 0, 0, 0]


def test_noise_over_a_word_is_read_through(scorer: OcrScorer) -> None:
    noise = np.random.default_rng(1).normal(0, 25, (2, 64, 64, 3))
    images = np.clip(signs("moon", "fish") + noise, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(scorer.score(images, [sign_prompt("moon"), sign_prompt("fish")]).value, 1)


def test_the_engine_gets_the_channels_in_its_own_order(scorer: OcrScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Images] = []
    reader = rapid.RapidReader(192)
    monkeypatch.setattr(reader, "_engine", seen.append)
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    image[..., 0] = 250
    reader.read(image)
    assert seen[0][0, 0].tolist() == [0, 0, 250] and seen[0].flags.c_contiguous


def test_lines_of_no_confidence_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        txts = ("sure", "ghost")
        scores = (0.4, 0.0)

    reader = rapid.RapidReader(192)
    monkeypatch.setattr(reader, "_engine", lambda image: Found())
    assert reader.read(BLANK) == ["sure"]


def test_one_at_a_time_equals_a_batch_and_threads_do_not_matter(scorer: OcrScorer) -> None:
    words = ["sun", "moon", "kite", "frog", "oven", "duck", "pie", "yarn"]
    images, prompts = signs(*words), [sign_prompt(word) for word in reversed(words)]
    single = [scorer.score(images[i : i + 1], prompts[i : i + 1]) for i in range(8)]
    for other in (scorer, OcrScorer(detector_side=192, threads=2)):
        batch = other.score(images, prompts)
        np.testing.assert_array_equal(batch.value, [s.value[0] for s in single])
        assert list(batch.records) == [s.records[0] for s in single]


def test_the_self_test_passes_and_notices_a_blind_engine(monkeypatch: pytest.MonkeyPatch, scorer: OcrScorer) -> None:
    result = scorer.self_test()
    assert result.passed, result.summary
    reads(monkeypatch, scorer)
    blind = scorer.self_test()
    assert not blind.passed and "'sun'" in blind.summary


def test_the_self_test_notices_an_engine_that_says_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch, scorer: OcrScorer
) -> None:
    reads(monkeypatch, scorer, "sun", "moon", "kite", "frog", "lamp", "tree")
    assert not scorer.self_test().passed


def test_the_version_names_rule_engine_weights_and_sizes() -> None:
    version = OcrScorer(detector_side=192).version
    assert version.startswith("ocr/flow-grpo-ocr-1/rapidocr-")
    assert "PP-OCRv6_det_small-" in version and "PP-OCRv6_rec_small-" in version
    assert "side-192" in version and f"line-{rapid.LINE_WIDTH}" in version
    assert version != OcrScorer(detector_side=320).version


def test_the_engine_is_silent(scorer: OcrScorer, capfd: pytest.CaptureFixture[str]) -> None:
    score_one(OcrScorer(detector_side=192, threads=1), BLANK, sign_prompt("open"))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert not logging.getLogger("RapidOCR").isEnabledFor(logging.ERROR)


# --- bad inputs


def noise(height: int, width: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(noise(1, 1), id="1x1"),
        pytest.param(noise(1, 500), id="1x500"),
        pytest.param(noise(500, 1), id="500x1"),
        pytest.param(noise(2000, 8), id="2000x8"),
        pytest.param(noise(33, 61), id="odd sides"),
        pytest.param(noise(64, 64), id="noise"),
        pytest.param(np.zeros((64, 64, 3), dtype=np.uint8), id="black"),
        pytest.param(np.full((64, 64, 3), 255, dtype=np.uint8), id="white"),
        pytest.param(BLANK[:, ::-1], id="a view that is not contiguous"),
    ],
)
def test_pictures_without_text_score_low_soon_and_are_not_failures(scorer: OcrScorer, image: Images) -> None:
    start = time.perf_counter()
    scores = score_one(scorer, image, sign_prompt("open"))
    assert not scores.failed[0], scores.errors[0]
    assert scores.value[0] <= 0.25
    assert time.perf_counter() - start < 10  # unguarded, the strips take 10 to 40 seconds


@pytest.mark.slow
def test_a_large_picture_is_read(scorer: OcrScorer) -> None:
    image = np.full((2048, 2048, 3), 30, dtype=np.uint8)
    image[700:1340, 700:1340] = signs("moon")[0].repeat(10, axis=0).repeat(10, axis=1)
    assert score_one(scorer, image, sign_prompt("moon")).value[0] == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param('a "lamp" and a "tree"', 1.0, id="two quoted parts: the first counts"),
        pytest.param('a "lamp that is far longer than what is written"', 4 / 36, id="longer than the text"),
        pytest.param('a "💡🔆💡"', 0.0, id="emoji"),
        pytest.param('a "лампа"', 0.0, id="Cyrillic"),
        pytest.param('a "灯"', 0.0, id="one ideogram"),
        pytest.param('a "LA\nMP"', 0.8, id="a line break counts as a character"),
        pytest.param('a "l a m p"', 1.0, id="spaces do not count"),
        pytest.param('a "&quot;lamp&quot;"', 4 / 16, id="HTML entities are not resolved"),
        pytest.param('"lamp" ' + "very " * 300, 1.0, id="a long prompt"),
    ],
)
def test_odd_targets(scorer: OcrScorer, text: str, value: float) -> None:
    scores = score_one(scorer, signs("lamp")[0], Prompt(text))
    assert not scores.failed[0], scores.errors[0]
    assert scores.value[0] == pytest.approx(value)


def test_a_picture_without_pixels_is_failed(scorer: OcrScorer) -> None:
    scores = scorer.score(np.zeros((1, 0, 64, 3), dtype=np.uint8), [sign_prompt("open")])
    assert scores.failed[0] and np.isnan(scores.value[0])
    assert scores.errors[0] == "the picture has no pixels"


def test_a_picture_that_breaks_the_engine_is_failed_and_the_others_are_read(
    scorer: OcrScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = scorer._read

    def sometimes(image: Images) -> list[str]:
        if image[0, 0, 0] == 255:
            raise RuntimeError("Traceback:\n  somewhere\n  [ONNXRuntimeError] : 1 : FAIL")
        return original(image)

    monkeypatch.setattr(scorer, "_read", sometimes)
    images = np.stack([*signs("lamp"), np.full((64, 64, 3), 255, dtype=np.uint8), *signs("tree")])
    scores = scorer.score(images, [sign_prompt(word) for word in ("lamp", "open", "tree")])
    assert scores.failed.tolist() == [False, True, False]
    assert scores.errors[1] == "RuntimeError: [ONNXRuntimeError] : 1 : FAIL"
    np.testing.assert_array_equal(scores.value, [1, np.nan, 1])


def test_an_interrupt_stops_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = OcrScorer(detector_side=192, threads=1)
    scorer.ensure_loaded()
    read: list[int] = []

    def interrupted(image: Images) -> list[str]:
        read.append(1)
        if len(read) == 1:
            raise KeyboardInterrupt
        time.sleep(0.05)
        return []

    monkeypatch.setattr(scorer, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scorer.score(np.stack([BLANK] * 20), [sign_prompt("open")] * 20)
    time.sleep(0.2)
    assert len(read) < 5


@pytest.mark.parametrize(
    ("shape", "padded"),
    [
        ((1, 500), (50, 500)),
        ((500, 1), (500, 50)),
        ((8, 2001), (201, 2001)),
        ((64, 640), (64, 640)),
        ((1, 1), (1, 1)),
    ],
)
def test_long_strips_are_padded_around_the_middle(shape: tuple[int, int], padded: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 200, dtype=np.uint8)
    image[0, 0] = 7
    result = limit_aspect(image)
    assert result.shape == (*padded, 3)
    top, left = (padded[0] - shape[0]) // 2, (padded[1] - shape[1]) // 2
    np.testing.assert_array_equal(result[top : top + shape[0], left : left + shape[1]], image)
    if shape != padded:
        assert result[0, -1].tolist() == [200, 200, 200]


# --- what is missing


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime", "rapidfuzz"])
def test_a_missing_package_is_named_with_the_command_that_gets_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError) as caught:
        score_one(OcrScorer(), BLANK, sign_prompt("open"))
    assert package in str(caught.value)
    assert "pip install 'rapidocr>=3.10,<4' onnxruntime" in str(caught.value)


@pytest.fixture
def other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package whose models folder is ours to damage."""
    folder = tmp_path / "rapidocr" / "models"
    folder.mkdir(parents=True)

    class Spec:
        origin = str(tmp_path / "rapidocr" / "__init__.py")

    rapid.model_files.cache_clear()
    monkeypatch.setattr(rapid.importlib.util, "find_spec", lambda name: Spec())
    yield folder
    rapid.model_files.cache_clear()


def test_a_missing_model_file_is_named(other_models: Path) -> None:
    with pytest.raises(MissingDependencyError, match=rapid.DETECTOR_FILE):
        OcrScorer().ensure_loaded()


def test_damaged_models_stop_the_start_instead_of_failing_every_picture(other_models: Path) -> None:
    for name in (rapid.DETECTOR_FILE, rapid.RECOGNISER_FILE):
        (other_models / name).write_bytes(b"not a model")
    with pytest.raises(ScorerError, match=r"does not start.*pip install"):
        OcrScorer(threads=1).ensure_loaded()
