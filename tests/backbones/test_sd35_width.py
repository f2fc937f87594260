"""Stable Diffusion 3.5 Medium's width (one layer of each stack, random weights): ours against diffusers' pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.random_sd35 import build_pipeline
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.config import ModelSection

PROMPTS = ["a photo of a red bench", 'a sign that says "open"']
TOKENS = 16  # of T5, fewer than in use, for the time it takes


@pytest.mark.slow
def test_the_same_noise_gives_the_pipelines_picture_at_full_width() -> None:
    torch.manual_seed(0)
    pipeline = build_pipeline(layers=1)
    pipeline.set_progress_bar_config(disable=True)
    spec = ModelSection(path="random", resolution=64, dtype="float32", max_sequence_length=TOKENS)
    ours = StableDiffusion3(pipeline, spec, torch.device("cpu"), None)
    x1 = torch.randn(2, *ours.latent_shape, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(
        prompt=PROMPTS,
        latents=x1.clone(),
        num_inference_steps=3,
        guidance_scale=4.5,
        height=64,
        width=64,
        max_sequence_length=TOKENS,
        output_type="np",
    ).images
    text = ours.encode(PROMPTS)
    assert text.tokens.shape == (2, 77 + TOKENS, 4096)
    assert text.pooled.shape == (2, 2048)
    x0 = ours.sample(ours.transformer, text, x1, steps=3, guidance_scale=4.5)
    pictures = ours.decode(x0).numpy()
    assert np.abs(pictures.astype(int) - (theirs * 255).round()).max() <= 1
    assert pictures.std() > 5  # noise, as random weights give, but not one grey
