"""Small networks with random weights in the files and layouts of the official ones; the real code loads them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ramctl.scorers.geneval import mask2former, mmdet_checkpoint

#: transformers' names to MMDetection 2's, written from the other side than the package's own table.
_TO_MMDETECTION = (
    (r"model\.pixel_level_module\.encoder\.swin\.encoder\.layers\.", "backbone.stages."),
    (r"model\.pixel_level_module\.encoder\.swin\.embeddings\.patch_embeddings\.", "backbone.patch_embed."),
    (r"model\.pixel_level_module\.encoder\.swin\.embeddings\.norm", "backbone.patch_embed.norm"),
    (r"model\.pixel_level_module\.encoder\.hidden_states_norms\.stage(\d)", lambda m: f"backbone.norm{int(m[1]) - 1}"),
    (r"^(backbone.*)\.attention\.relative_position_bias\.", r"\1.attn.w_msa."),
    (r"^(backbone.*)\.attention\.o_proj", r"\1.attn.w_msa.proj"),
    (r"^(backbone.*)\.attention\.([qkv])_proj", r"\1.attn.w_msa.qkv@\2"),
    (r"^(backbone.*)\.layernorm_before", r"\1.norm1"),
    (r"^(backbone.*)\.layernorm_after", r"\1.norm2"),
    (r"^(backbone.*)\.mlp\.fc1", r"\1.ffn.layers.0.0"),
    (r"^(backbone.*)\.mlp\.fc2", r"\1.ffn.layers.1"),
    (r"model\.pixel_level_module\.decoder\.level_embed", "panoptic_head.pixel_decoder.level_encoding.weight"),
    (r"model\.pixel_level_module\.decoder\.", "panoptic_head.pixel_decoder."),
    (r"pixel_decoder\.input_projections\.(\d)\.0", r"pixel_decoder.input_convs.\1.conv"),
    (r"pixel_decoder\.input_projections\.(\d)\.1", r"pixel_decoder.input_convs.\1.gn"),
    (r"pixel_decoder\.adapter_1\.0", "pixel_decoder.lateral_convs.0.conv"),
    (r"pixel_decoder\.adapter_1\.1", "pixel_decoder.lateral_convs.0.gn"),
    (r"pixel_decoder\.layer_1\.0", "pixel_decoder.output_convs.0.conv"),
    (r"pixel_decoder\.layer_1\.1", "pixel_decoder.output_convs.0.gn"),
    (r"pixel_decoder\.mask_projection", "pixel_decoder.mask_feature"),
    (r"(pixel_decoder.*)\.self_attn\.", r"\1.attentions.0."),
    (r"(pixel_decoder.*)\.self_attn_layer_norm", r"\1.norms.0"),
    (r"(pixel_decoder.*)\.final_layer_norm", r"\1.norms.1"),
    (r"model\.transformer_module\.queries_embedder", "panoptic_head.query_embed"),
    (r"model\.transformer_module\.queries_features", "panoptic_head.query_feat"),
    (r"model\.transformer_module\.level_embed", "panoptic_head.level_embed"),
    (r"model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.0\.0", "panoptic_head.mask_embed.0"),
    (r"model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.1\.0", "panoptic_head.mask_embed.2"),
    (r"model\.transformer_module\.decoder\.mask_predictor\.mask_embedder\.2\.0", "panoptic_head.mask_embed.4"),
    (r"model\.transformer_module\.decoder\.layernorm", "panoptic_head.transformer_decoder.post_norm"),
    (r"model\.transformer_module\.decoder\.", "panoptic_head.transformer_decoder."),
    (r"(transformer_decoder.*)\.cross_attn\.", r"\1.attentions.0.attn."),
    (r"(transformer_decoder.*)\.cross_attn_layer_norm", r"\1.norms.0"),
    (r"(transformer_decoder.*)\.self_attn\.out_proj", r"\1.attentions.1.attn.out_proj"),
    (r"(transformer_decoder.*)\.self_attn\.([qkv])_proj\.(\w+)", r"\1.attentions.1.attn.in_proj_\3@\2"),
    (r"(transformer_decoder.*)\.self_attn_layer_norm", r"\1.norms.1"),
    (r"(transformer_decoder.*)\.final_layer_norm", r"\1.norms.2"),
    (r"(panoptic_head.*)\.fc1", r"\1.ffns.0.layers.0.0"),
    (r"(panoptic_head.*)\.fc2", r"\1.ffns.0.layers.1"),
    (r"^class_predictor", "panoptic_head.cls_embed"),
)
_TO_VERSION_3 = (
    (r"(pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0", r"\1.self_attn"),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.0", r"\1.cross_attn"),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.1", r"\1.self_attn"),
    (r"(panoptic_head.*)\.ffns\.0", r"\1.ffn"),
)
_UNUSED = ("model.pixel_level_module.encoder.swin.layernorm.", "criterion.")


def mmdetection_state(state: dict[str, Any], version: int = 2) -> dict[str, Any]:
    """A transformers state dict as MMDetection 2.x or 3.x would save it."""
    import torch

    result: dict[str, Any] = {}
    for key, tensor in state.items():
        if key.startswith(_UNUSED):
            continue
        for pattern, replacement in (*_TO_MMDETECTION, *(_TO_VERSION_3 if version == 3 else ())):
            key = re.sub(pattern, replacement, key)
        if ".downsample." in key:  # position-major (columns first) to channel-major (rows first)
            columns_rows_channels = tensor.reshape(*tensor.shape[:-1], 2, 2, -1)
            tensor = columns_rows_channels.movedim(-1, -3).transpose(-1, -2).reshape(tensor.shape)
        name, _, part = re.sub(r"@([qkv])(.*)", r"\2@\1", key).partition("@")
        # The decoder has its key, value and query in that order.
        result.setdefault(name, {})[part or "one"] = tensor
    fused = {
        name: parts["one"] if "one" in parts else torch.cat([parts[letter] for letter in "qkv"])
        for name, parts in result.items()
    }
    tables = [name for name in fused if name.endswith("relative_position_bias_table")]
    for name in tables:  # a buffer that MMDetection saves
        fused[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    return fused


def tiny_network_config() -> Any:
    """The architecture of the official network with everything made small but the classes."""
    from transformers import Mask2FormerConfig, SwinConfig

    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 2, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=80,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=3,
        num_queries=20,
        num_attention_heads=4,
    )


def random_network(config: Any, seed: int = 0, sharpness: float = 30.0) -> Any:
    """A network with random weights, sharpened so that some queries are sure of a class."""
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
            model.class_predictor.weight.mul_(sharpness)
    return model


@pytest.fixture(scope="session")
def tiny_weights_root(tmp_path_factory: pytest.TempPathFactory, _clip_files_once: Any) -> Path:
    """A weights folder with a small detector (MMDetection 2 layout) and a small CLIP; to change it, copy it."""
    import torch

    root = tmp_path_factory.mktemp("weights")
    folder = root / mmdet_checkpoint.ENTRY
    folder.mkdir()
    state = mmdetection_state(random_network(tiny_network_config()).state_dict())
    torch.save({"meta": {"CLASSES": ("person",)}, "state_dict": state}, folder / mmdet_checkpoint.FILE)
    shutil.copytree(_clip_files_once.root / "clip-vit-l14", root / "clip-vit-l14")
    return root


@pytest.fixture
def tiny_store(tiny_weights_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of :func:`tiny_weights_root`, in use, with the architecture to match."""
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tiny_weights_root))
    monkeypatch.setattr(mask2former, "network_config", tiny_network_config)
    return tiny_weights_root


@pytest.fixture
def as_mmdetection() -> Any:
    """:func:`mmdetection_state`."""
    return mmdetection_state


@pytest.fixture
def make_network() -> Any:
    """:func:`random_network` of :func:`tiny_network_config`, or of another configuration."""
    return lambda config=None, **options: random_network(config or tiny_network_config(), **options)
