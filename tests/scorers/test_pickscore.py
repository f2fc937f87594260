"""PickScore: the published formula over the published layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ramctl.errors import MissingDependencyError, ScorerError
from ramctl.prompts import Prompt
from ramctl.scorers.clip import preprocess
from ramctl.scorers.clip_tokens import hub_tokenizer
from ramctl.scorers.pickscore import PickScoreScorer

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the official file")

PROMPTS = [Prompt("a red circle"), Prompt("a “blue” square &amp; cat")]


def noise(*shape: int) -> Any:
    return np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_raw_is_temperature_times_cosine_and_the_value_a_26th(clip_store: Any) -> None:
    images = noise(2, 70, 50)
    scores = PickScoreScorer(device="cpu").score(images, PROMPTS)
    reference, tokenise = clip_store.reference["pickscore"], hub_tokenizer("clip-vit-h14-tokenizer")
    for index, prompt in enumerate(PROMPTS):
        picture = reference.image(preprocess(images[index])[None])[0]
        text = reference.text(torch.tensor([tokenise(prompt.text)]))[0]
        raw = float(torch.exp(reference.logit_scale) * (picture @ text))
        assert scores.details["raw"][index] == pytest.approx(raw, abs=1e-3)
        assert scores.value[index] == pytest.approx(raw / 26, abs=1e-4)
    assert scores.strict is None


def test_the_prompt_is_not_mended(clip_store: Any) -> None:
    scorer = PickScoreScorer(device="cpu")
    curly, straight = scorer.score(np.concatenate([noise(1, 64, 64)] * 2), [Prompt("“red”"), Prompt('"red"')]).value
    assert abs(curly - straight) > 1e-4


def test_the_activation_is_the_configuration_s(clip_store: Any) -> None:
    scorer = PickScoreScorer(device="cpu")
    scorer.ensure_loaded()
    reference = clip_store.reference["pickscore"]
    assert not reference.quick
    pixels = preprocess(noise(64, 64))[None]
    torch.testing.assert_close(scorer.engine[0].image_features(pixels), reference.image(pixels), atol=2e-6, rtol=0)


def test_values_stay_in_the_declared_range() -> None:
    low, high = PickScoreScorer.value_range
    assert low == -high and high == pytest.approx(100 / 26)


@pytest.mark.parametrize(
    ("entry", "name"),
    [("pickscore", "scorer:pickscore"), ("clip-vit-h14-tokenizer", "clip-vit-h14-tokenizer")],  # a preset has the name
)
def test_each_missing_part_is_named(clip_files: Any, entry: str, name: str) -> None:
    clip_files.pickscore()
    for file in (clip_files.root / entry).iterdir():
        file.unlink()
    with pytest.raises(MissingDependencyError, match=f"ramctl download-weights {name}"):
        PickScoreScorer(device="cpu").ensure_loaded()


def test_the_tokenizer_of_another_clip_is_refused(clip_files: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    clip_files.pickscore()
    file = clip_files.root / "clip-vit-h14-tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_tokens(["zzz"])
    tokenizer.post_processor = TemplateProcessing(
        single="<|startoftext|> $A zzz", special_tokens=[("<|startoftext|>", 0), ("zzz", tokenizer.token_to_id("zzz"))]
    )
    tokenizer.save(str(file))
    with pytest.raises(ScorerError, match="do not belong together"):
        PickScoreScorer(device="cpu").ensure_loaded()
