"""The aesthetic predictor: five linear layers that are one, over the shared CLIP."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from ramctl.errors import MissingDependencyError, ScorerError
from ramctl.prompts import Prompt
from ramctl.scorers.aesthetic import KNOWN_BIAS, KNOWN_NORM, WEIGHTS_FILE, AestheticScorer, multiply_out
from ramctl.scorers.clip import preprocess

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the official file")


def noise(*shape: int) -> Any:
    return np.random.default_rng(3).integers(0, 256, (*shape, 3), dtype=np.uint8)


def layers(*sizes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, (before, after) in enumerate(itertools.pairwise(sizes)):
        state[f"layers.{2 * number}.weight"] = torch.randn(after, before, generator=generator) / before**0.5
        state[f"layers.{2 * number}.bias"] = torch.randn(after, generator=generator)
    return state


def test_the_value_is_the_layers_over_the_direction(clip_store: Any) -> None:
    images = noise(3, 50, 74)  # a width at which rounding moves the crop
    scores = AestheticScorer(device="cpu").score(images, [Prompt("")] * 3)
    state = torch.load(clip_store.root / "aesthetic" / WEIGHTS_FILE, weights_only=True)
    x = clip_store.reference["clip-vit-l14"].image(torch.stack([preprocess(i, crop="round") for i in images]))
    for number in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    np.testing.assert_allclose(scores.value, x[:, 0].numpy(), atol=3e-6)
    assert not scores.details and scores.strict is None


def test_full_size_layers_multiply_out_without_loss() -> None:
    state = layers(768, 1024, 128, 64, 16, 1)
    vector, bias = multiply_out(state)
    x = torch.nn.functional.normalize(torch.randn(64, 768, generator=torch.Generator().manual_seed(1)), dim=1)
    y = x
    for number in range(0, 10, 2):
        y = y @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    assert vector.shape == (768,) and vector.dtype == np.float64
    np.testing.assert_allclose(x.double().numpy() @ vector + bias, y[:, 0].numpy(), atol=3e-6)


def test_layers_follow_one_another_by_number_not_by_name() -> None:
    state = layers(4, 3, 3, 3, 3, 3, 3, 1)  # numbers up to 12: "10" sorts before "2"
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    y = x
    for number in range(0, 14, 2):
        y = y @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    vector, bias = multiply_out(state)
    np.testing.assert_allclose(x.double().numpy() @ vector + bias, y[:, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "none"),
        (torch.zeros(3), "none"),
        ({"weight": torch.zeros(1, 32)}, "weight"),
        ({"layers.0.weight": torch.zeros(1, 32)}, "layers.0.weight"),
        ({**layers(32, 1), "extra": torch.zeros(1)}, "extra"),
        (layers(32, 4, 2), "more than one output"),
        ({**layers(32, 4, 1), "layers.2.weight": torch.zeros(1, 5)}, "shapes|mismatch"),
        (layers(31, 4, 1), "31 numbers, CLIP's have 32"),
    ],
)
def test_another_head_is_refused(clip_files: Any, state: Any, message: str) -> None:
    clip_files.clip_vit_l14()
    file = clip_files.aesthetic()
    torch.save(state, file)
    with pytest.raises(ScorerError, match=message) as caught:
        AestheticScorer(device="cpu").ensure_loaded()
    assert WEIGHTS_FILE in str(caught.value)


def test_a_head_saved_from_a_gpu_loads(clip_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clip_files.clip_vit_l14()
    file = clip_files.aesthetic()
    before = AestheticScorer(device="cpu").score(noise(1, 64, 64), [Prompt("")]).value
    content = torch.load(file, weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content, file)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(file, weights_only=True)  # the trap, without map_location
    after = AestheticScorer(device="cpu").score(noise(1, 64, 64), [Prompt("")]).value
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("entry", ["aesthetic", "clip-vit-l14"])
def test_each_missing_part_is_named(clip_files: Any, entry: str) -> None:
    clip_files.clip_vit_l14()
    clip_files.aesthetic()
    for file in (clip_files.root / entry).iterdir():
        file.unlink()
    for ask in (AestheticScorer(device="cpu").ensure_loaded, lambda: AestheticScorer().version):
        with pytest.raises(MissingDependencyError, match=f"ramctl download-weights {entry}"):
            ask()


def test_the_version_names_the_head_and_the_shared_clip(clip_files: Any) -> None:
    from ramctl.scorers.clip import clip_vit_l14_version

    clip_files.clip_vit_l14()
    file = clip_files.aesthetic()
    version = AestheticScorer().version
    assert version.startswith("aesthetic/") and version.endswith(clip_vit_l14_version())
    torch.save(layers(32, 4, 1), file)
    assert AestheticScorer().version != version


@pytest.mark.parametrize(
    ("norm", "bias", "official"),
    [(KNOWN_NORM, KNOWN_BIAS, True), (KNOWN_NORM, KNOWN_BIAS + 0.01, False), (KNOWN_NORM + 1, KNOWN_BIAS, False)],
)
def test_the_self_test_knows_the_official_head(clip_files: Any, norm: float, bias: float, official: bool) -> None:
    clip_files.clip_vit_l14()
    file = clip_files.aesthetic()
    vector = torch.nn.functional.normalize(torch.randn(1, 32, generator=torch.Generator().manual_seed(3)), dim=1)
    torch.save({"layers.0.weight": vector * norm, "layers.0.bias": torch.tensor([bias])}, file)
    result = AestheticScorer(device="cpu").self_test()
    assert (f"not {KNOWN_NORM:.2f} and {KNOWN_BIAS}" in result.summary) == (not official)
    assert not result.passed and "CLIP does not tell" in result.summary  # its weights are random
