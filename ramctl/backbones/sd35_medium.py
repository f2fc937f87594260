"""The architecture of Stable Diffusion 3.5 Medium, as its published configuration files give it; no weights.

The official weights are gated, but sizes and memory depend on shapes alone: ``ramctl train --dry-run`` plans with
these where the model is not there, and ``benchmarks/random_sd35.py`` fills them with random weights. 24 joint blocks of
width 1536 (13 with a second image attention), CLIP ViT-L and ViT-bigG text encoders, the encoder of T5 v1.1 XXL, and
an f=8 autoencoder with 16 latent channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HUB_ID = "stabilityai/stable-diffusion-3.5-medium"

#: Ids of the CLIP tokenizers' first and last token.
CLIP_BOS, CLIP_EOS = 49_406, 49_407
CLIP_TOKENS = 77

#: model_index.json's libraries and classes.
_CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
}


def configurations(*, layers: int | None = None, with_t5: bool = True) -> dict[str, dict[str, Any]]:
    """The configuration of each part, by the name of its folder; the classes' defaults are left out.

    Args:
        layers: layers of the transformer and of each text encoder; None is the full 24, 12, 32 and 24.
        with_t5: without it there is no third text encoder, and ``model.use_t5`` must be false.
    """
    parts = {
        "transformer": _transformer(layers or 24),
        "scheduler": {"num_train_timesteps": 1000, "shift": 3.0},
        "vae": _vae(),
        "text_encoder": _clip(layers or 12, width=768, heads=12, activation="quick_gelu"),
        "text_encoder_2": _clip(layers or 32, width=1280, heads=20, activation="gelu"),
    }
    if with_t5:
        parts["text_encoder_3"] = _t5(layers or 24)
    for name, part in parts.items():
        library, class_name = _CLASSES[name]
        if library == "diffusers":
            part["_class_name"] = class_name
    return parts


def write_configs(folder: Path, *, layers: int | None = None, with_t5: bool = True) -> None:
    """A diffusers folder of the architecture without weights and vocabularies; see :func:`configurations`."""
    parts = configurations(layers=layers, with_t5=with_t5)
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline"}
    for name, part in parts.items():
        index[name] = _CLASSES[name]
        _write(folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json"), part)
    _write(folder / "tokenizer" / "tokenizer_config.json", {"model_max_length": CLIP_TOKENS})
    _write(folder / "model_index.json", index)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _transformer(layers: int) -> dict[str, Any]:
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(min(13, layers))),
        "qk_norm": "rms_norm",
    }


def _vae() -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _clip(layers: int, *, width: int, heads: int, activation: str) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": 49_408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": CLIP_TOKENS,
        "hidden_act": activation,
        "bos_token_id": CLIP_BOS,
        "eos_token_id": CLIP_EOS,
        "pad_token_id": CLIP_EOS,
    }


def _t5(layers: int) -> dict[str, Any]:
    return {
        "model_type": "t5",
        "vocab_size": 32_128,
        "d_model": 4096,
        "d_ff": 10_240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": layers,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }
