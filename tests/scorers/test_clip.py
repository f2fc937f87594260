"""CLIP encoders: pictures as published, the network against one written out a second time, one copy for all."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ramctl.errors import DataError, MissingDependencyError, OutOfMemoryError, ScorerError, UsageError
from ramctl.prompts import Prompt
from ramctl.scorers import clip
from ramctl.scorers.base import Images
from ramctl.scorers.clip import MEAN, STD, Batches, clip_vit_l14, clip_vit_l14_version, preprocess, resize_tensor
from ramctl.scorers.devices import placed
from ramctl.scorers.geneval.colours import ColorNamer
from ramctl.scorers.registry import create

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the official file")

TEXTS = ["a red circle", "", "a photo of a cat " * 30, "🐱🔴", "x"]


def noise(height: int, width: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def unnormalised(pixels: torch.Tensor) -> np.ndarray[Any, Any]:
    """The uint8 picture that was normalised, [H, W, 3]."""
    levels = (pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
    return levels.round().byte().permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.stack([preprocess(noise(60, 90, seed)) for seed in range(8)])


# --- pictures


@pytest.mark.parametrize(
    "shape", [(224, 224), (64, 64), (512, 512), (300, 479), (479, 300), (31, 17), (1, 1), (2, 901), (224, 225)]
)
def test_pictures_are_prepared_as_the_hub_s_processor_does(shape: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    image = noise(*shape)
    expected = CLIPImageProcessorPil()(images=[image], return_tensors="np", input_data_format="channels_last")
    np.testing.assert_allclose(preprocess(image).numpy(), expected["pixel_values"][0], atol=1e-6)


@pytest.mark.parametrize(
    ("spare", "floor", "rounded"), [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 2), (5, 2, 2), (7, 3, 4)]
)
def test_where_the_crop_begins(spare: int, floor: int, rounded: int) -> None:
    image = noise(224, 224 + spare)
    np.testing.assert_array_equal(unnormalised(preprocess(image)), image[:, floor : floor + 224])
    np.testing.assert_array_equal(unnormalised(preprocess(image, crop="round")), image[:, rounded : rounded + 224])
    turned = preprocess(image.transpose(1, 0, 2), crop="round")
    np.testing.assert_array_equal(unnormalised(turned), image[:, rounded : rounded + 224].transpose(1, 0, 2))


def test_another_size() -> None:
    assert preprocess(noise(50, 70), 32).shape == (3, 32, 32)


def test_endless_strips_are_cut_before_they_are_enlarged() -> None:
    image = np.zeros((1, 65_000, 3), dtype=np.uint8)
    image[:, 32_000:33_000] = 200
    np.testing.assert_array_equal(unnormalised(preprocess(image)), np.full((224, 224, 3), 200))


def test_a_picture_without_pixels_is_refused() -> None:
    for image in (np.zeros((0, 5, 3), dtype=np.uint8), np.zeros((5, 0, 3), dtype=np.uint8)):
        with pytest.raises(DataError, match="no pixels"):
            preprocess(image)


def test_views_and_read_only_pictures_are_taken() -> None:
    image = noise(40, 60)
    mirrored = image[:, ::-1]
    mirrored.flags.writeable = False
    torch.testing.assert_close(preprocess(mirrored), preprocess(np.ascontiguousarray(mirrored)))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 31), (100, 90)])
def test_float_pictures_are_resized_with_antialiasing(mode: Any, size: tuple[int, int]) -> None:
    from PIL import Image

    pixels = torch.rand(3, 50, 61, generator=torch.Generator().manual_seed(0))
    resized = resize_tensor(pixels, *size, mode)
    # Pillow's own float images are resized with the same kernels, always with antialiasing.
    kernel = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[mode]
    for channel, found in zip(pixels, resized, strict=True):
        expected = np.asarray(Image.fromarray(channel.numpy()).resize(size[::-1], kernel))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    if size == (20, 31):
        aliased = torch.nn.functional.interpolate(pixels[None], size=size, mode=mode, align_corners=False)[0]
        assert (aliased - resized).abs().max() > 0.1


# --- the network


def test_pictures_go_through_the_network_with_openai_s_activation(clip_store: Any, pixels: torch.Tensor) -> None:
    reference = clip_store.reference["clip-vit-l14"]
    found = clip_vit_l14("cpu").image_features(pixels)
    assert reference.quick
    torch.testing.assert_close(found, reference.image(pixels), atol=2e-6, rtol=0)
    reference.quick = False
    try:
        assert (found - reference.image(pixels)).abs().max() > 1e-3
    finally:
        reference.quick = True


def test_texts_go_through_the_network_whatever_pads_them(clip_store: Any) -> None:
    encoder, reference = clip_vit_l14("cpu"), clip_store.reference["clip-vit-l14"]
    found = encoder.text_features(TEXTS)
    for text, direction in zip(TEXTS, found, strict=True):
        alone = torch.tensor([encoder.tokens(text)])  # without any padding
        torch.testing.assert_close(direction, reference.text(alone)[0], atol=2e-6, rtol=0)
    assert encoder.logit_scale == pytest.approx(np.exp(4.6), rel=1e-6)


def test_directions_are_float32_of_length_one_on_the_cpu(clip_store: Any, pixels: torch.Tensor) -> None:
    for dtype in ("float32", "bfloat16"):
        encoder = clip_vit_l14("cpu", dtype)
        for found in (encoder.image_features(pixels), encoder.text_features(TEXTS)):
            assert found.dtype == torch.float32 and found.device.type == "cpu" and found.shape[1] == encoder.width
            torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))


def test_alone_or_with_others_the_numbers_are_the_same(clip_store: Any, pixels: torch.Tensor) -> None:
    encoder = clip_vit_l14("cpu")
    alone = torch.cat([encoder.image_features(one[None]) for one in pixels])
    torch.testing.assert_close(encoder.image_features(pixels), alone, atol=1e-6, rtol=0)
    alone = torch.cat([encoder.text_features([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.text_features(TEXTS), alone, atol=1e-6, rtol=0)


def test_a_caller_s_autocast_does_not_change_the_precision(clip_store: Any, pixels: torch.Tensor) -> None:
    encoder = clip_vit_l14("cpu")
    plain = encoder.image_features(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(encoder.image_features(pixels), plain, atol=1e-6, rtol=0)


def test_bfloat16_is_near_and_named(clip_store: Any, pixels: torch.Tensor) -> None:
    full, half = clip_vit_l14("cpu"), clip_vit_l14("cpu", "bfloat16")
    difference = (full.image_features(pixels) - half.image_features(pixels)).abs().max()
    assert 1e-5 < difference < 0.05
    assert full.version.endswith("/float32") and half.version.endswith("/bfloat16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-3), ("bfloat16", 0.05), ("float16", 0.01)])
def test_a_gpu_finds_the_same_directions(clip_store: Any, pixels: torch.Tensor, dtype: str, bound: float) -> None:
    cpu, gpu = clip_vit_l14("cpu"), clip_vit_l14("cuda", dtype)
    assert gpu.device.type == "cuda"
    for found, expected in (
        (gpu.image_features(pixels), cpu.image_features(pixels)),
        (gpu.text_features(TEXTS), cpu.text_features(TEXTS)),
    ):
        assert found.device.type == "cpu" and (found - expected).abs().max() < bound


# --- one copy


def test_all_who_ask_get_the_same_encoder(clip_store: Any) -> None:
    encoder = clip_vit_l14("cpu")
    scorers = [create("aesthetic"), create("clipscore", {"variant": "clip"}), create("clipscore")]
    for scorer in scorers:
        scorer.ensure_loaded()
    if not torch.cuda.is_available():
        assert all(scorer.engine[0] is encoder for scorer in scorers)  # type: ignore[attr-defined]
    assert len({id(scorer.engine[0]) for scorer in scorers}) == 1  # type: ignore[attr-defined]
    colours = ColorNamer(device="cpu")
    colours.load()
    assert colours._encoder is encoder
    assert clip_vit_l14("cpu", "bfloat16") is not encoder
    other = create("pickscore", {"device": "cpu"})
    other.ensure_loaded()
    assert other.engine[0] is not encoder  # type: ignore[attr-defined]


def test_threads_that_ask_at_once_load_once(clip_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clip_files.clip_vit_l14()
    monkeypatch.setattr(clip, "_shared", type(clip._shared)())  # another test may hold the same encoder
    loads: list[str] = []
    original = clip.load_hub_clip
    monkeypatch.setattr(clip, "load_hub_clip", lambda name: loads.append(name) or original(name))  # type: ignore[func-returns-value]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(clip_vit_l14("cpu"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["clip-vit-l14"] and len({id(encoder) for encoder in found}) == 1


def test_an_encoder_nobody_holds_is_let_go(clip_files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clip_files.clip_vit_l14()
    monkeypatch.setattr(clip, "_shared", type(clip._shared)())
    encoder = clip_vit_l14("cpu")
    key = (encoder.version, "cpu")
    assert key in clip._shared
    del encoder
    gc.collect()
    assert key not in clip._shared


def test_other_weights_are_another_encoder_and_another_version(clip_files: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = clip_files.clip_vit_l14()
    first, version = clip_vit_l14("cpu"), clip_vit_l14_version()
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] *= 2
    save_file(state, folder / "model.safetensors")
    assert clip_vit_l14_version() != version
    assert clip_vit_l14("cpu") is not first


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_the_version_names_configuration_and_tokenizer(clip_files: Any, file: str) -> None:
    folder = clip_files.clip_vit_l14()
    version = clip_vit_l14_version()
    path = folder / file
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert clip_vit_l14_version() != version


# --- weights that are missing, damaged or of another network


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named_with_the_command_that_gets_it(clip_files: Any, file: str) -> None:
    (clip_files.clip_vit_l14() / file).unlink()
    for ask in (clip_vit_l14, lambda device: clip_vit_l14_version()):
        with pytest.raises(MissingDependencyError, match="ramctl download-weights clip-vit-l14") as caught:
            ask("cpu")
        assert file in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b'{"model_type": "clip", "text_config": 3}'])
def test_a_damaged_file_is_named(clip_files: Any, file: str, content: bytes) -> None:
    (clip_files.clip_vit_l14() / file).write_bytes(content)
    with pytest.raises(ScorerError) as caught:
        clip_vit_l14("cpu")
    assert file in str(caught.value) and "--verify" in str(caught.value)


def test_a_truncated_file_is_named(clip_files: Any) -> None:
    file = clip_files.clip_vit_l14() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ScorerError, match=r"model\.safetensors cannot be read"):
        clip_vit_l14("cpu")


def test_tensors_must_fit_the_configuration(clip_files: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = clip_files.clip_vit_l14() / "model.safetensors"
    state = load_file(file)
    removed = state.pop("vision_model.post_layernorm.bias")
    save_file(state, file)
    with pytest.raises(ScorerError, match=r"1 missing tensors \(vision_model.post_layernorm.bias\)"):
        clip_vit_l14("cpu")
    save_file({**state, "vision_model.post_layernorm.bias": removed, "other.weight": removed.clone()}, file)
    with pytest.raises(ScorerError, match=r"1 unknown tensors \(other.weight\)"):
        clip_vit_l14("cpu")
    save_file({**state, "vision_model.post_layernorm.bias": removed[:-1].clone()}, file)
    with pytest.raises(ScorerError, match=r"post_layernorm.bias"):
        clip_vit_l14("cpu")


def edit_config(folder: Path, part: str, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config[part].update(changes)
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_l14_with_the_usual_gelu_is_refused(clip_files: Any, part: str) -> None:
    edit_config(clip_files.clip_vit_l14(), part, hidden_act="gelu")
    with pytest.raises(ScorerError, match="quick_gelu"):
        clip_vit_l14("cpu")


def test_a_tokenizer_of_another_vocabulary_is_refused(clip_files: Any) -> None:
    edit_config(clip_files.clip_vit_l14(), "text_config", eos_token_id=7)
    with pytest.raises(ScorerError, match="do not belong together"):
        clip_vit_l14("cpu")


def test_odd_options_are_refused(clip_store: Any) -> None:
    with pytest.raises(UsageError, match="float32, bfloat16, float16"):
        clip_vit_l14("cpu", "int8")
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        clip_vit_l14("tpu")


# --- batches


def counting(limit: int, seen: list[int]) -> Any:
    """Work that runs out of memory with more than ``limit`` items, and returns each item's number."""

    def work(part: slice) -> torch.Tensor:
        seen.append(part.stop - part.start)
        if part.stop - part.start > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.arange(part.start, part.stop)

    return work


