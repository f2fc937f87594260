"""Several scorers as one reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from ramctl.errors import ConfigError, DataError, ScorerError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, Scores, SelfTest
from ramctl.scorers.composite import Reward, Term, check_output, combine
from ramctl.scorers.jpeg import JpegCompressibility, JpegIncompressibility

PROMPTS = [Prompt(f"picture {i}") for i in range(3)]


class Brightness(Scorer):
    """Mean grey of a picture; refuses the picture with the given grey; strict above a threshold."""

    name = "brightness"
    threshold = 100

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
        details = {"mean": mean, "half": mean / 2}
        return ImageScore(mean, strict=float(mean > self.threshold), details=details, record={"text": prompt.text})


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
        "brightness/half",
        "brightness/value",
        "brightness/strict",
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
    assert scores.details.keys() == {"mean", "half"}
    assert records(Reward([Term(Brightness())]), images, PROMPTS)[0] == {"brightness": {"text": "picture 0"}}


@pytest.mark.parametrize(
    ("output", "expected"), [("value", [10, 100, 200]), ("strict", [0, 0, 1]), ("half", [5, 50, 100])]
)
def test_a_term_rewards_the_output_it_names_less_its_offset(output: str, expected: list[float]) -> None:
    term = Term(Brightness(), weight=2.0, scale=4.0, output=output, offset=3.0)
    scores = Reward([term]).score(greys(10, 100, 200), PROMPTS)
    np.testing.assert_array_equal(scores.value, 2 * (np.array(expected) - 3) / 4)
    assert scores.value.dtype == np.float32
    assert not scores.failed.any()
    np.testing.assert_array_equal(scores.details["value"], [10, 100, 200])
    assert scores.strict is not None and scores.strict.tolist() == [0, 0, 1]


def test_of_several_scorers_each_keeps_its_value_and_its_strict_answer() -> None:
    other = Brightness()
    other.name = "other"  # type: ignore[misc]
    other.threshold = 50
    scores = Reward([Term(Brightness()), Term(JpegCompressibility()), Term(other)]).score(greys(10, 70, 200), PROMPTS)
    assert scores.strict is not None and scores.strict.tolist() == [0, 0, 1]
    assert scores.details["brightness/strict"].tolist() == [0, 0, 1]
    assert scores.details["other/strict"].tolist() == [0, 1, 1]
    assert "jpeg-compressibility/strict" not in scores.details
    assert {"brightness/value", "jpeg-compressibility/value", "other/value"} <= scores.details.keys()


@pytest.mark.parametrize("output", ["missing", "strict", "half"])
def test_a_picture_without_the_rewarded_output_is_failed_with_the_reason(output: str) -> None:
    results: list[ImageScore | str] = [
        ImageScore(1.0, strict=1.0, details={"half": 2.0, "missing": 1.0}),
        ImageScore(1.0, strict=None, details={"half": float("inf")}),
        "it is broken",
    ]
    scores = combine([("a", Term(Brightness(), output=output), Scores.collect(results))])
    assert scores.failed.tolist() == [False, True, True]
    assert np.isnan(scores.value).tolist() == [False, True, True]
    assert scores.errors[1] is not None
    assert scores.errors[1].startswith(f"the scorer 'a' gave no '{output}' (outputs: value, strict, half")
    assert (scores.errors[0], scores.errors[2]) == (None, "it is broken")


def test_an_output_the_scorer_does_not_report_is_refused_when_it_is_loaded() -> None:
    reward = Reward([Term(JpegCompressibility()), Term(Brightness(), output="haf")])
    reward.check_prompts(PROMPTS)
    with pytest.raises(ConfigError, match=r"brightness\.output is 'haf'.*mean 'half'\? .* value, strict, mean, half\."):
        reward.load()
    with pytest.raises(ConfigError, match=r"outputs are value, kilobytes\."):
        check_output(JpegCompressibility(), "strict", PROMPTS[0])


def test_outputs_that_are_reported_and_pictures_that_tell_nothing_pass() -> None:
    reward = Reward([Term(Brightness(), output=output) for output in ("value", "strict", "half")])
    reward.check_prompts(PROMPTS)
    reward.load()
    check_output(Brightness(refused=127), "haf", PROMPTS[0])


def test_strict_is_that_of_the_first_scorer_that_has_one() -> None:
    reward = Reward([Term(JpegCompressibility()), Term(Brightness())])
    strict = reward.score(greys(10, 100, 200), PROMPTS).strict
    assert strict is not None
    assert strict.tolist() == [0, 0, 1]
    assert Reward([Term(JpegCompressibility())]).score(greys(1, 2, 3), PROMPTS).strict is None


def test_a_failed_picture_has_no_strict_answer_whatever_the_batches() -> None:
    """In a batch on which the first scorer fails altogether, the second one's answers must not stand in for its own."""
    reward = Reward([Term(Brightness(refused=200)), Term(Brightness())])
    images = greys(10, 150, 200, 200)
    prompts = [*PROMPTS, Prompt("picture 3")]
    whole = reward.score(images, prompts)
    halves = Scores.joined([reward.score(images[part], prompts[part]) for part in (slice(0, 2), slice(2, 4))])
    for scores in (whole, halves):
        assert scores.strict is not None
        np.testing.assert_array_equal(scores.strict, [0, 1, np.nan, np.nan])
        assert scores.failed.tolist() == [False, False, True, True]


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
