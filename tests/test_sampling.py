"""Drawing into folders: the pictures are the model's, repeatable, paired with the base's, and never overwrite any."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ramctl.engine.randomness import keyed_normal, keyed_seed
from ramctl.engine.samplers import SAMPLERS
from ramctl.errors import DataError, RamctlError, UsageError
from ramctl.images import load_image, read_image_folder
from ramctl.prompts import Prompt
from ramctl.sampling import Drawn, DrawSettings, Picture, draw, sample
from ramctl.sources import OpenModel, open_source

SETTINGS = DrawSettings(sampling_steps=3, guidance_scale=1.5, negative_prompt="", seed=5, images_per_prompt=1)


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint: Path) -> OpenModel:
    return open_source(str(tiny_checkpoint), device="cpu", precision="float32")


@pytest.fixture(scope="module")
def base() -> OpenModel:
    return open_source("models/tinyworld", device="cpu", precision="float32")


def pixels(folder: Path) -> list[np.ndarray]:
    return [load_image(row.path) for row in read_image_folder(folder)]


def test_the_folder_can_be_scored(base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    samples = sample(
        base, tiny_prompts, replace(SETTINGS, images_per_prompt=2), output=out, progress=lambda *a: told.append(a)
    )
    rows = read_image_folder(out)
    assert [row.prompt for row in rows] == [prompt for prompt in tiny_prompts for _ in range(2)]
    assert rows[3].path.name == "00001-01.png"
    assert samples.images == len(rows) == 12 and samples.base is None and samples.tuned == out
    assert told[-1] == ("drawing", 12, 12)
    # Two columns of pictures enlarged to 128 pixels, a gap of 2 between them; one row per prompt.
    assert load_image(samples.grid).shape == (6 * 130 - 2, 2 * 130 - 2, 3)


def test_the_facts_say_what_was_drawn(tuned: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path) -> None:
    samples = sample(tuned, tiny_prompts[:1], SETTINGS, output=tmp_path / "out")
    facts = json.loads((samples.folder / "sampling.json").read_text())
    assert facts["sampling_steps"] == 3 and facts["guidance_scale"] == 1.5 and facts["seed"] == 5
    assert facts["weights"] == "evaluation" and facts["sha256"] == tuned.hashes
    assert facts["checkpoint"] == str(tuned.checkpoint)


def test_the_same_seed_gives_the_same_pictures_and_another_seed_others(
    base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in ("a", "b", "c")}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        sample(base, tiny_prompts[:2], replace(SETTINGS, seed=seed), output=folders[name])
    a, b, c = (pixels(folder) for folder in folders.values())
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a[0], a[1])


def test_asking_for_more_pictures_or_prompts_leaves_the_first_as_they_were(
    base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    sample(base, tiny_prompts[:1], SETTINGS, output=tmp_path / "one")
    sample(base, tiny_prompts[:2], replace(SETTINGS, images_per_prompt=2), output=tmp_path / "four")
    one, four = pixels(tmp_path / "one"), pixels(tmp_path / "four")
    # Larger batches round differently in the last bits.
    assert np.abs(four[0].astype(int) - one[0].astype(int)).max() <= 1
    assert not np.array_equal(four[1], four[0])


def test_the_base_beside_it_is_the_base_model_from_the_same_noise(
    tuned: OpenModel, base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    both = sample(tuned, tiny_prompts[:2], SETTINGS, output=tmp_path / "both", compare_base=True)
    alone = sample(base, tiny_prompts[:2], SETTINGS, output=tmp_path / "base")
    only_tuned = sample(tuned, tiny_prompts[:2], SETTINGS, output=tmp_path / "tuned")
    assert both.base is not None and both.images == 4
    np.testing.assert_array_equal(pixels(both.base), pixels(alone.folder))
    np.testing.assert_array_equal(pixels(both.tuned), pixels(only_tuned.folder))
    assert not np.array_equal(pixels(both.base), pixels(both.tuned))
    grid = load_image(both.grid)
    assert grid.shape == (2 * 130 - 2, 2 * 130 - 2, 3)
    left, right = grid[:128:2, :128:2], grid[:128:2, 130::2]
    np.testing.assert_array_equal(left, pixels(both.base)[0])
    np.testing.assert_array_equal(right, pixels(both.tuned)[0])


@pytest.mark.parametrize(
    ("guidance_scale", "negative_prompt"), [(1.0, ""), (2.0, ""), (2.0, "a photo of a red circle")]
)
def test_plain_diffusers_with_the_lora_gives_the_same_pictures(
    guidance_scale: float, negative_prompt: str, tuned: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    from diffusers import StableDiffusion3Pipeline

    from ramctl.resources import resource_dir

    settings = replace(SETTINGS, sampling_steps=4, guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    ours = sample(tuned, tiny_prompts[:2], settings, output=tmp_path / "ours")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        resource_dir("models") / "tinyworld", text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> list[np.ndarray]:
        seeds = [keyed_seed(settings.seed, "sample", 0, prompt) for prompt in range(2)]
        noise = keyed_normal(seeds, tuned.backbone.latent_shape, torch.device("cpu"))
        images = pipeline(
            [prompt.text for prompt in tiny_prompts[:2]],
            negative_prompt=[negative_prompt] * 2,
            latents=noise,
            height=64,
            width=64,
            num_inference_steps=settings.sampling_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=0,
            output_type="np",
        ).images
        return [(image * 255).round().astype(int) for image in images]

    without = theirs()
    pipeline.load_lora_weights(tuned.checkpoint)
    for picture, with_lora, plain in zip(pixels(ours.folder), theirs(), without, strict=True):
        assert np.abs(with_lora - picture.astype(int)).max() <= 1
        assert np.abs(plain - picture.astype(int)).max() > 1  # the LoRA does something


def test_an_interrupted_folder_is_finished_bit_for_bit(
    base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    pictures = [Picture(f"{i}.png", prompt, 100 + i) for i, prompt in enumerate(tiny_prompts)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        assert draw(base.backbone, base.network(), pictures, SETTINGS, folder, micro_batch=2).kept == 0
    (cut / "2.png").unlink()
    (cut / "5.png").write_bytes((whole / "5.png").read_bytes()[:200])
    untouched = (cut / "0.png").stat().st_mtime_ns, (cut / "3.png").stat().st_mtime_ns
    again = draw(base.backbone, base.network(), pictures, SETTINGS, cut, micro_batch=2)
    assert (again.kept, again.changed) == (4, ("5.png",))
    assert untouched == ((cut / "0.png").stat().st_mtime_ns, (cut / "3.png").stat().st_mtime_ns)
    np.testing.assert_array_equal(pixels(cut), pixels(whole))
    assert sorted(p.name for p in cut.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_a_picture_that_is_not_the_one_noted_is_drawn_again(
    base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    pictures = [Picture(f"{i}.png", prompt, 100 + i) for i, prompt in enumerate(tiny_prompts[:4])]
    folder, listed = tmp_path / "images", tmp_path / "pictures.sha256"

    def again() -> Drawn:
        return draw(base.backbone, base.network(), pictures, SETTINGS, folder, hash_list=listed)

    first = again()
    original = (folder / "1.png").read_bytes()
    assert first.kept == 0 and first.hashes["1.png"] == hashlib.sha256(original).hexdigest()
    done = subprocess.run(["sha256sum", "-c", listed.name], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.count(": OK") == 4
    shutil.copy(folder / "0.png", folder / "1.png")  # a good picture, but another one
    second = again()
    assert (second.kept, second.changed, second.hashes) == (3, ("1.png",), first.hashes)
    assert (folder / "1.png").read_bytes() == original
    # Killed after a hash was noted, before its picture got its name; or a picture put there by hand.
    listed.write_text("".join(line + "\n" for line in listed.read_text().splitlines() if "2.png" not in line) + "cut")
    assert again().changed == ("2.png",)
    assert again().kept == 4


def test_the_default_folder_is_numbered(
    base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = replace(SETTINGS, sampling_steps=1)
    folders = [sample(base, tiny_prompts[:1], settings).folder for _ in range(2)]
    assert folders == [Path("outputs/samples/tinyworld"), Path("outputs/samples/tinyworld-2")]


def test_a_folder_with_something_in_it_is_refused(base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        sample(base, tiny_prompts, SETTINGS, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_requests_without_sense_are_refused(base: OpenModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prompts FILE"):
        sample(base, [], SETTINGS, output=tmp_path / "out")
    with pytest.raises(UsageError, match="empty"):
        sample(base, [Prompt("  ")], SETTINGS, output=tmp_path / "out")
    with pytest.raises(UsageError, match="base model"):
        sample(base, [Prompt("a star")], SETTINGS, output=tmp_path / "out", compare_base=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling_steps", 0),
        ("images_per_prompt", 0),
        ("seed", -1),
        ("guidance_scale", -1.0),
        ("guidance_scale", float("nan")),
    ],
)
def test_impossible_numbers_are_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} must be"):
        SETTINGS.changed(**{name: value})


def test_a_sampler_is_used_and_a_wrong_one_named(base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path) -> None:
    for sampler in SAMPLERS:
        sample(base, tiny_prompts[:1], SETTINGS.changed(sampler=sampler), output=tmp_path / sampler)
    euler, second = (pixels(tmp_path / sampler)[0] for sampler in SAMPLERS)
    assert not np.array_equal(euler, second)
    assert json.loads((tmp_path / "dpm2m" / "sampling.json").read_text())["sampler"] == "dpm2m"
    with pytest.raises(UsageError, match="Did you mean 'euler'"):
        SETTINGS.changed(sampler="eulr")


def test_what_is_not_given_stays() -> None:
    assert SETTINGS.changed(seed=None, sampling_steps=9) == replace(SETTINGS, sampling_steps=9)


def test_a_single_prompts_pictures_form_a_square(base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path) -> None:
    settings = replace(SETTINGS, sampling_steps=1, images_per_prompt=4)
    samples = sample(base, tiny_prompts[:1], settings, output=tmp_path / "out")
    assert load_image(samples.grid).shape == (258, 258, 3)


def test_a_folder_that_cannot_be_made_is_a_plain_error(
    base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, **how: bool) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RamctlError, match=r"Folder .*new cannot be made: Permission denied"):
        sample(base, tiny_prompts[:1], SETTINGS, output=tmp_path / "new")
