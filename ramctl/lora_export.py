"""LoRA files other programs read and write: a checkpoint's LoRA as such a file, and such a file on a base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ramctl import __version__
from ramctl.errors import CheckpointError, DataError, RamctlError, UsageError, did_you_mean
from ramctl.hashing import file_sha256
from ramctl.lora_layouts import LAYOUTS, LowRank, Updates, read_layout, to_diffusers, to_kohya
from ramctl.sources import OpenModel, Source

if TYPE_CHECKING:
    from torch import Tensor, nn


def check_export(source: Source, lora: Path | None, target: Path, layout: str) -> None:
    """Refuse what :func:`export_lora` cannot do; raises the same errors."""
    if layout not in LAYOUTS:
        raise UsageError(
            f"There is no LoRA format {layout!r}; choose {' or '.join(LAYOUTS)}.{did_you_mean(layout, LAYOUTS)}"
        )
    if target.suffix != ".safetensors":
        raise UsageError(f"A LoRA file must be named ….safetensors, got {target}.")
    if target.exists():
        raise DataError(f"{target} exists; choose another file with --export-lora.")
    if lora is not None:
        return
    if source.checkpoint is None or source.config is None:
        raise UsageError(
            f"{source.label} is a base model: it has no LoRA to export. Name a checkpoint, or give --lora."
        )
    if not source.config.lora.rank:
        raise UsageError(f"{source.label} trained all weights (lora.rank = 0): there is no LoRA to export.")


def export_lora(
    source: Source, target: Path, *, layout: str = "diffusers", which: str = "evaluation", lora: Path | None = None
) -> int:
    """Write the LoRA of a checkpoint, or that of another file, as a file of its own.

    Args:
        source: a checkpoint; nothing of its base model is loaded.
        target: a ``.safetensors`` file that is not there yet.
        layout: ``diffusers``, or ``kohya`` for ComfyUI and sd-scripts (:mod:`ramctl.lora_layouts`).
        which: the checkpoint's weight set.
        lora: a LoRA file of either layout to write instead.

    Returns:
        the number of layers in it.

    Raises:
        UsageError: an unknown layout, another suffix, or a source that has no LoRA.
        DataError: ``target`` exists.
        CheckpointError: the checkpoint or the file is damaged.
        RamctlError: the file cannot be written.
    """
    from safetensors.torch import save_file

    check_export(source, lora, target, layout)
    updates = read_lora(lora or _checkpoint_file(source, which))
    facts = {"version": __version__, "source": str(lora or source.checkpoint), "weights": None if lora else which}
    metadata = {"format": "pt", "ramctl": json.dumps(facts)}
    if layout == "kohya":
        tensors = to_kohya(updates)
    else:
        tensors, adapter = to_diffusers(updates)
        metadata.update(adapter)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise RamctlError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(updates)


def read_lora(path: Path) -> Updates:
    """The updates in a LoRA file of the diffusers or kohya layout.

    Raises:
        CheckpointError: the file is absent or damaged, or no LoRA of Stable Diffusion 3.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"LoRA file {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"LoRA file {path} cannot be read: {error}.") from None
    return read_layout(tensors, metadata, f"LoRA file {path}")[0]


class MergedUpdates:
    """A network with updates merged into its weights, or taken out again, bit for bit."""

    def __init__(self, network: nn.Module, updates: Mapping[str, LowRank], where: str) -> None:
        self.network = network
        self._updates = dict(updates)
        weights = {name: module.weight for name, module in network.named_modules() if hasattr(module, "weight")}
        for layer, update in updates.items():
            if layer not in weights:
                raise CheckpointError(f"{where} belongs to another model: this one has no layer {layer}.")
            if weights[layer].shape != update.shape:
                raise CheckpointError(
                    f"{where} belongs to another model: {layer} is {tuple(weights[layer].shape)} here, "
                    f"{update.shape} there."
                )
        self._weights = {layer: weights[layer] for layer in updates}
        self._base = {layer: weight.detach().clone() for layer, weight in self._weights.items()}
        self._merged = False

    def merged(self) -> nn.Module:
        """The network with the updates."""
        if not self._merged:
            for layer, weight in self._weights.items():
                delta = self._updates[layer].delta(weight.device)
                weight.data.copy_(self._base[layer].float() + delta)
            self._merged = True
        return self.network

    def plain(self) -> nn.Module:
        """The network as it was."""
        if self._merged:
            for layer, weight in self._weights.items():
                weight.data.copy_(self._base[layer])
            self._merged = False
        return self.network


@dataclass(frozen=True)
class WithLora(OpenModel):
    """A base model with a LoRA file on it; ``file`` is that, ``merge`` its updates in the backbone's transformer."""

    file: Path
    merge: MergedUpdates

    @property
    def label(self) -> str:
        """The base model's label with the file's name."""
        return f"{self.source.label}-{self.file.stem}"

    def network(self) -> nn.Module:
        """The transformer with the LoRA; valid until :meth:`base_network` is called."""
        return self.merge.merged()

    def base_network(self) -> nn.Module:
        """The transformer without it; valid until :meth:`network` is called."""
        return self.merge.plain()

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the base model's weight files and of the LoRA file."""
        base = {f"base/{name}": value for name, value in self.base_hashes.items()}
        return {**base, self.file.name: file_sha256(self.file)}


def with_lora(model: OpenModel, file: Path, updates: Updates | None = None) -> WithLora:
    """A base model with a LoRA file of either layout on it.

    Args:
        updates: the file's, where they have been read already.

    Raises:
        UsageError: the model is a checkpoint, which has a LoRA of its own.
        CheckpointError: the file is absent, damaged or a LoRA of another model (the first layer that does not fit is
            named).
    """
    check_lora(model.source)
    found = read_lora(file) if updates is None else updates
    merge = MergedUpdates(model.backbone.transformer, found, f"LoRA file {file}")
    fields = {
        name: getattr(model, name)
        for name in ("source", "model", "precision", "which", "backbone", "policy", "compiled")
    }
    return WithLora(**fields, file=file, merge=merge)


def check_lora(source: Source) -> None:
    """Refuse a source that :func:`with_lora` cannot put a file on; raises the same errors."""
    if source.checkpoint is not None:
        raise UsageError(
            f"{source.label} is a checkpoint with weights of its own; a LoRA file goes on a base model: "
            f"ramctl sample {source.model.path} --lora FILE."
        )


def _checkpoint_file(source: Source, which: str) -> Path:
    """The LoRA file of a checkpoint's weight set, checked against the manifest."""
    from ramctl.engine.checkpoint import damage, set_files
    from ramctl.sources import WHICH

    assert source.checkpoint is not None and source.config is not None
    if which not in WHICH:
        raise UsageError(f"There is no weight set {which!r}; choose {', '.join(WHICH)}.{did_you_mean(which, WHICH)}")
    problem = damage(source.checkpoint)
    if problem is not None:
        raise CheckpointError(f"Checkpoint {source.checkpoint} cannot be used: {problem}.")
    return source.checkpoint / set_files(source.config.lora)[which]


def _umask() -> int:
    """The process' umask: safetensors makes its files readable by their owner only."""
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask
