"""What the weights of a reward's scorers take of the device that a run is planned for, known without reading them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ramctl.config import Config

if TYPE_CHECKING:
    import torch

    from ramctl.scorers.base import Scorer

_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class _Network:
    """A network that a scorer loads.

    ``entry`` and ``file`` of the weights manifest (no file: the whole entry) hold its weights, and little else;
    ``stored`` is the precision they are published in; ``loaded`` the one they are kept in on the device, None where
    that is the scorer's option ``dtype``.
    """

    entry: str
    file: str | None
    stored: str = "float32"
    loaded: str | None = None


_CLIP = _Network("clip-vit-l14", "model.safetensors")
_NETWORKS: dict[str, tuple[_Network, ...]] = {
    "geneval": (
        # Its reduced precisions are autocast's: the weights stay float32.
        _Network(
            "mask2former-swin-s-coco",
            "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
            loaded="float32",
        ),
        _CLIP,
    ),
    "aesthetic": (_CLIP,),  # its head is one vector, on the CPU
    "clipscore": (_CLIP,),
    "pickscore": (_Network("pickscore", "model.safetensors"),),
    "hpsv2": (_Network("hpsv2.1", "HPS_v2.1_compressed.pt", stored="float16"),),
    "imagereward": (_Network("imagereward", "ImageReward.pt"),),
    "deqa": (_Network("deqa", None, stored="float16"),),
}


@dataclass(frozen=True)
class ScorerWeights:
    """``total`` bytes of the scorers' weights on one process' device; ``unknown`` names those of unknown size there."""

    total: int
    unknown: tuple[str, ...]


def scorer_weights(config: Config, device: torch.device, processes: int) -> ScorerWeights:
    """What the reward's scorers keep on the device of a process that trains on ``device``.

    Sizes are the manifest's, of the published files, brought to the precision the scorer loads them in.

    Raises:
        UsageError: a scorer of the reward, or one of its options, does not exist.
    """
    from ramctl.scorers.registry import create

    found: dict[tuple[str, str], int] = {}
    unknown = []
    for name, term in config.reward.scorers.items():
        scorer = create(name, dict(term.options))
        networks, option, dtype = _networks(name, scorer, term.options)
        if not _is_on(device, option, processes):
            continue
        for network in networks:
            precision = network.loaded or dtype
            # Scorers share a CLIP of the same precision.
            found[network.entry, precision] = _published_bytes(network) * _ITEM[precision] // _ITEM[network.stored]
        if name not in _NETWORKS or not all(map(_published_bytes, networks)):
            unknown.append(name)
    return ScorerWeights(sum(found.values()), tuple(unknown))


def _networks(name: str, scorer: Scorer, options: Mapping[str, object]) -> tuple[tuple[_Network, ...], str, str]:
    """A scorer's networks, and its options ``device`` ("none" where it has no network) and ``dtype``."""
    if name == "ocr":  # RapidOCR's small networks read on the CPU; what PaddleOCR takes of a GPU is its own affair
        return (), str(options.get("device", "auto")) if options.get("engine") == "paddleocr" else "none", "float32"
    # The detector of GenEval holds the scorer's options; the one for the embedded model has no network.
    owner: Any = getattr(scorer, "detector", scorer)
    if name not in _NETWORKS or not hasattr(owner, "dtype"):
        return (), "none", "float32"
    return _NETWORKS[name], str(owner.device), str(owner.dtype)


def _is_on(device: torch.device, option: str, processes: int) -> bool:
    """Whether a scorer's option ``device`` means the device of a process that trains on ``device``."""
    import torch

    if option == "auto":
        return device.type == "cuda" or not torch.cuda.is_available()
    kind, _, index = option.partition(":")
    # Of several GPUs the run's processes take the first ones.
    return kind == device.type and (not index.isdigit() or int(index) < processes)


def _published_bytes(network: _Network) -> int:
    """The size the manifest gives, 0 where it (one of the user's own) gives none."""
    from ramctl.weights import load_manifest

    entry = load_manifest().get(network.entry)
    if entry is None or network.file is None:
        return 0 if entry is None else entry.bytes_about()
    return next((file.bytes_about for file in entry.files if file.path == network.file), 0)
