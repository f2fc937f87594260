"""LoRA tensors of Stable Diffusion 3 (3.5) in the two layouts people exchange, and one form of ours between them.

``diffusers``: ``transformer.<layer>.lora_A.weight`` and ``lora_B.weight`` by the layer names of diffusers, what
``load_lora_weights`` reads. ``kohya``: ``lora_unet_<layer>.lora_down.weight``, ``.lora_up.weight`` and ``.alpha`` by
the layer names of the original MMDiT, what sd-scripts' ``networks.lora_sd3`` and ComfyUI read. The original fuses
query, key and value in one layer: their LoRAs are stacked there, block by block. A reader of either layout computes
W + alpha / rank · up @ down; files written here have the scale multiplied into ``up`` and alpha equal to the rank, so
that readers that overlook alpha come to the same weights.

Pure: tensors in, tensors out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ramctl.errors import CheckpointError

Layout = Literal["diffusers", "kohya"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

#: where diffusers keeps rank and alpha in a file's metadata.
ADAPTER_METADATA = "lora_adapter_metadata"

_DIFFUSERS, _KOHYA = "transformer.", "lora_unet_"
_BLOCK = re.compile(r"^transformer_blocks\.(\d+)\.(.+)$")
_JOINT_BLOCK = re.compile(r"^joint_blocks_(\d+)_(.+)$")

# Original layer of a joint block → the diffusers layers of a transformer block that are fused in it, in order.
_IN_BLOCK: dict[str, tuple[str, ...]] = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
_OUTSIDE: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}


def _places(table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, int, int]]:
    """diffusers layer → (original layer, its part of that, number of parts)."""
    return {part: (name, i, len(parts)) for name, parts in table.items() for i, part in enumerate(parts)}


def _flat(name: str) -> str:
    return name.replace(".", "_")


@dataclass(frozen=True)
class LowRank:
    """One layer's update, weight += up @ down.

    down: [rank, in], of a convolution [rank, in, height, width]; up: [out, rank], alpha / rank multiplied in.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it changes."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, device: torch.device | str = "cpu") -> Tensor:
        """The update in full, float32 and of the weight's shape."""
        down, up = (part.to(device, torch.float32).flatten(1) for part in (self.down, self.up))
        return (up @ down).reshape(self.shape)


#: diffusers layer name, ``transformer_blocks.0.attn.to_q``, → its update.
Updates = dict[str, LowRank]


def to_diffusers(updates: Mapping[str, LowRank]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and file metadata of the diffusers layout."""
    tensors: dict[str, Tensor] = {}
    for layer, update in updates.items():
        tensors[f"{_DIFFUSERS}{layer}.lora_A.weight"] = update.down.contiguous()
        up = update.up if update.down.dim() == 2 else update.up[:, :, None, None]
        tensors[f"{_DIFFUSERS}{layer}.lora_B.weight"] = up.contiguous()
    ranks = {layer: update.rank for layer, update in updates.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {layer: rank for layer, rank in ranks.items() if rank != common}
    adapter = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(updates),
    }
    packed = {_DIFFUSERS + key: value for key, value in adapter.items()}
    return tensors, {ADAPTER_METADATA: json.dumps(packed, sort_keys=True)}


def to_kohya(updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Tensors of the kohya (ComfyUI) layout.

    Raises:
        CheckpointError: a layer that the original model does not have.
    """
    parts: dict[str, dict[int, LowRank]] = {}
    counts: dict[str, int] = {}
    for layer, update in updates.items():
        name, part, count = _original(layer)
        parts.setdefault(name, {})[part] = _swapped(layer, update)
        counts[name] = count
    tensors: dict[str, Tensor] = {}
    for name, found in parts.items():
        fused = _stacked(found, counts[name])
        key = _KOHYA + _flat(name)
        tensors[f"{key}.lora_down.weight"] = fused.down.contiguous()
        up = fused.up if fused.down.dim() == 2 else fused.up[:, :, None, None]
        tensors[f"{key}.lora_up.weight"] = up.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(fused.rank))
    return tensors


def read_layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> tuple[Updates, Layout]:
    """The updates in a file's tensors and the layout they were in; ``where`` names the file in messages.

    Raises:
        CheckpointError: neither layout, or a key, a pair or a rank that makes no sense in it (the first is named).
    """
    keys = list(tensors)
    if any(key.startswith(_KOHYA) for key in keys):
        return _from_kohya(tensors, where), "kohya"
    if any(key.startswith(_DIFFUSERS) and ".lora_" in key for key in keys):
        return _from_diffusers(tensors, metadata, where), "diffusers"
    shown = f"its first key is {keys[0]!r}" if keys else "it is empty"
    raise CheckpointError(f"{where} is no LoRA of Stable Diffusion 3 in the diffusers or kohya layout: {shown}.")


def _from_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> Updates:
    pairs = _pairs(tensors, where, _DIFFUSERS, (".lora_A.weight", ".lora_B.weight"))
    adapter = _adapter(metadata, where)
    return {
        layer: _scaled(f"{where}: {_DIFFUSERS}{layer}", down, up, _diffusers_scale(adapter, layer, len(down), alpha))
        for layer, (down, up, alpha) in pairs.items()
    }


