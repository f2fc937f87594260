"""What the four scorers on a CLIP share: options, batches, failures that stay with their picture."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from ramctl.errors import MissingDependencyError, UsageError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, Scores, SelfTest
from ramctl.scorers.clip_scorer import ClipScorer, drawn_pictures, matching_test
from ramctl.scorers.registry import create

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the official file")

NAMES = ("pickscore", "hpsv2", "aesthetic", "clipscore")
TEXTS = ["a red circle", "blue", "", "a photo of a cat " * 30, "🐱 “red” &amp;", "a red circle", "x y z", "\n"]


def pictures(count: int, height: int = 40, width: int = 56) -> Images:
    return np.random.default_rng(5).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def made(name: str, **options: Any) -> ClipScorer:
    scorer = create(name, {"device": "cpu", **options})
    assert isinstance(scorer, ClipScorer)
    return scorer


def assert_same(first: Scores, second: Scores) -> None:
    np.testing.assert_allclose(first.value, second.value, atol=1e-6)
    assert first.details.keys() == second.details.keys()
    for name, column in first.details.items():
        np.testing.assert_allclose(column, second.details[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_one_at_a_time_equals_a_batch(clip_store: Any, name: str) -> None:
    scorer, images, prompts = made(name), pictures(8), [Prompt(text) for text in TEXTS]
    together = scorer.score(images, prompts)
    assert not together.failed.any() and len(set(together.value.round(5))) == 8
    for index in range(8):
        alone = scorer.score(images[index : index + 1], prompts[index : index + 1])
        np.testing.assert_allclose(alone.value, together.value[index : index + 1], atol=1e-6)
    for size in (1, 3, 64):
        assert_same(made(name, batch_size=size).score(images, prompts), together)
    order = np.array([3, 1, 7, 0, 2, 6, 4, 5])
    shuffled = scorer.score(images[order], [prompts[index] for index in order])
    np.testing.assert_allclose(shuffled.value, together.value[order], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_of_the_prompt(clip_store: Any, name: str) -> None:
    images = np.concatenate([pictures(1)] * 2)
    first, second = made(name).score(images, [Prompt("a red circle"), Prompt("blue")]).value
    assert (first == second) == (name == "aesthetic")


@pytest.mark.parametrize("name", NAMES)
def test_equal_prompts_are_encoded_once(clip_store: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = made(name, batch_size=2)
    scorer.ensure_loaded()
    encoder, seen = scorer.engine[0], []
    original = encoder.text_features
    monkeypatch.setattr(encoder, "text_features", lambda texts: seen.extend(texts) or original(texts))
    scorer.score(pictures(6), [Prompt("red"), Prompt("blue")] * 3)
    assert seen == ([] if name == "aesthetic" else ["red", "blue"])


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_cannot_be_encoded_fails_alone(clip_store: Any, name: str) -> None:
    scorer, prompts = made(name), [Prompt("red"), Prompt("half \ud83d pair"), Prompt("blue")]
    scores = scorer.score(pictures(3), prompts)
    clean = scorer.score(pictures(3)[[0, 2]], [prompts[0], prompts[2]])
    np.testing.assert_allclose(scores.value[[0, 2]], clean.value, atol=1e-6)
    if name in ("pickscore", "clipscore"):
        assert scores.failed.tolist() == [False, True, False] and "not valid Unicode" in str(scores.errors[1])
    else:  # ftfy mends it; the aesthetic predictor does not look
        assert not scores.failed.any()


@pytest.mark.parametrize("name", NAMES)
def test_pictures_without_pixels_are_failed(clip_store: Any, name: str) -> None:
    scores = made(name).score(np.zeros((2, 0, 5, 3), dtype=np.uint8), [Prompt("red")] * 2)
    assert scores.failed.all() and scores.errors[0] == "the picture has no pixels"


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_not_finite_are_failed(clip_store: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = made(name)
    scorer.ensure_loaded()
    encoder = scorer.engine[0]
    original = encoder.image_features

    def overflowing(pixels: Any) -> Any:
        found = original(pixels)
        found[1] = float("nan")
        return found

    monkeypatch.setattr(encoder, "image_features", overflowing)
    scores = scorer.score(pictures(3), [Prompt("red")] * 3)
    assert scores.failed.tolist() == [False, True, False] and "non-finite" in str(scores.errors[1])


@pytest.mark.parametrize("name", NAMES)
def test_another_precision_is_near_and_in_the_version(clip_store: Any, name: str) -> None:
    images, prompts = pictures(4), [Prompt("a red circle")] * 4
    full, half = made(name), made(name, dtype="bfloat16")
    difference = np.abs(full.score(images, prompts).value - half.score(images, prompts).value).max()
    assert 0 < difference < 0.2
    assert full.version != half.version and half.version.endswith("/bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_the_version_needs_no_loading_and_names_the_scorer(clip_store: Any, name: str) -> None:
    scorer = made(name)
    assert scorer.version.startswith(f"{name}/") and scorer.version.count("/") >= 4
    assert scorer._engine is None
    with pytest.raises(RuntimeError, match="before load"):
        _ = scorer.engine


@pytest.mark.parametrize("name", NAMES)
def test_without_weights_load_and_version_say_how_to_get_them(clip_files: Any, name: str) -> None:
    for ask in (lambda: made(name).ensure_loaded(), lambda: made(name).version, lambda: made(name).self_test()):
        with pytest.raises(MissingDependencyError, match="ramctl download-weights"):
            ask()


@pytest.mark.parametrize("name", NAMES)
def test_other_weights_are_refused_before_a_network_is_built(
    clip_store: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAMCTL_OTHER_WEIGHTS")
    monkeypatch.setattr("ramctl.scorers.clip_checkpoints.build_clip", pytest.fail)
    for ask in (lambda: made(name).ensure_loaded(), lambda: made(name).version, lambda: made(name).make_encoder()):
        with pytest.raises(
            MissingDependencyError, match=r"is not the official file: .*SHA-256 \w{64}, expected \w{64}"
        ):
            ask()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'.*float32, bfloat16, float16"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -3}, "batch_size is -3"),
        ({"precision": "float32"}, "has no option 'precision'"),
        ({"batch_size": "many"}, "batch_size"),
    ],
)
def test_odd_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create(name, options)


def test_an_unknown_device_is_refused_when_loading(clip_store: Any) -> None:
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        create("clipscore", {"device": "tpu"}).ensure_loaded()


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_fail_the_self_test_without_an_exception(clip_store: Any, name: str) -> None:
    result = made(name).self_test()
    assert not result.passed and result.summary


class Judging(Scorer):
    """Knows each drawn picture's caption, or with ``shift`` takes it for another's."""

    name = "judging"
    version = "1"

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def score_image(self, image: Images, prompt: Prompt) -> ImageScore:
        captions = list(drawn_pictures())
        shown = next(i for i, drawn in enumerate(drawn_pictures().values()) if (drawn == image).all())
        return ImageScore(float(captions.index(prompt.text) == (shown + self.shift) % len(captions)))

    def self_test(self) -> SelfTest:
        return matching_test(self)


def test_the_self_test_tells_matching_from_mismatched() -> None:
    assert Judging(0).self_test().passed
    assert not Judging(1).self_test().passed


def test_making_a_scorer_imports_neither_torch_nor_transformers() -> None:
    import subprocess

    code = (
        "import sys; from ramctl.scorers.registry import create\n"
        f"[create(name) for name in {NAMES!r}]\n"
        "sys.exit(' '.join({'torch', 'transformers', 'tokenizers', 'ftfy'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
