"""The Stable Diffusion 3 backbone against diffusers' own pipeline, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ramctl.backbones import sd3
from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.registry import load_backbone
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.config import LoraSection, ModelSection
from ramctl.engine.samplers import Sampler
from ramctl.errors import CheckpointError, ConfigError, OutOfMemoryError
from ramctl.resources import resource_dir
from ramctl.settings import Settings

CPU = torch.device("cpu")
PROMPTS = ["a photo of a red ring", 'a sign that says "fox"']
TINY = resource_dir("models") / "tinyworld"


def load(autocast: torch.dtype | None = None, **changes: Any) -> StableDiffusion3:
    values = {"path": "models/tinyworld", "resolution": 64, "dtype": "float32", "use_t5": False, **changes}
    return StableDiffusion3.load(ModelSection(**values), CPU, autocast)


@pytest.fixture(scope="module", params=[False, True], ids=["without-t5", "with-t5"])
def pair(request: pytest.FixtureRequest) -> tuple[StableDiffusion3, Any, int]:
    """(our backbone, diffusers' pipeline, text tokens of the third encoder)."""
    from diffusers import StableDiffusion3Pipeline

    torch.set_num_threads(1)
    ours = load(use_t5=request.param)
    absent = {} if request.param else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(str(TINY), **absent)
    pipeline.set_progress_bar_config(disable=True)
    return ours, pipeline, 256 if request.param else 0


@pytest.fixture(scope="module")
def backbone() -> StableDiffusion3:
    torch.set_num_threads(1)
    return load()


def noise(backbone: StableDiffusion3, count: int = 2) -> Tensor:
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(7))


# -- parity with diffusers


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_same_noise_gives_the_pipelines_picture(pair: tuple[StableDiffusion3, Any, int], guidance: float) -> None:
    ours, pipeline, length = pair
    x1 = noise(ours)
    negative = "two blue squares"
    theirs = pipeline(
        prompt=PROMPTS,
        negative_prompt=[negative] * 2,
        latents=x1.clone(),
        num_inference_steps=3,
        guidance_scale=guidance,
        height=64,
        width=64,
        max_sequence_length=length,
        output_type="pil",
    ).images
    x0 = ours.sample(
        ours.transformer,
        ours.encode(PROMPTS),
        x1,
        steps=3,
        guidance_scale=guidance,
        negative=ours.encode([negative]),
    )
    pictures = ours.decode(x0)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (2, 64, 64, 3)
    difference = np.abs(pictures.numpy().astype(int) - np.stack([np.asarray(image) for image in theirs]))
    assert difference.max() <= 1
    assert pictures.float().std() > 10  # and they are pictures


def test_embeddings_are_the_pipelines(pair: tuple[StableDiffusion3, Any, int]) -> None:
    ours, pipeline, length = pair
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompt=PROMPTS,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=length,
    )
    text = ours.encode(PROMPTS)
    assert torch.equal(text.tokens, tokens)
    assert torch.equal(text.pooled, pooled)
    assert len(text) == 2
    assert text.tokens.shape[1] == ours.encode([""]).tokens.shape[1]
    # A prompt's embedding does not depend on the others in its batch.
    torch.testing.assert_close(ours.encode(PROMPTS[1:]).tokens[0], text.tokens[1])


def test_a_card_too_small_for_all_prompts_embeds_half_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load()
    prompts = [f"a photo of {n} stars" for n in range(70)]
    whole, embed = ours.encode(prompts), ours._encode
    sizes: list[int] = []

    def small_card(some: list[str], room: int = 40) -> TextEmbeddings:
        sizes.append(len(some))
        if len(some) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(some)

    monkeypatch.setattr(ours, "_encode", small_card)
    torch.testing.assert_close(ours.encode(prompts).tokens, whole.tokens)
    assert sizes == [64, 32, 32, 6]
    ours.encode(prompts)
    assert sizes[4:] == [32, 32, 6]  # it stays so
    monkeypatch.setattr(ours, "_encode", lambda some: small_card(some, room=0))
    with pytest.raises(OutOfMemoryError, match=r"embedding prompts.*model\.text_encoders = parked"):
        ours.encode(prompts)


# -- the velocity and the sampler


