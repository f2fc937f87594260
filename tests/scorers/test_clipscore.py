"""CLIPScore's variants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ramctl.errors import UsageError
from ramctl.prompts import Prompt
from ramctl.scorers.clip import normalise, preprocess
from ramctl.scorers.clip_tokens import hub_tokenizer
from ramctl.scorers.clipscore import ClipScoreScorer
from ramctl.scorers.registry import create

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the official file")

PROMPTS = [Prompt("a red circle"), Prompt("“blue” &amp; cat"), Prompt("photo")]


@pytest.fixture(scope="module")
def images() -> Any:
    """Of a width at which rounding moves the crop."""
    return np.random.default_rng(4).integers(0, 256, (3, 60, 108, 3), dtype=np.uint8)


def cosines(store: Any, pixels: list[torch.Tensor]) -> Any:
    reference, tokenise = store.reference["clip-vit-l14"], hub_tokenizer("clip-vit-l14")
    texts = torch.cat([reference.text(torch.tensor([tokenise(prompt.text)])) for prompt in PROMPTS])
    return (reference.image(torch.stack(pixels)) * texts).sum(dim=1).numpy()


def squeezed(image: Any) -> torch.Tensor:
    """Pillow's float pictures, resized to the square whatever their shape."""
    from PIL import Image

    channels = [Image.fromarray((image[:, :, c] / 255).astype(np.float32)) for c in range(3)]
    resized = [np.asarray(channel.resize((224, 224), Image.Resampling.BILINEAR)) for channel in channels]
    return normalise(torch.from_numpy(np.stack(resized)))


def test_flow_grpo_squeezes_the_picture(clip_store: Any, images: Any) -> None:
    scores = ClipScoreScorer(device="cpu").score(images, PROMPTS)
    np.testing.assert_allclose(scores.value, cosines(clip_store, [squeezed(i) for i in images]), atol=1e-5)
    assert not scores.details


def test_clip_crops_it(clip_store: Any, images: Any) -> None:
    scores = ClipScoreScorer("clip", device="cpu").score(images, PROMPTS)
    np.testing.assert_allclose(scores.value, cosines(clip_store, [preprocess(i) for i in images]), atol=3e-6)


def test_hessel_weighs_what_is_above_zero(clip_store: Any, images: Any) -> None:
    scores = ClipScoreScorer("hessel", device="cpu").score(images, PROMPTS)
    found = cosines(clip_store, [preprocess(i, crop="round") for i in images])
    np.testing.assert_allclose(scores.value, 2.5 * np.maximum(found, 0), atol=1e-5)
    assert (found < 0).any() and (found > 0).any()  # both halves of the rule are seen


def test_the_variants_differ_in_number_and_version(clip_store: Any, images: Any) -> None:
    scorers = [ClipScoreScorer(variant, device="cpu") for variant in ("flow_grpo", "clip", "hessel")]
    assert len({scorer.version for scorer in scorers}) == 3
    values = [scorer.score(images, PROMPTS).value for scorer in scorers]
    assert np.abs(values[0] - values[1]).max() > 1e-3


def test_the_ranges() -> None:
    assert ClipScoreScorer().value_range == (-1.0, 1.0)
    assert ClipScoreScorer("hessel").value_range == (0.0, 2.5)


@pytest.mark.parametrize("make", [ClipScoreScorer, lambda variant: create("clipscore", {"variant": variant})])
def test_another_variant_is_refused(make: Any) -> None:
    with pytest.raises(UsageError, match=r"variant.*flow_grpo"):
        make("openai")
