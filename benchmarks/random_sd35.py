"""A diffusers folder with Stable Diffusion 3.5 Medium's architecture and random weights.

    python -m benchmarks.random_sd35 FOLDER [--device cuda] [--without-t5] [--layers 2]

The official weights are gated; speed, memory and the plumbing of full-size runs do not depend on their values. Sizes
are those of the published configuration files: 24 joint blocks of width 1536 (13 with a second image attention), CLIP
ViT-L and ViT-bigG text encoders, the encoder of T5 v1.1 XXL, the 16-channel autoencoder; 16 GB in bfloat16. Tokenizers
split into characters, so a prompt has more tokens than it would; the passes are of the same fixed lengths.
"""

from __future__ import annotations

import argparse
import string
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

_BOS, _EOS = 49_406, 49_407


def build_pipeline(*, layers: int | None = None, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """The pipeline, on the current default device and in the current default dtype.

    Args:
        layers: layers of the transformer and of each text encoder; None is the full 24, 12, 32 and 24.
        with_t5: without it the folder has no third text encoder, and ``model.use_t5`` must be false.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return StableDiffusion3Pipeline(
        transformer=build_transformer(layers or 24),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=build_vae(),
        text_encoder=build_clip(layers or 12, width=768, heads=12, activation="quick_gelu"),
        tokenizer=build_clip_tokenizer(),
        text_encoder_2=build_clip(layers or 32, width=1280, heads=20, activation="gelu"),
        tokenizer_2=build_clip_tokenizer(),
        text_encoder_3=build_t5(layers or 24) if with_t5 else None,
        tokenizer_3=build_t5_tokenizer() if with_t5 else None,
    )


def build_transformer(layers: int) -> SD3Transformer2DModel:
    """The MMDiT-X of width 1536."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(min(13, layers))),
        qk_norm="rms_norm",
    )


def build_vae() -> AutoencoderKL:
    """The f=8 autoencoder with 16 latent channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_clip(layers: int, *, width: int, heads: int, activation: str) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=49_408,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=77,
            hidden_act=activation,
            bos_token_id=_BOS,
            eos_token_id=_EOS,
            pad_token_id=_EOS,
        )
    )


def build_t5(layers: int) -> T5EncoderModel:
    """The encoder of T5 v1.1 XXL."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=32_128,
            d_model=4096,
            d_ff=10_240,
            d_kv=64,
            num_heads=64,
            num_layers=layers,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def build_clip_tokenizer() -> CLIPTokenizer:
    """Characters as tokens, with the official special tokens' numbers."""
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    vocab = {token: i for i, token in enumerate([*characters, *(f"{c}</w>" for c in characters)])}
    vocab |= {"<|startoftext|>": _BOS, "<|endoftext|>": _EOS}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def build_t5_tokenizer() -> T5Tokenizer:
    """Characters as tokens."""
    from transformers import T5Tokenizer

    characters = string.ascii_letters + string.digits + string.punctuation + "▁"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in characters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def write_configs(folder: Path, **options: Any) -> None:
    """The folder without its weights: what sizes, memory and ``--dry-run`` are worked out from."""
    with torch.device("meta"):
        pipeline = build_pipeline(**options)
    for name, part in pipeline.components.items():
        if part is None:
            continue
        keep = getattr(part, "save_config", None) or getattr(part, "save_pretrained", None)
        if isinstance(part, torch.nn.Module) and hasattr(part, "config") and not hasattr(part, "save_config"):
            part.config.save_pretrained(folder / name)
        elif keep is not None:
            keep(folder / name)
    pipeline.save_config(folder)


def main() -> None:
    """Write the folder and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without-t5", action="store_true")
    parser.add_argument("--layers", type=int, default=None, help="of every stack; default: the full numbers")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(arguments.seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(arguments.device):
        pipeline = build_pipeline(layers=arguments.layers, with_t5=not arguments.without_t5)
    pipeline.save_pretrained(arguments.folder)
    size = sum(file.stat().st_size for file in arguments.folder.rglob("*") if file.is_file())
    print(f"{arguments.folder}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
