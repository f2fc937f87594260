"""Scorers by name: what can be asked for, and what a wrong name or option is answered."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ramctl.errors import UsageError
from ramctl.scorers import registry
from ramctl.scorers.base import Scorer
from ramctl.scorers.ocr import OcrScorer


@pytest.mark.parametrize("name", registry.available())
def test_every_scorer_can_be_made_and_is_described_in_one_line(name: str) -> None:
    scorer = registry.create(name)
    assert isinstance(scorer, Scorer) and scorer.name == name
    assert registry.describe(name).strip() and "\n" not in registry.describe(name)


def test_the_names_presets_use_are_there() -> None:
    assert {"geneval", "ocr", "jpeg-compressibility", "jpeg-incompressibility"} <= set(registry.available())


@pytest.mark.parametrize("ask", [registry.create, registry.describe])
def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(ask: object) -> None:
    with pytest.raises(UsageError) as caught:
        ask("genevla")  # type: ignore[operator]
    message = str(caught.value)
    assert "'genevla'" in message and "Did you mean 'geneval'?" in message
    assert all(name in message for name in registry.available())


def test_options_reach_the_constructor() -> None:
    scorer = registry.create("ocr", {"detector_side": 192, "threads": 1})
    assert isinstance(scorer, OcrScorer)
    assert (scorer.detector_side, scorer.threads) == (192, 1)


def test_a_number_written_as_text_is_understood() -> None:
    scorer = registry.create("ocr", {"detector_side": "192"})
    assert isinstance(scorer, OcrScorer) and scorer.detector_side == 192


def test_an_unknown_option_names_scorer_option_and_the_valid_ones() -> None:
    with pytest.raises(UsageError) as caught:
        registry.create("ocr", {"detector_size": 192})
    message = str(caught.value)
    assert "'ocr'" in message and "'detector_size'" in message and "Did you mean 'detector_side'" in message
    assert "threads (default None)" in message


def test_a_scorer_without_options_says_so() -> None:
    with pytest.raises(UsageError, match=r"'quality'.*takes no options"):
        registry.create("jpeg-compressibility", {"quality": 90})


@pytest.mark.parametrize("value", ["wide", 19.5, True, None, [320]])
def test_a_value_of_another_type_names_option_and_value(value: object) -> None:
    with pytest.raises(UsageError) as caught:
        registry.create("ocr", {"detector_side": value})
    assert "'detector_side'" in str(caught.value) and repr(value) in str(caught.value)


@pytest.mark.parametrize("options", [{"detector_side": 0}, {"threads": 0}, {"threads": -2}])
def test_an_impossible_number_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))} is"):
        registry.create("ocr", options)


def test_a_wrong_choice_of_the_geneval_scorer_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="partial"):
        registry.create("geneval", {"partial": "generous"})


def test_listing_imports_no_scorer_and_no_heavy_package() -> None:
    code = (
        "import sys; from ramctl.scorers import registry as r; [r.describe(name) for name in r.available()];"
        " bad = {'numpy', 'torch', 'PIL', 'cv2', 'rapidocr', 'pydantic', 'ramctl.scorers.base'};"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_making_the_ocr_scorer_does_not_load_its_engine() -> None:
    code = (
        "import sys; from ramctl.scorers import registry; registry.create('ocr', {'threads': 1});"
        "print(sorted({'torch', 'cv2', 'rapidocr', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