def test_batches_cover_all_items_in_order() -> None:
    seen: list[int] = []
    torch.testing.assert_close(Batches(4, "x").run(10, counting(100, seen)), torch.arange(10))
    assert seen == [4, 4, 2]


def test_out_of_memory_halves_the_batch_once_and_for_good() -> None:
    seen: list[int] = []
    batches = Batches(8, "x")
    torch.testing.assert_close(batches.run(10, counting(4, seen)), torch.arange(10))
    assert seen == [8, 4, 4, 2]
    torch.testing.assert_close(batches.run(5, counting(4, seen)), torch.arange(5))
    with pytest.raises(OutOfMemoryError) as caught:
        batches.run(5, counting(2, seen))
    for word in ("'x'", "batch_size", "bfloat16", 'device = "cpu"'):
        assert word in str(caught.value)


def test_a_single_item_too_large_is_an_error_at_once() -> None:
    with pytest.raises(OutOfMemoryError, match="at 1 images"):
        Batches(8, "x").run(1, counting(0, []))


def test_a_scorer_whose_batch_does_not_fit_goes_on_in_halves(clip_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = create("clipscore", {"device": "cpu", "batch_size": 8})
    images, prompts = np.stack([noise(32, 32, seed) for seed in range(8)]), [Prompt("a cat")] * 8
    expected = scorer.score(images, prompts).value
    encoder = scorer.engine[0]  # type: ignore[attr-defined]
    original = encoder.image_features

    def small(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(pixels)

    monkeypatch.setattr(encoder, "image_features", small)
    np.testing.assert_allclose(scorer.score(images, prompts).value, expected, atol=1e-6)


def test_a_network_the_gpu_has_no_room_for_is_reported_with_what_helps() -> None:
    class Large:
        def to(self, device: torch.device, dtype: torch.dtype) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match=r"does not hold PickScore: .*bfloat16.*cpu"):
        placed(Large(), torch.device("cpu"), torch.float32, "PickScore")
