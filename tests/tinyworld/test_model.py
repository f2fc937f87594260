"""The shipped model: its size, its format, and that plain diffusers draws the same with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ramctl.resources import resource_dir
from ramctl.tinyworld.grammar import all_scenes, scene_prompt, sign_prompt
from ramctl.tinyworld.model import TEXT_TOKENS, build_tokenizer, grammar_words

FOLDER = resource_dir("models") / "tinyworld"


def test_the_folder_is_small_and_half_precision() -> None:
    from safetensors import safe_open

    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 35e6
    for part in ("transformer", "vae"):
        with safe_open(FOLDER / part / "diffusion_pytorch_model.safetensors", "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_card_says_how_the_model_was_made() -> None:
    facts = json.loads((FOLDER / "pretraining.json").read_text(encoding="utf-8"))
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert str(facts["settings"]["seed"]) in card
    assert f"{facts['minutes']:.2f}" in card
    assert "python -m ramctl.tinyworld.pretrain" in card


def test_every_prompt_fits_the_text_encoder() -> None:
    tokenizer = build_tokenizer()
    texts = [scene_prompt(scene).text for scenes in all_scenes().values() for scene in scenes]
    lengths = [len(ids) for ids in tokenizer([*texts, sign_prompt("word").text]).input_ids]
    assert max(lengths) <= TEXT_TOKENS


def test_words_are_spelled_and_the_grammar_is_not() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize('a sign that says "oven"')[-6:] == ['"</w>', "o", "v", "e", "n</w>", '"</w>']
    assert all(len(tokenizer.tokenize(word)) == 1 for word in grammar_words())


def test_plain_from_pretrained_loads_it_and_the_null_t5_changes_nothing() -> None:
    from diffusers import StableDiffusion3Pipeline

    def picture(**absent: None) -> np.ndarray:
        pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER, **absent)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline("a photo of a red circle", num_inference_steps=2, generator=generator, output_type="np")
        return drawn.images

    whole = picture()
    assert whole.shape == (1, 64, 64, 3)
    np.testing.assert_array_equal(whole, picture(text_encoder_3=None, tokenizer_3=None))


@pytest.mark.slow
def test_the_pretraining_script_makes_such_a_folder(tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    from ramctl.tinyworld.pretrain import Settings, pretrain

    settings = Settings(pictures=64, vae_steps=2, vae_batch=8, steps=3, batch=8, padded_share=0.4)
    pretrain(tmp_path / "model", settings, processes=1, vae_from=None, compiled=False, minutes=5.0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    shipped = json.loads((FOLDER / "transformer" / "config.json").read_text(encoding="utf-8"))
    assert pipeline.transformer.config.num_layers == shipped["num_layers"]
    assert all(torch.isfinite(p).all() for p in pipeline.transformer.parameters())