def test_velocity_is_the_transformers_output_at_a_thousand_times_t(backbone: StableDiffusion3) -> None:
    text, x = backbone.encode(PROMPTS), noise(backbone)
    t = torch.tensor([0.25, 0.75])
    ours = backbone.velocity(backbone.transformer, x, t, text)
    theirs = backbone.transformer(
        hidden_states=x,
        timestep=torch.tensor([250.0, 750.0]),
        encoder_hidden_states=text.tokens,
        pooled_projections=text.pooled,
    ).sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_cpu_gets_the_lean_attention_and_any_network_the_lean_lora() -> None:
    from ramctl.backbones.lean import CpuJointAttention, LoraLinear

    ours = load()
    ours.add_lora(ours.transformer, LoraSection(rank=2, alpha=2.0))
    processors = ours.transformer.attn_processors.values()  # type: ignore[operator, union-attr]
    assert {type(processor) for processor in processors} == {CpuJointAttention}
    assert any(isinstance(module, LoraLinear) for module in ours.transformer.modules())


def test_velocity_keeps_the_gradient_and_sampling_does_not(backbone: StableDiffusion3) -> None:
    text, x = backbone.encode(PROMPTS[:1]), noise(backbone, 1).requires_grad_()
    assert backbone.velocity(backbone.transformer, x, torch.tensor([0.5]), text).requires_grad
    drawn = backbone.sample(backbone.transformer, text, x, steps=1, guidance_scale=1.0)
    assert not drawn.requires_grad


def test_guidance_without_a_negative_uses_the_empty_prompt(backbone: StableDiffusion3) -> None:
    text, x1 = backbone.encode(PROMPTS), noise(backbone)
    implied = backbone.sample(backbone.transformer, text, x1, steps=2, guidance_scale=2.0)
    stated = backbone.sample(
        backbone.transformer, text, x1, steps=2, guidance_scale=2.0, negative=backbone.encode([""])
    )
    assert torch.equal(implied, stated)


def test_guidance_zero_is_the_negative_prompt_alone(backbone: StableDiffusion3) -> None:
    x1, other = noise(backbone), backbone.encode(["two stars"])
    zero = backbone.sample(
        backbone.transformer, backbone.encode(PROMPTS), x1, steps=2, guidance_scale=0.0, negative=other
    )
    twice = TextEmbeddings(other.tokens.expand(2, -1, -1), other.pooled.expand(2, -1))
    alone = backbone.sample(backbone.transformer, twice, x1, steps=2, guidance_scale=1.0)
    torch.testing.assert_close(zero, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["euler", "dpm2m"])
def test_guidance_acts_within_its_interval_only(backbone: StableDiffusion3, sampler: Sampler) -> None:
    text, x1 = backbone.encode(PROMPTS), noise(backbone)
    passes: list[int] = []
    watch = backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )

    def draw(interval: tuple[float, float], scale: float = 3.0) -> Tensor:
        passes.clear()
        return backbone.sample(
            backbone.transformer,
            text,
            x1,
            steps=4,
            guidance_scale=scale,
            sampler=sampler,
            guidance_interval=interval,
        )

    everywhere = draw((0.0, 1.0))
    assert passes == [4, 4, 4, 4]
    without = draw((0.0, 1.0), scale=1.0)
    assert passes == [2, 2, 2, 2]
    late = draw((0.0, 0.9))
    assert passes == [2, 4, 4, 4]  # the first level is pure noise
    assert torch.equal(draw((0.0, 0.0)), without)
    assert passes == [2, 2, 2, 2]
    watch.remove()
    assert (late - everywhere).norm() > 1e-2
    assert (late - without).norm() > 1e-2


def test_bfloat16_autocast_is_near_and_comes_out_as_float32(backbone: StableDiffusion3) -> None:
    half = load(autocast=torch.bfloat16)
    text, x, t = backbone.encode(PROMPTS), noise(backbone), torch.tensor([0.4, 0.8])
    with torch.no_grad():
        exact = backbone.velocity(backbone.transformer, x, t, text)
        near = half.velocity(half.transformer, x, t, half.encode(PROMPTS))
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    assert (near - exact).norm() < 0.03 * exact.norm()


def test_decoding_rounds_and_clamps(backbone: StableDiffusion3) -> None:
    pictures = backbone.decode(100 * noise(backbone))
    assert pictures.min() == 0
    assert pictures.max() == 255
    assert pictures.is_contiguous()
    assert pictures.device == CPU


def test_embeddings_select_and_join(backbone: StableDiffusion3) -> None:
    text = backbone.encode(PROMPTS)
    picked = text.select(torch.tensor([1, 0, 1]))
    assert torch.equal(picked.pooled, text.pooled[[1, 0, 1]])
    assert torch.equal(picked.tokens, text.tokens[[1, 0, 1]])
    both = text.joined(picked)
    assert len(both) == 5
    assert torch.equal(both.tokens[2:], picked.tokens)
    assert len(text.select(slice(1, 2))) == 1


# -- LoRA files


def test_a_lora_set_round_trips_in_diffusers_format(tmp_path: Path) -> None:
    from safetensors import safe_open

    backbone, lora = load(), LoraSection(rank=3, alpha=7.0)
    backbone.add_lora(backbone.transformer, lora)
    tensors = {n: torch.randn_like(p) for n, p in backbone.transformer.named_parameters() if p.requires_grad}
    backbone.save_set(tmp_path, "pytorch_lora_weights.safetensors", tensors, lora)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as stored:
        assert all(name.startswith("transformer.") for name in stored.keys())  # noqa: SIM118 - no dictionary
        metadata = json.dumps(stored.metadata())
    assert "lora_alpha" in metadata
    assert "7.0" in metadata
    back = backbone.read_set(tmp_path / "pytorch_lora_weights.safetensors", lora)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_an_unreadable_set_is_named(tmp_path: Path, backbone: StableDiffusion3) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"not tensors")
    for path in (tmp_path / "weights.safetensors", tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=path.name):
            backbone.read_set(path, LoraSection())


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ((), "names no layer.*lora.rank = 0"),
        (("attn.to_q", "proj"), "'proj' also names pos_embed.proj, which is no linear"),
    ],
)
def test_lora_targets_that_cannot_be_trained_are_refused(targets: tuple[str, ...], words: str) -> None:
    ours = load()
    with pytest.raises(ConfigError, match=words):
        ours.add_lora(ours.transformer, LoraSection(rank=4, target_modules=targets))


def test_lora_targets_that_match_nothing_are_refused() -> None:
    backbone = load()
    with pytest.raises(ConfigError, match=r"no linear layer of 'models/tinyworld' is named …'attn\.to_qq'"):
        backbone.add_lora(backbone.transformer, LoraSection(target_modules=("attn.to_q", "attn.to_qq")))


# -- refusals


@pytest.mark.parametrize("resolution", [65, 72, 4096])
def test_a_resolution_that_does_not_fit_is_refused(resolution: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"model\.resolution {resolution} does not fit .* multiple of 16 and at most"
    ):
        load(resolution=resolution)


def test_another_resolution_that_fits_works() -> None:
    backbone = load(resolution=32)
    assert backbone.latent_shape[1:] == (4, 4)
    x0 = backbone.sample(backbone.transformer, backbone.encode(PROMPTS), noise(backbone), steps=1, guidance_scale=1.0)
    assert backbone.decode(x0).shape == (2, 32, 32, 3)


def test_the_registry_loads_the_presets_family(tiny_settings: Settings) -> None:
    assert isinstance(load_backbone(tiny_settings.config, CPU), StableDiffusion3)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_compute_the_same_velocity_and_gradient(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ramctl.tinyworld.model import build_pipeline

    torch.manual_seed(0)
    spec = ModelSection(path="random", resolution=64, dtype="float32", use_t5=False)
    ours = StableDiffusion3(build_pipeline(width=32, layers=2), spec, CPU, None)
    ours.add_lora(ours.transformer, LoraSection(rank=4, alpha=4.0))
    text = TextEmbeddings(torch.randn(2, 16, 256), torch.randn(2, 256))
    x, t = noise(ours), torch.tensor([0.3, 0.9])

    def run() -> tuple[Tensor, Tensor]:
        ours.transformer.zero_grad()
        velocity = ours.velocity(ours.transformer, x, t, text)
        velocity.square().mean().backward()
        grads = [p.grad.flatten() for p in ours.transformer.parameters() if p.grad is not None]
        return velocity.detach(), torch.cat(grads)

    plain = run()
    monkeypatch.setattr(sd3, "_PIXELS_AT_ONCE", 2 * 64**2)
    latents = torch.randn(3, *ours.latent_shape)  # two go through the compiled decoder, the third one does not
    pictures = ours.decode(latents)
    if checkpointing:
        ours.enable_gradient_checkpointing(ours.transformer)
    ours.compile(ours.transformer)
    compiled = run()
    assert np.abs(ours.decode(latents).numpy().astype(int) - pictures.numpy()).max() <= 1
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2
    for one, other in zip(plain, compiled, strict=True):
        assert (one - other).norm() / one.norm() < 1e-4
