"""CLIP weights, from the hub's folder layout or from open_clip's, into transformers' ``CLIPModel``.

Nothing is guessed: every tensor of the model must be in the file and every tensor of the file in the model.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ramctl.errors import ScorerError
from ramctl.weights import command_for, weight_file

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

#: Counters that older files carry along, and open_clip's causal mask: derived, not learned.
_NOT_WEIGHTS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "attn_mask")


@dataclass(frozen=True)
class LoadedClip:
    """A ``CLIPModel`` on the CPU in the file's precision, and exp of its logit scale."""

    model: Any
    logit_scale: float


def load_hub_clip(name: str) -> LoadedClip:
    """The CLIP of a weights entry in the hub's layout: ``config.json`` and ``model.safetensors``.

    Raises:
        MissingDependencyError: a file is not there.
        ScorerError: one cannot be read, or they do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import CLIPConfig

    config_file, model_file = weight_file(name, CONFIG_FILE), weight_file(name, MODEL_FILE)
    try:
        config = CLIPConfig.from_dict(json.loads(config_file.read_text(encoding="utf-8")))
    except Exception as error:  # transformers' checks raise classes of their own
        raise _unreadable(config_file, name, error) from None
    try:
        state = load_file(model_file)
    except (OSError, SafetensorError) as error:
        raise _unreadable(model_file, name, error) from None
    return build_clip(config, state, model_file)


def load_open_clip(
    name: str, file: str, *, activation: str, vision_head_width: int, text_head_width: int
) -> LoadedClip:
    """A CLIP in open_clip's layout, under the key ``state_dict`` of a ``.pt`` file; its sizes are read off the tensors.

    Args:
        name: the weights entry. file: the file in it.
        activation: of the MLPs, by transformers' name (``gelu``, ``quick_gelu``); the file does not tell.
        vision_head_width: width of an attention head of the image tower; the file does not tell.
        text_head_width: the same for the text tower.

    Raises:
        MissingDependencyError: the file is not there.
        ScorerError: it cannot be read, or is no such checkpoint.
    """
    path = weight_file(name, file)
    content = read_tensors(path, name)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or "visual.conv1.weight" not in state:
        raise ScorerError(f"{path} holds no CLIP of open_clip's under 'state_dict': {command_for(name)}")
    config = _open_clip_config(state, path, activation, vision_head_width, text_head_width)
    return build_clip(config, convert_open_clip(state), path)


def read_tensors(path: Path, name: str) -> Any:
    """A ``.pt`` file of tensors, on the CPU wherever they were saved from; no code in it is run.

    Raises:
        ScorerError: it cannot be read, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise _unreadable(path, name, error) from None


def build_clip(config: Any, state: Mapping[str, Tensor], file: Path) -> LoadedClip:
    """``CLIPModel`` of ``config`` with the tensors of ``state`` (transformers' names), strictly.

    Raises:
        ScorerError: a tensor is missing, unknown or of another shape; ``file`` is named.
    """
    from transformers import CLIPModel

    weights = {key: value for key, value in state.items() if key not in _NOT_WEIGHTS}
    # Without memory of its own: the file's tensors take the places, and no time goes into random weights.
    with torch.device("meta"):
        model = CLIPModel(config)
    try:
        outcome = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise ScorerError(f"{file} does not fit its configuration: {str(error).splitlines()[-1].strip()}") from None
    if outcome.missing_keys or outcome.unexpected_keys:
        raise ScorerError(
            f"{file} does not fit its configuration: {_named('missing', outcome.missing_keys)}, "
            f"{_named('unknown', outcome.unexpected_keys)}."
        )
    for tower in (model.text_model, model.vision_model):
        positions = tower.embeddings.position_embedding.num_embeddings
        tower.embeddings.position_ids = torch.arange(positions).unsqueeze(0)
    model.eval().requires_grad_(False)
    return LoadedClip(model, math.exp(float(weights["logit_scale"].float())))


def convert_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' names.

    The two lay the same network out alike, but for the attention's three input projections, which open_clip stacks,
    and the two final projections, which it stores transposed. Keys without a counterpart are kept as they are.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _TRANSPOSED:
            converted[_TRANSPOSED[key]] = value.T.contiguous()
        elif ".resblocks." in key:
            converted.update(_convert_layer(key, value))
        else:
            converted[_RENAMED.get(key, key)] = value
    return converted


_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_RENAMED = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    # transformers spells it so.
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def _convert_layer(key: str, value: Tensor) -> dict[str, Tensor]:
    tower, _, rest = key.partition("transformer.resblocks.")
    number, _, part = rest.partition(".")
    prefix = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{number}"
    module, _, kind = part.rpartition(".")
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.rpartition("_")[2]
        names = (f"{prefix}.self_attn.{projection}_proj.{kind}" for projection in "qkv")
        return dict(zip(names, value.chunk(3), strict=True))
    return {f"{prefix}.{_LAYER_PARTS.get(module, module)}.{kind}": value}


def _open_clip_config(
    state: Mapping[str, Tensor], file: Path, activation: str, vision_head_width: int, text_head_width: int
) -> Any:
    """The ``CLIPConfig`` of a checkpoint whose tensors are ``state``."""
    from transformers import CLIPConfig

    try:
        vocabulary, text_width = state["token_embedding.weight"].shape
        vision_width, _, patch, _ = state["visual.conv1.weight"].shape
        grid = math.isqrt(state["visual.positional_embedding"].shape[0] - 1)
        dimensions = state["text_projection"].shape[1]
        sizes = {
            "text_config": {
                **_tower("transformer.", state, text_width, text_head_width),
                "vocab_size": vocabulary,
                "max_position_embeddings": state["positional_embedding"].shape[0],
                # The end token has the highest id, and transformers seeks it as such when told 2.
                "eos_token_id": 2,
            },
            "vision_config": {
                **_tower("visual.transformer.", state, vision_width, vision_head_width),
                "image_size": grid * patch,
                "patch_size": patch,
            },
        }
    except (KeyError, ValueError, AttributeError) as error:
        raise ScorerError(f"{file} is no CLIP checkpoint of open_clip's: {type(error).__name__} {error}") from None
    shared = {"projection_dim": dimensions, "hidden_act": activation, "layer_norm_eps": 1e-5}
    return CLIPConfig(projection_dim=dimensions, **{key: {**tower, **shared} for key, tower in sizes.items()})


def _tower(prefix: str, state: Mapping[str, Tensor], width: int, head_width: int) -> dict[str, int]:
    if width % head_width:
        raise ValueError(f"width {width} is no multiple of {head_width}")
    blocks = f"{prefix}resblocks."
    layers = {key.removeprefix(blocks).partition(".")[0] for key in state if key.startswith(blocks)}
    return {
        "hidden_size": width,
        "intermediate_size": state[f"{blocks}0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // head_width,
    }


def _named(what: str, keys: Iterable[str], limit: int = 3) -> str:
    found = sorted(keys)
    shown = ", ".join(found[:limit]) + (" …" if len(found) > limit else "")
    return f"{len(found)} {what} tensors" + (f" ({shown})" if found else "")


def _unreadable(file: Path, name: str, error: Exception) -> ScorerError:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ScorerError(f"{file} cannot be read ({first_line}): {command_for(name)} --verify")
