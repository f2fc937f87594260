"""Several scorers as one reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from ramctl.errors import DataError, ScorerError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, SelfTest
from ramctl.scorers.composite import Reward, Term
from ramctl.scorers.jpeg import JpegCompressibility, JpegIncompressibility

PROMPTS = [Prompt(f"picture {i}") for i in range(3)]


class Brightness(Scorer):
    """Mean grey of a picture; refuses the picture with the given grey; strict above 100."""

    name = "brightness"

    def __init__(self, refused: int = -1, passes: bool = True, needs: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.refused, self.passes = refused, passes
        self.requires = needs  # type: ignore[misc]

    @property
    def version(self) -> str:
        return "brightness/1"

    def self_test(self) -> SelfTest:
        return SelfTest(self.passes, "grey 7 was read as 9")

    def score_image(self, image: Images, prompt: Prompt) -> ImageScore:
        mean = float(image.mean())
        if mean == self.refused:
            raise ValueError(f"grey {mean:.0f} is refused")
        return ImageScore(mean, strict=float(mean > 100), details={"mean": mean}, record={"text": prompt.text})


def greys(*levels: int) -> Images:
    return np.stack([np.full((8, 8, 3), level, dtype=np.uint8) for level in levels])


def records(reward: Reward, images: Images, prompts: Sequence[Prompt]) -> list[Mapping[str, object]]:
    return list(reward.score(images, prompts).records)


def test_the_reward_is_the_weighted_sum_of_scaled_values() -> None:
    images = greys(10, 100, 200)
    jpeg = JpegIncompressibility().score(images, PROMPTS).value
    reward = Reward([Term(Brightness(), weight=2.0, scale=50.0), Term(JpegIncompressibility(), weight=-0.5)])
    scores = reward.score(images, PROMPTS)
    np.testing.assert_allclose(scores.value, 2 * np.array([10, 100, 200]) / 50 - 0.5 * jpeg, rtol=1e-6)
    assert scores.value.dtype == np.float32
    assert scores.details.keys() == {
        "brightness/mean",
        "brightness/value",
        "jpeg-incompressibility/kilobytes",
        "jpeg-incompressibility/value",
    }
    np.testing.assert_allclose(scores.details["brightness/value"], [10, 100, 200])
    np.testing.assert_allclose(scores.details["jpeg-incompressibility/value"], jpeg)
    assert scores.strict is not None
    assert scores.strict.tolist() == [0, 0, 1]
    assert scores.records[1] == {"brightness": {"text": "picture 1"}, "jpeg-incompressibility": {}}


def test_one_scorer_alone_keeps_its_names_and_values() -> None:
    images = greys(10, 100, 200)
    alone = Brightness().score(images, PROMPTS)
    scores = Reward([Term(Brightness())]).score(images, PROMPTS)
    np.testing.assert_array_equal(scores.value, alone.value)
    assert scores.details.keys() == {"mean"}
    assert records(Reward([Term(Brightness())]), images, PROMPTS)[0] == {"brightness": {"text": "picture 0"}}


def test_strict_is_that_of_the_first_scorer_that_has_one() -> None:
    reward = Reward([Term(JpegCompressibility()), Term(Brightness())])
    strict = reward.score(greys(10, 100, 200), PROMPTS).strict
    assert strict is not None
    assert strict.tolist() == [0, 0, 1]
    assert Reward([Term(JpegCompressibility())]).score(greys(1, 2, 3), PROMPTS).strict is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_picture_one_scorer_fails_on_is_failed_for_all(order: tuple[int, int]) -> None:
    terms = [Term(Brightness(refused=100)), Term(JpegCompressibility())]
    scores = Reward([terms[i] for i in order]).score(greys(10, 100, 200), PROMPTS)
    assert scores.failed.tolist() == [False, True, False]
    assert np.isnan(scores.value).tolist() == [False, True, False]
    assert scores.errors[0] is None
    assert scores.errors[1] == "ValueError: grey 100 is refused"


def test_no_pictures_is_no_scores() -> None:
    reward = Reward([Term(Brightness()), Term(JpegCompressibility())])
    assert len(reward.score(np.zeros((0, 1, 1, 3), dtype=np.uint8), [])) == 0


def test_names_and_versions() -> None:
    reward = Reward([Term(Brightness()), Term(JpegCompressibility())])
    assert reward.names == ["brightness", "jpeg-compressibility"]
    assert reward.versions["brightness"] == "brightness/1"
    assert reward.versions["jpeg-compressibility"].startswith("jpeg-compressibility/")


def test_every_scorer_may_refuse_the_prompts() -> None:
    reward = Reward([Term(JpegCompressibility()), Term(Brightness(needs=("target",)))])
    with pytest.raises(DataError, match=r"Prompt 2 .* has no 'target'"):
        reward.check_prompts([Prompt("a", {"target": "a"}), Prompt("b")])


def test_a_failing_self_test_is_named() -> None:
    Reward([Term(Brightness()), Term(JpegCompressibility())]).self_test()
    with pytest.raises(ScorerError, match="'brightness' fails its self-test: grey 7 was read as 9"):
        Reward([Term(JpegCompressibility()), Term(Brightness(passes=False))]).self_test()
