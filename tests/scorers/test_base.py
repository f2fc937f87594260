"""The promises every scorer keeps: what it accepts, and that one bad image is a failure, not a zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ramctl.errors import DataError, MissingDependencyError, RamctlError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, Scores, SelfTest


class Brightness(Scorer):
    """Mean brightness; refuses black pictures and says NaN of white ones."""

    name = "brightness"
    requires = ("tag",)

    def __init__(self) -> None:
        super().__init__()
        self.loads = 0

    @property
    def version(self) -> str:
        return "brightness-1"

    def self_test(self) -> SelfTest:
        return SelfTest(True, "")

    def load(self) -> None:
        self.loads += 1

    def score_image(self, image: Images, prompt: Prompt) -> ImageScore:
        mean = float(image.mean())
        if mean == 0:
            raise ValueError("too dark")
        if mean == 255:
            return ImageScore(value=float("nan"))
        return ImageScore(mean / 255, strict=float(mean > 100), details={"mean": mean}, record={"tag": prompt.tag})


def pictures(*grays: int) -> Images:
    return np.stack([np.full((4, 5, 3), gray, dtype=np.uint8) for gray in grays])


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"picture {i}", {"tag": "gray"}) for i in range(count)]


def test_a_picture_that_raises_is_failed_with_its_reason_and_the_others_are_scored() -> None:
    scores = Brightness().score(pictures(51, 0, 204), prompts(3))
    assert scores.failed.tolist() == [False, True, False]
    assert list(scores.errors) == [None, "ValueError: too dark", None]
    np.testing.assert_allclose(scores.value, [0.2, np.nan, 0.8], rtol=1e-6)
    assert scores.strict is not None
    np.testing.assert_array_equal(scores.strict, [0, np.nan, 1])
    np.testing.assert_array_equal(scores.details["mean"], [51, np.nan, 204])
    assert list(scores.records) == [{"tag": "gray"}, {}, {"tag": "gray"}]
    assert scores.value.dtype == np.float32 and scores.strict.dtype == np.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_is_a_failure(value: float) -> None:
    scores = Scores.collect([ImageScore(0.5), ImageScore(value, strict=1.0, record={"kept": False})])
    assert scores.failed.tolist() == [False, True]
    assert scores.errors[1] is not None and "non-finite" in scores.errors[1]
    assert np.isnan(scores.value[1])
    assert scores.records[1] == {}


def test_a_scorer_that_returns_nan_marks_only_that_picture() -> None:
    assert Brightness().score(pictures(255, 128), prompts(2)).failed.tolist() == [True, False]


def test_strict_is_none_without_a_yes_or_no_answer() -> None:
    assert Scores.collect([ImageScore(0.5), "broken"]).strict is None


def test_details_named_by_some_images_only_are_nan_for_the_others() -> None:
    scores = Scores.collect([ImageScore(0.5, details={"a": 1.0}), ImageScore(0.5, details={"b": 2.0})])
    np.testing.assert_array_equal(scores.details["a"], [1, np.nan])
    np.testing.assert_array_equal(scores.details["b"], [np.nan, 2])


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(pictures(9).astype(np.float32) / 255, id="float in 0 to 1"),
        pytest.param(pictures(9).astype(np.int64), id="another integer type"),
        pytest.param(pictures(9).transpose(0, 3, 1, 2), id="channels first"),
        pytest.param(pictures(9)[0], id="one image without the batch axis"),
        pytest.param(pictures(9)[..., :1], id="gray"),
        pytest.param(np.zeros((1, 4, 5, 4), dtype=np.uint8), id="RGBA"),
        pytest.param(pictures(9).tolist(), id="nested lists"),
    ],
)
def test_images_of_another_form_are_refused_by_name(images: Images) -> None:
    with pytest.raises(DataError, match=r"'brightness' takes images as uint8 \[N, H, W, 3\]"):
        Brightness().score(images, prompts(1))


def test_lengths_must_agree() -> None:
    with pytest.raises(DataError, match="got 2 images and 3 prompts"):
        Brightness().score(pictures(9, 9), prompts(3))


def test_no_images_give_no_scores() -> None:
    scores = Brightness().score(np.zeros((0, 4, 5, 3), dtype=np.uint8), [])
    assert len(scores) == 0 and scores.strict is None and scores.failed.shape == (0,)


def test_load_runs_once_and_only_when_scoring() -> None:
    scorer = Brightness()
    assert scorer.loads == 0
    scorer.score(pictures(9), prompts(1))
    scorer.score(pictures(9), prompts(1))
    assert scorer.loads == 1


def test_a_prompt_without_required_metadata_is_named() -> None:
    with pytest.raises(DataError, match=r"Prompt 2 \('no tag'\) has no 'tag'.*'brightness'"):
        Brightness().check_prompts([*prompts(1), Prompt("no tag")])


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupts_and_exhausted_memory_are_not_swallowed(error: type[BaseException]) -> None:
    class Stopped(Brightness):
        def score_image(self, image: Images, prompt: Prompt) -> ImageScore:
            raise error

    with pytest.raises(error):
        Stopped().score(pictures(9), prompts(1))


def test_a_scorer_that_loses_an_image_is_a_bug_that_shows() -> None:
    class Lossy(Brightness):
        def score_batch(self, images: Images, prompts: Sequence[Prompt]) -> list[ImageScore | str]:
            return super().score_batch(images, prompts)[1:]

    with pytest.raises(RamctlError, match="1 results for 2 images"):
        Lossy().score(pictures(9, 9), prompts(2))


def test_what_is_missing_is_what_the_version_lacks_and_nothing_is_loaded() -> None:
    class Weightless(Brightness):
        @property
        def version(self) -> str:
            raise MissingDependencyError("no weights: ramctl download-weights brightness")

    scorer = Weightless()
    assert scorer.missing() == ["no weights: ramctl download-weights brightness"]
    assert Brightness().missing() == [] and scorer.loads == 0
