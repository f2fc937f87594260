"""MMDetection's Mask2Former checkpoint as weights of transformers' Mask2FormerForUniversalSegmentation.

The two libraries build the same network and name its weights differently. Every weight the network needs is looked
up under MMDetection's name; one that is missing, of another shape, or left over stops the loading, because a
detector with a random layer still answers, only wrongly.

Sources of the names: MMDetection 2.28.2 and 3.3.0, transformers 5.17 to 5.23 (whose names for these modules agree).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramctl.errors import ScorerError

if TYPE_CHECKING:
    from torch import Tensor

#: The entry of the weights manifest that holds the official file.
ENTRY = "mask2former-swin-s-coco"
FILE = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
_REMEDY = f"Get the official file: ramctl download-weights {ENTRY}"


@dataclass(frozen=True)
class _Rule:
    """Where the weights whose transformers name matches ``target`` come from.

    source: MMDetection's name, with the target's groups as ``\\1`` …; third: which third of a fused query-key-value
    projection it is; change: what else is done to the tensor.
    """

    target: re.Pattern[str]
    source: str
    third: int | None = None
    change: Callable[[Tensor], Tensor] | None = None


def merge_order(weight: Tensor) -> Tensor:
    """Patch-merging weights with their 4·C inputs in transformers' order; [4C] (norm) or [2C, 4C] (reduction).

    Both libraries lay a 2x2 block of patches side by side. MMDetection unfolds it, which keeps the four values of a
    channel together, in the order (0, 0), (0, 1), (1, 0), (1, 1) of (row, column); transformers keeps the channels of
    a patch together and goes down the columns: (0, 0), (1, 0), (0, 1), (1, 1).
    """
    by_channel = weight.reshape(*weight.shape[:-1], -1, 2, 2)  # channel, row, column
    return by_channel.transpose(-3, -1).reshape(weight.shape)  # column, row, channel


def _rules() -> Iterator[_Rule]:
    def rule(target: str, source: str, **more: Any) -> _Rule:
        return _Rule(re.compile(target), source, **more)

    swin, backbone = r"model\.pixel_level_module\.encoder\.swin\.", "backbone."
    yield rule(swin + r"embeddings\.patch_embeddings\.projection\.(\w+)", backbone + r"patch_embed.projection.\1")
    yield rule(swin + r"embeddings\.norm\.(\w+)", backbone + r"patch_embed.norm.\1")
    stage, there = swin + r"encoder\.layers\.(\d+)\.", backbone + r"stages.\1."
    block, at = stage + r"blocks\.(\d+)\.", there + r"blocks.\2."
    for third, letter in enumerate("qkv"):
        yield rule(block + rf"attention\.{letter}_proj\.(\w+)", at + r"attn.w_msa.qkv.\3", third=third)
    yield rule(block + r"attention\.o_proj\.(\w+)", at + r"attn.w_msa.proj.\3")
    table = "relative_position_bias_table"
    yield rule(block + rf"attention\.relative_position_bias\.{table}", at + f"attn.w_msa.{table}")
    yield rule(block + r"layernorm_before\.(\w+)", at + r"norm1.\3")
    yield rule(block + r"layernorm_after\.(\w+)", at + r"norm2.\3")
    yield rule(block + r"mlp\.fc1\.(\w+)", at + r"ffn.layers.0.0.\3")
    yield rule(block + r"mlp\.fc2\.(\w+)", at + r"ffn.layers.1.\3")
    yield rule(stage + r"downsample\.(norm|reduction)\.(\w+)", there + r"downsample.\2.\3", change=merge_order)
    for index in range(4):
        norm = rf"model\.pixel_level_module\.encoder\.hidden_states_norms\.stage{index + 1}\.(\w+)"
        yield rule(norm, backbone + rf"norm{index}.\1")

    pixels, decoder = r"model\.pixel_level_module\.decoder\.", "panoptic_head.pixel_decoder."
    for position, kind in enumerate(("conv", "gn")):
        yield rule(pixels + rf"input_projections\.(\d+)\.{position}\.(\w+)", decoder + rf"input_convs.\1.{kind}.\2")
        yield rule(pixels + rf"adapter_1\.{position}\.(\w+)", decoder + rf"lateral_convs.0.{kind}.\1")
        yield rule(pixels + rf"layer_1\.{position}\.(\w+)", decoder + rf"output_convs.0.{kind}.\1")
    yield rule(pixels + "level_embed", decoder + "level_encoding.weight")
    yield rule(pixels + r"mask_projection\.(\w+)", decoder + r"mask_feature.\1")
    layer, at = pixels + r"encoder\.layers\.(\d+)\.", decoder + r"encoder.layers.\1."
    yield rule(layer + r"self_attn\.(\w+)\.(\w+)", at + r"attentions.0.\2.\3")
    yield rule(layer + r"self_attn_layer_norm\.(\w+)", at + r"norms.0.\2")
    yield rule(layer + r"final_layer_norm\.(\w+)", at + r"norms.1.\2")
    yield from _feed_forward(layer, at)

    queries, head = r"model\.transformer_module\.", "panoptic_head."
    yield rule(queries + r"queries_embedder\.weight", head + "query_embed.weight")
    yield rule(queries + r"queries_features\.weight", head + "query_feat.weight")
    yield rule(queries + r"level_embed\.weight", head + "level_embed.weight")
    layer, at = queries + r"decoder\.layers\.(\d+)\.", head + r"transformer_decoder.layers.\1."
    yield rule(layer + r"cross_attn\.(in_proj_\w+|out_proj\.\w+)", at + r"attentions.0.attn.\2")
    for third, letter in enumerate("qkv"):
        yield rule(layer + rf"self_attn\.{letter}_proj\.(\w+)", at + r"attentions.1.attn.in_proj_\2", third=third)
    yield rule(layer + r"self_attn\.out_proj\.(\w+)", at + r"attentions.1.attn.out_proj.\2")
    for index, name in enumerate(("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")):
        yield rule(layer + rf"{name}\.(\w+)", at + rf"norms.{index}.\2")
    yield from _feed_forward(layer, at)
    yield rule(queries + r"decoder\.layernorm\.(\w+)", head + r"transformer_decoder.post_norm.\1")
    for index in range(3):
        embedder = queries + rf"decoder\.mask_predictor\.mask_embedder\.{index}\.0\.(\w+)"
        yield rule(embedder, head + rf"mask_embed.{2 * index}.\1")
    yield rule(r"class_predictor\.(\w+)", head + r"cls_embed.\1")


def _feed_forward(target: str, source: str) -> Iterator[_Rule]:
    yield _Rule(re.compile(target + r"fc1\.(\w+)"), source + r"ffns.0.layers.0.0.\2")
    yield _Rule(re.compile(target + r"fc2\.(\w+)"), source + r"ffns.0.layers.1.\2")


_RULES = tuple(_rules())
#: Weights of the network that inference does not use: the norm above Swin's last stage, and the loss's.
_UNUSED = re.compile(r"model\.pixel_level_module\.encoder\.swin\.layernorm\.\w+|criterion\.empty_weight")
#: Buffers MMDetection saves and the network derives from its window size.
_DERIVED = re.compile(r"backbone\.stages\.\d+\.blocks\.\d+\.attn\.w_msa\.relative_position_index")
#: MMDetection 3 gave the parts of a transformer layer names where 2 numbered them.
_NEW_NAMES = (
    (re.compile(r"(pixel_decoder\.encoder\.layers\.\d+\.)self_attn\."), r"\1attentions.0."),
    (re.compile(r"(transformer_decoder\.layers\.\d+\.)cross_attn\."), r"\1attentions.0."),
    (re.compile(r"(transformer_decoder\.layers\.\d+\.)self_attn\."), r"\1attentions.1."),
    (re.compile(r"(panoptic_head\..*layers\.\d+\.)ffn\."), r"\1ffns.0."),
)


def _numbered(name: str) -> str:
    """A weight's name as MMDetection 2 writes it."""
    for pattern, replacement in _NEW_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _rule_of(target: str) -> tuple[_Rule, str]:
    for rule in _RULES:
        match = rule.target.fullmatch(target)
        if match is not None:
            return rule, match.expand(rule.source)
    # Not the file's fault: the installed transformers names the network's weights in a way this table does not know.
    raise ScorerError(
        f"The installed transformers has a Mask2Former with the weight {target!r}, which MMDetection's checkpoint "
        f"cannot be mapped to. Install a tested version: pip install 'transformers>=5.17,<5.24'"
    )


