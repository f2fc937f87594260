"""The embedded model's architecture: a Stable Diffusion 3 pipeline small enough for a laptop's CPU.

64x64 pixels become 8x8 latents of 16 channels, so the transformer reads 16 image tokens and at most 16 text tokens.
Two small CLIP text encoders, no T5. Sizes were chosen for the CPU: one image is one small fraction of a GFLOP.
"""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ramctl.tinyworld.grammar import COLORS, NUMBER_WORDS, SHAPES
from ramctl.tinyworld.renderer import SIZE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

TEXT_TOKENS = 16
TEXT_WIDTH = 128
LATENT_CHANNELS = 16
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def grammar_words() -> list[str]:
    """The words of scene prompts, one token each; everything else is spelled letter by letter."""
    plurals = [shape + "es" if shape.endswith("s") else shape + "s" for shape in SHAPES]
    numbers = ["one", *NUMBER_WORDS.values()]
    small = [
        "photo",
        "of",
        "an",
        "and",
        "sign",
        "that",
        "says",
        "left",
        "right",
        "above",
        "below",
        "the",
        "to",
    ]
    return [*SHAPES, *plurals, *COLORS, *numbers, *small]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges (letters are tokens) to which the grammar's words are added whole."""
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = [_BOS, _EOS, *characters, *(f"{character}</w>" for character in characters)]
    with tempfile.TemporaryDirectory() as folder:
        vocab = {token: index for index, token in enumerate(tokens)}
        tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_TOKENS)
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in grammar_words()])
        tokenizer.save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text encoder of width 128 for that tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_null_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """A few-kilobyte T5 whose output is exactly zero, as the pipeline's own stand-in for an absent T5 is.

    diffusers' ``from_pretrained`` refuses a Stable Diffusion 3 folder whose third encoder is null unless the caller
    passes ``text_encoder_3=None``; with this part in it the folder loads without arguments and gives the same pictures.
    """
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    width = 2 * TEXT_WIDTH
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    return encoder, tokenizer


def build_vae() -> AutoencoderKL:
    """An f=8 autoencoder with 16 latent channels; scale and shift are set after its training."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_pipeline(*, width: int = 192, layers: int = 6, vae: AutoencoderKL | None = None) -> StableDiffusion3Pipeline:
    """The whole pipeline with fresh weights (and the given autoencoder, when there is one)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, tokenizer_2 = build_tokenizer(), build_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=SIZE // 16,
        qk_norm="rms_norm",
    )
    null_t5, null_tokenizer = build_null_t5()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=vae or build_vae(),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer_2),
        tokenizer_2=tokenizer_2,
        text_encoder_3=null_t5,
        tokenizer_3=null_tokenizer,
    )


def parameter_counts(pipeline: StableDiffusion3Pipeline) -> dict[str, int]:
    """Number of parameters of each part."""
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2")
    return {part: sum(p.numel() for p in getattr(pipeline, part).parameters()) for part in parts}


def save_pipeline(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Save as fp16 safetensors in the diffusers layout; plain ``from_pretrained(folder)`` loads it.

    The text encoders' configs are made to say float32: transformers loads a model in the dtype its config names while
    diffusers upcasts to float32, and a pipeline of two dtypes does not run.
    """
    import torch

    pipeline.to("cpu", dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        path = folder / part / "config.json"
        config = json.loads(path.read_text())
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
