"""HPSv2.1: open_clip's checkpoint, its preparation of pictures, its cleaning of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ramctl.errors import DataError, MissingDependencyError, ScorerError
from ramctl.prompts import Prompt
from ramctl.scorers.clip import MEAN, STD
from ramctl.scorers.clip_tokens import open_clip_tokenizer
from ramctl.scorers.hpsv2 import WEIGHTS_FILE, Hpsv2Scorer, fit_longest

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the official file")

BORDER = [-mean / std for mean, std in zip(MEAN, STD, strict=True)]


def noise(*shape: int) -> Any:
    return np.random.default_rng(2).integers(0, 256, (*shape, 3), dtype=np.uint8)


def unit(pixels: Tensor) -> Tensor:
    return pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


# --- pictures


def test_a_square_of_the_right_size_is_only_normalised() -> None:
    image = noise(224, 224)
    expected = torch.from_numpy(image.copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(unit(fit_longest(image, 224)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "inside"),
    [
        ((112, 224), (56, 168, 0, 224)),  # no resizing, still padded
        ((448, 224), (0, 224, 56, 168)),
        ((100, 300), (74, 149, 0, 224)),  # 75 rows; of 149 spare ones 74 above
        ((3, 2), (0, 224, 37, 186)),
        ((1, 500), (111, 112, 0, 224)),
        ((5000, 7), (0, 224, 111, 112)),
    ],
)
def test_the_longest_side_fits_and_the_rest_is_black_before_normalising(
    shape: tuple[int, int], inside: tuple[int, int, int, int]
) -> None:
    pixels = fit_longest(np.full((*shape, 3), 255, dtype=np.uint8), 224)
    top, bottom, left, right = inside
    assert pixels.shape == (3, 224, 224)
    expected = torch.tensor(BORDER).view(3, 1, 1).repeat(1, 224, 224)
    white = [(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    expected[:, top:bottom, left:right] = torch.tensor(white).view(3, 1, 1)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_shrinking_is_bicubic_antialiased_and_unclamped() -> None:
    from PIL import Image

    image = noise(448, 448)
    image[:224] = np.where(np.indices((224, 448)).sum(0)[..., None] // 40 % 2, 0, 255)
    found = unit(fit_longest(image, 224))
    for channel in range(3):
        floats = Image.fromarray((image[:, :, channel] / 255).astype(np.float32))
        expected = np.asarray(floats.resize((224, 224), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(found[channel].numpy(), expected, atol=1e-5)
    assert found.max() > 1.01 and found.min() < -0.01  # overshoot beside the edges is kept
    whole = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255
    aliased = torch.nn.functional.interpolate(whole, size=(224, 224), mode="bicubic", align_corners=False)[0]
    assert (aliased - found).abs().max() > 0.1  # the trap: torchvision before 0.17


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(DataError, match="no pixels"):
        fit_longest(np.zeros((0, 4, 3), dtype=np.uint8), 224)


# --- the score


def test_the_value_is_the_cosine_without_a_temperature(clip_store: Any) -> None:
    images = noise(2, 70, 50)
    prompts = [Prompt("A Red Circle"), Prompt("a “blue” square &amp; cat")]
    scores = Hpsv2Scorer(device="cpu").score(images, prompts)
    reference, tokenise = clip_store.reference["hpsv2.1"], open_clip_tokenizer("clip-vit-h14-tokenizer")
    for index, prompt in enumerate(prompts):
        picture = reference.image(fit_longest(images[index], 224)[None])[0]
        text = reference.text(torch.tensor([tokenise(prompt.text)]))[0]
        assert scores.value[index] == pytest.approx(float(picture @ text), abs=3e-6)
        assert scores.details["hps_x100"][index] == pytest.approx(100 * float(picture @ text), abs=3e-4)


def test_the_network_is_open_clip_s_with_the_usual_gelu(clip_store: Any) -> None:
    scorer = Hpsv2Scorer(device="cpu")
    scorer.ensure_loaded()
    reference = clip_store.reference["hpsv2.1"]
    pixels = torch.stack([fit_longest(image, 224) for image in noise(3, 64, 80)])
    found = scorer.engine[0].image_features(pixels)
    torch.testing.assert_close(found, reference.image(pixels), atol=3e-6, rtol=0)
    reference.quick = True
    try:
        assert (found - reference.image(pixels)).abs().max() > 1e-3
    finally:
        reference.quick = False


@pytest.mark.parametrize(
    ("written", "meant"), [("“red” cat", '"red" cat'), ("red &amp; blue", "red & blue"), ("ＲＥＤ", "red")]
)
def test_prompts_are_mended_as_open_clip_does(clip_store: Any, written: str, meant: str) -> None:
    first, second = (
        Hpsv2Scorer(device="cpu").score(np.concatenate([noise(1, 64, 64)] * 2), [Prompt(written), Prompt(meant)]).value
    )
    assert first == second


# --- the checkpoint


def test_sizes_are_read_off_the_checkpoint_and_heads_off_the_published_widths(clip_store: Any) -> None:
    scorer = Hpsv2Scorer(device="cpu")
    scorer.ensure_loaded()
    config = scorer.engine[0]._model.config
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (160, 2, 2)
    assert (vision.image_size, vision.patch_size, vision.hidden_act) == (224, 28, "gelu")
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers) == (128, 2, 3)
    assert config.projection_dim == 32 and next(scorer.engine[0]._model.parameters()).dtype == torch.float32


def saved_from_a_gpu(content: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a file whose tensors say that they were on a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content, file)
    with pytest.raises(RuntimeError, match="CUDA") if not torch.cuda.is_available() else monkeypatch.context():
        assert torch.load(file, weights_only=True)  # the trap, without map_location


def test_a_checkpoint_saved_from_a_gpu_loads(clip_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = clip_files.hpsv2()
    before = Hpsv2Scorer(device="cpu").score(noise(1, 64, 64), [Prompt("red")]).value
    saved_from_a_gpu(torch.load(file, weights_only=True), file, monkeypatch)
    after = Hpsv2Scorer(device="cpu").score(noise(1, 64, 64), [Prompt("red")]).value
    np.testing.assert_array_equal(before, after)


def test_a_causal_mask_in_the_checkpoint_is_no_weight(clip_files: Any) -> None:
    file = clip_files.hpsv2()
    content = torch.load(file, weights_only=True)
    content["state_dict"]["attn_mask"] = torch.zeros(77, 77)
    torch.save(content, file)
    Hpsv2Scorer(device="cpu").ensure_loaded()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: {}, "state_dict"),
        (lambda state: {"state_dict": 3}, "state_dict"),
        (lambda state: {"state_dict": {"weight": torch.zeros(3)}}, "state_dict"),
        (lambda state: {"state_dict": {k: v for k, v in state.items() if k != "visual.proj"}}, "visual_projection"),
        (lambda state: {"state_dict": {k: v for k, v in state.items() if k != "text_projection"}}, "text_projection"),
        (lambda state: {"state_dict": {**state, "extra": torch.zeros(3)}}, r"1 unknown tensors \(extra\)"),
        (
            lambda state: {"state_dict": {**state, "visual.conv1.weight": torch.zeros(100, 3, 28, 28)}},
            "no multiple of 80",
        ),
    ],
)
def test_another_checkpoint_is_refused(clip_files: Any, damage: Any, message: str) -> None:
    file = clip_files.hpsv2()
    torch.save(damage(torch.load(file, weights_only=True)["state_dict"]), file)
    with pytest.raises(ScorerError, match=message) as caught:
        Hpsv2Scorer(device="cpu").ensure_loaded()
    assert WEIGHTS_FILE in str(caught.value)


@pytest.mark.parametrize("cut", [0, 10, 5000])
def test_a_truncated_file_is_named(clip_files: Any, cut: int) -> None:
    file = clip_files.hpsv2()
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ScorerError, match=r"HPS_v2.1_compressed.pt cannot be read.*download-weights hpsv2.1 --verify"):
        Hpsv2Scorer(device="cpu").ensure_loaded()


def test_a_file_that_would_run_code_is_refused(clip_files: Any, tmp_path: Path) -> None:
    file = clip_files.hpsv2()
    torch.save({"state_dict": Path("x")}, file)  # any class but tensors and plain values
    with pytest.raises(ScorerError, match="cannot be read"):
        Hpsv2Scorer(device="cpu").ensure_loaded()


def test_the_vocabulary_is_asked_for_by_its_own_entry(clip_files: Any) -> None:
    clip_files.hpsv2()
    (clip_files.root / "clip-vit-h14-tokenizer" / "merges.txt").unlink()
    with pytest.raises(MissingDependencyError, match="ramctl download-weights clip-vit-h14-tokenizer"):
        Hpsv2Scorer(device="cpu").ensure_loaded()


def test_the_package_that_mends_prompts_is_in_the_version_and_asked_for(
    clip_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata

    assert f"/ftfy-{importlib.metadata.version('ftfy')}/" in Hpsv2Scorer().version

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingDependencyError, match="pip install ftfy"):
        _ = Hpsv2Scorer().version