def convert(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """MMDetection's weights (layout of 2.x or 3.x) under transformers' names.

    Args:
        state: the checkpoint's ``state_dict``.
        expected: the network's own ``state_dict()``, for names and shapes; the weights inference does not use are
            passed through from it.
        where: names the file in error messages.

    Raises:
        ScorerError: a weight is missing, of another shape, or there are weights the network has no place for; the
            first of each kind is named.
    """
    old_names = {_numbered(name): name for name in state}
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    converted: dict[str, Tensor] = {}
    for target, like in expected.items():
        if _UNUSED.fullmatch(target):
            converted[target] = like
            continue
        rule, source = _rule_of(target)
        if source not in old_names:
            missing.append(source)
            continue
        used.add(source)
        tensor = state[old_names[source]]
        if rule.third is not None and tensor.shape[:1] == (3 * like.shape[0],):
            tensor = tensor.chunk(3)[rule.third]
        if tensor.shape != like.shape:
            misshapen.append(f"{old_names[source]} {tuple(tensor.shape)}, expected {tuple(like.shape)}")
            continue
        converted[target] = tensor if rule.change is None else rule.change(tensor)
    unknown = [old for name, old in old_names.items() if name not in used and not _DERIVED.fullmatch(name)]
    kinds = {"missing": missing, "of another shape": misshapen, "unknown": unknown}
    problems = [f"{len(names)} weights {kind} (first: {names[0]})" for kind, names in kinds.items() if names]
    if problems:
        raise ScorerError(f"{where} is not MMDetection's Mask2Former Swin-S: {', '.join(problems)}. {_REMEDY}")
    return converted


def _safe_globals() -> list[Any]:
    """What a checkpoint's ``meta`` may hold beside plain values: numpy numbers and arrays, nothing that acts."""
    import numpy as np

    # The functions numpy pickles numbers and arrays by, under the module's names in numpy 1 and 2.
    functions: tuple[Any, ...] = (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0])
    names = [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in functions for core in ("core", "_core")]
    types = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    return [*names, np.ndarray, np.dtype, *types]


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The ``state_dict`` of an MMDetection ``.pth`` file, on the CPU; nothing in the file is executed.

    Raises:
        ScorerError: the file is truncated, no PyTorch checkpoint, holds objects that loading would have to execute,
            or has no ``state_dict``.
    """
    import pickle

    import torch

    try:
        with torch.serialization.safe_globals(_safe_globals()):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds a {named.group(1)}, which is not loaded for safety" if named else "it is damaged"
        raise ScorerError(f"{file} cannot be read as weights: {why}. {_REMEDY}") from None
    except Exception as error:  # the unpickler meets bytes that are no pickle with whatever they lead it to
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ScorerError(f"{file} cannot be read as a PyTorch checkpoint ({reason}). {_REMEDY}") from None
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    tensors = {}
    if isinstance(state, Mapping):
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors or len(tensors) != len(state or ()):
        raise ScorerError(f"{file} holds no weights (a dictionary of tensors under 'state_dict'). {_REMEDY}")
    return tensors


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Building a network draws its first weights at random; a run's own draws must not notice."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield
