"""Pictures depend on their prompt, their seed and the weights, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.engine.rollout import Endpoints, auto_micro_batch, generate
from ramctl.settings import Settings

PROMPTS = ["a ring", "a red square", "a ring", "two stars", "a ring"]
SEEDS = [11, 22, 33, 44, 55]


@pytest.fixture(scope="module")
def backbone(tiny_settings: Settings) -> StableDiffusion3:
    torch.set_num_threads(1)
    return StableDiffusion3.load(tiny_settings.config.model, torch.device("cpu"), None)


def draw(
    backbone: StableDiffusion3,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = SEEDS,
    *,
    micro_batch: int = 0,
    guidance_scale: float = 2.0,
    negative_prompt: str = "",
) -> Endpoints:
    return generate(
        backbone,
        backbone.transformer,
        prompts,
        seeds,
        steps=2,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        micro_batch=micro_batch,
    )


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_do_not_change_the_endpoints(backbone: StableDiffusion3, micro_batch: int) -> None:
    """Float32 in another order: 1e-4 of a latent, one grey level of a picture."""
    whole, parts = draw(backbone), draw(backbone, micro_batch=micro_batch)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=0, atol=1e-4)
    assert np.abs(parts.images.astype(int) - whole.images).max() <= 1


def test_a_picture_does_not_depend_on_its_neighbours(backbone: StableDiffusion3) -> None:
    whole = draw(backbone)
    order = [3, 0, 2]
    some = draw(backbone, [PROMPTS[i] for i in order], [SEEDS[i] for i in order])
    torch.testing.assert_close(some.latents, whole.latents[order], rtol=0, atol=1e-4)
    assert np.abs(some.images.astype(int) - whole.images[order]).max() <= 1


def test_seed_prompt_guidance_and_negative_prompt_matter(backbone: StableDiffusion3) -> None:
    base = draw(backbone, ["a ring"], [1]).latents
    for other in (
        draw(backbone, ["a ring"], [2]),
        draw(backbone, ["a star"], [1]),
        draw(backbone, ["a ring"], [1], guidance_scale=1.0),
        draw(backbone, ["a ring"], [1], negative_prompt="a blue square"),
    ):
        assert (other.latents - base).abs().max() > 1e-2


def test_each_different_prompt_is_embedded_once(backbone: StableDiffusion3, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[list[str]] = []
    encode = backbone.encode

    def noted(prompts: Sequence[str]) -> TextEmbeddings:
        encoded.append(list(prompts))
        return encode(prompts)

    monkeypatch.setattr(backbone, "encode", noted)
    drawn = draw(backbone)
    assert encoded == [["a ring", "a red square", "two stars"], [""]]
    assert drawn.text_row.tolist() == [0, 1, 0, 2, 0]
    assert len(drawn.text) == 3
    encoded.clear()
    draw(backbone, guidance_scale=1.0)
    assert encoded == [["a ring", "a red square", "two stars"]]  # without guidance no second pass


def test_shapes_and_progress(backbone: StableDiffusion3) -> None:
    counts: list[int] = []
    drawn = generate(
        backbone,
        backbone.transformer,
        PROMPTS,
        SEEDS,
        steps=1,
        guidance_scale=1.0,
        micro_batch=2,
        drawn=lambda pictures: counts.append(len(pictures)),
    )
    assert counts == [2, 2, 1]
    assert len(drawn) == 5
    assert drawn.latents.shape == (5, *backbone.latent_shape)
    assert drawn.latents.dtype == torch.float32
    assert drawn.images.shape == (5, 64, 64, 3)
    assert drawn.images.dtype == np.uint8
    assert not drawn.latents.requires_grad


def test_automatic_micro_batches_follow_the_number_of_image_tokens() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    at_512 = (16, 64, 64)
    assert auto_micro_batch(at_512, gpu, training=True) == 16
    assert auto_micro_batch(at_512, gpu, training=False) == 64
    assert auto_micro_batch(at_512, cpu, training=True) == 1
    assert auto_micro_batch(at_512, cpu, training=False) == 4
    assert auto_micro_batch((8, 16, 16), cpu, training=True) == 64
    assert auto_micro_batch((16, 8, 8), cpu, training=True) == 256
    assert auto_micro_batch((16, 8, 8), cpu, training=False) == 256
    assert auto_micro_batch((16, 256, 256), cpu, training=True) == 1
