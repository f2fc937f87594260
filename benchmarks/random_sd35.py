"""A diffusers folder with Stable Diffusion 3.5 Medium's architecture and random weights.

    python -m benchmarks.random_sd35 FOLDER [--device cuda] [--without-t5] [--layers 2]

The official weights are gated; speed, memory and the plumbing of full-size runs do not depend on their values. Sizes
are those of ``ramctl/backbones/sd35_medium.py``; 16 GB in bfloat16. Tokenizers split into characters, so a prompt has
more tokens than it would; the passes are of the same fixed lengths.
"""

from __future__ import annotations

import argparse
import string
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ramctl.backbones.sd35_medium import CLIP_BOS, CLIP_EOS, CLIP_TOKENS, configurations

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Tokenizer


def build_pipeline(*, layers: int | None = None, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """The pipeline, on the current default device and in the current default dtype.

    Args:
        layers: layers of the transformer and of each text encoder; None is the full 24, 12, 32 and 24.
        with_t5: without it the folder has no third text encoder, and ``model.use_t5`` must be false.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import T5Config, T5EncoderModel

    parts = configurations(layers=layers, with_t5=with_t5)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_config(parts["transformer"]),
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(parts["scheduler"]),
        vae=AutoencoderKL.from_config(parts["vae"]),
        text_encoder=_build_clip(parts["text_encoder"]),
        tokenizer=build_clip_tokenizer(),
        text_encoder_2=_build_clip(parts["text_encoder_2"]),
        tokenizer_2=build_clip_tokenizer(),
        text_encoder_3=T5EncoderModel(T5Config.from_dict(parts["text_encoder_3"])) if with_t5 else None,
        tokenizer_3=build_t5_tokenizer() if with_t5 else None,
    )


def _build_clip(configuration: dict[str, Any]) -> CLIPTextModelWithProjection:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configuration))


def build_clip_tokenizer() -> CLIPTokenizer:
    """Characters as tokens, with the official special tokens' numbers."""
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + string.punctuation
    vocab = {token: i for i, token in enumerate([*characters, *(f"{c}</w>" for c in characters)])}
    vocab |= {"<|startoftext|>": CLIP_BOS, "<|endoftext|>": CLIP_EOS}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_TOKENS)


def build_t5_tokenizer() -> T5Tokenizer:
    """Characters as tokens."""
    from transformers import T5Tokenizer

    characters = string.ascii_letters + string.digits + string.punctuation + "▁"
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in characters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


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