def _from_kohya(tensors: Mapping[str, Tensor], where: str) -> Updates:
    pairs = _pairs(tensors, where, _KOHYA, (".lora_down.weight", ".lora_up.weight"))
    updates: Updates = {}
    for name, (down, up, alpha) in pairs.items():
        layers = _diffusers_layers(name)
        if layers is None:
            raise CheckpointError(
                f"{where} belongs to another model: Stable Diffusion 3 has no layer for the key {_KOHYA}{name!s}."
            )
        fused = _scaled(f"{where}: {_KOHYA}{name}", down, up, 1.0 if alpha is None else alpha / len(down))
        if len(fused.up) % len(layers):
            raise CheckpointError(f"{where}: {_KOHYA}{name} has {len(fused.up)} outputs, which are not three layers'.")
        for layer, block in zip(layers, fused.up.chunk(len(layers)), strict=True):
            updates[layer] = _swapped(layer, _own(fused.down, block) if len(layers) > 1 else fused)
    return updates


def _pairs(
    tensors: Mapping[str, Tensor], where: str, prefix: str, ends: tuple[str, str]
) -> dict[str, tuple[Tensor, Tensor, float | None]]:
    """Layer name → (down, up, alpha or None)."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        end = next((end for end in (*ends, ".alpha") if key.endswith(end)), None)
        if end is None or not key.startswith(prefix):
            raise CheckpointError(f"{where} cannot be used: ramctl does not know what its key {key!r} means.")
        found.setdefault(key.removeprefix(prefix).removesuffix(end), {})[end] = value
    pairs = {}
    for layer, parts in found.items():
        absent = next((end for end in ends if end not in parts), None)
        if absent is not None:
            raise CheckpointError(f"{where} is not complete: it has no {prefix}{layer}{absent}.")
        alpha = float(parts[".alpha"]) if ".alpha" in parts else None
        pairs[layer] = (parts[ends[0]], parts[ends[1]], alpha)
    return pairs


def _scaled(where: str, down: Tensor, up: Tensor, scale: float) -> LowRank:
    up = up.flatten(1)
    if up.shape[1] != len(down):
        raise CheckpointError(f"{where}: the ranks of its two halves differ ({up.shape[1]} and {len(down)}).")
    return LowRank(down.float(), up.float() * scale)


def _adapter(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """The transformer's LoRA settings in a diffusers file; without any, alpha is the rank, as diffusers takes it."""
    try:
        packed = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
        adapter = {key.removeprefix(_DIFFUSERS): value for key, value in packed.items() if key.startswith(_DIFFUSERS)}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: its LoRA metadata cannot be read ({error}).") from None
    if adapter.get("use_dora"):
        raise CheckpointError(f"{where} is a DoRA, which ramctl does not apply.")
    return adapter


def _diffusers_scale(adapter: Mapping[str, Any], layer: str, rank: int, alpha: float | None) -> float:
    if alpha is None:
        patterns = adapter.get("alpha_pattern") or {}
        # peft takes the first pattern that the end of the layer's name matches.
        found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
        alpha = float(next(found, adapter.get("lora_alpha", rank)))
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)


def _original(layer: str) -> tuple[str, int, int]:
    """The original layer of a diffusers layer, its part of that and the number of parts."""
    block = _BLOCK.match(layer)
    try:
        if block is None:
            return _places(_OUTSIDE)[layer]
        name, part, count = _places(_IN_BLOCK)[block.group(2)]
        return f"joint_blocks.{block.group(1)}.{name}", part, count
    except KeyError:
        raise CheckpointError(f"The kohya layout has no place for the layer {layer!r}.") from None


def _diffusers_layers(name: str) -> list[str] | None:
    """The diffusers layers of a key of the kohya layout (without its prefix), None when there is no such layer."""
    block = _JOINT_BLOCK.match(name)
    table, rest, prefix = (_OUTSIDE, name, "")
    if block is not None:
        table, rest, prefix = (_IN_BLOCK, block.group(2), f"transformer_blocks.{block.group(1)}.")
    layers = next((parts for original, parts in table.items() if _flat(original) == rest), None)
    return None if layers is None else [prefix + layer for layer in layers]


def _stacked(parts: Mapping[int, LowRank], count: int) -> LowRank:
    """The LoRAs of layers that are fused into one: down matrices stacked, up matrices block-diagonal."""
    if count == 1:
        return parts[0]
    outputs = len(next(iter(parts.values())).up)
    up = torch.zeros(count * outputs, sum(part.rank for part in parts.values()))
    column = 0
    for index, part in sorted(parts.items()):
        up[index * outputs : (index + 1) * outputs, column : column + part.rank] = part.up
        column += part.rank
    return LowRank(torch.cat([part.down for _, part in sorted(parts.items())]), up)


def _own(down: Tensor, block: Tensor) -> LowRank:
    """One layer's part of stacked LoRAs: the inner dimensions that reach it (one, where it was never trained)."""
    used = block.any(0).nonzero()[:, 0]
    used = used if len(used) else torch.zeros(1, dtype=torch.long)
    return LowRank(down[used], block[:, used])


def _swapped(layer: str, update: LowRank) -> LowRank:
    """Halves of the outputs exchanged where the original puts (shift, scale) and diffusers (scale, shift).

    That is the last norm, and in the last block that of the text, which then has two outputs per channel, not six.
    """
    two = len(update.up) == 2 * update.down.shape[1]
    if layer == "norm_out.linear" or (layer.endswith(".norm1_context.linear") and two):
        return LowRank(update.down, torch.cat(update.up.chunk(2)[::-1]))
    return update
