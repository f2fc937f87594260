"""What a user names to draw pictures from: a checkpoint of a run, or a base model; found, then opened.

A checkpoint folder, its ``latest`` or ``best`` link, or a run folder is a checkpoint; a diffusers folder or a hub id
is a base model. Finding reads small files only, so that a mistake shows before any weights are loaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ramctl.config import Config, EvaluationSection, ModelSection, RuntimeSection
from ramctl.errors import CheckpointError, ConfigError, MissingDependencyError, UsageError, did_you_mean
from ramctl.hashing import file_sha256
from ramctl.resources import find_model, find_resource
from ramctl.settings import list_presets, load_settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ramctl.backbones.base import Backbone
    from ramctl.engine.policy import Policy

Which = Literal["evaluation", "policy", "old"]
WHICH: tuple[Which, ...] = ("evaluation", "policy", "old")
Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
Choice = TypeVar("Choice", bound=str)

_INDEX = "model_index.json"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_POINTERS = ("latest", "best")
#: First parts of paths that are never a hub's owner.
_OURS = ("outputs", "models", "presets", "prompts")


@dataclass(frozen=True)
class Source:
    """A source that was found, not loaded: ``checkpoint`` is None for a base model.

    ``config`` is the training config beside the weights; for a base model that of a preset made for it, or None.
    """

    model: ModelSection
    checkpoint: Path | None
    config: Config | None

    @property
    def label(self) -> str:
        """A name for folders and tables: ``geneval-tiny-step-000050``, ``tinyworld``."""
        if self.checkpoint is not None and self.config is not None:
            return f"{self.config.name}-{self.checkpoint.name}"
        return Path(self.model.path).name

    @property
    def evaluation(self) -> EvaluationSection:
        """The sampling settings meant for it: its config's, or the schema's."""
        return self.config.evaluation if self.config is not None else EvaluationSection()


@dataclass(frozen=True)
class OpenModel:
    """A source with its weights loaded.

    ``model`` and ``precision`` are what was loaded, after any choice of the caller's; ``which`` is the weight set, and
    ``compiled`` says whether its networks are (their pictures differ in rounding).
    """

    source: Source
    model: ModelSection
    precision: Precision
    which: Which
    backbone: Backbone
    policy: Policy | None
    compiled: bool = field(default=False, kw_only=True)

    @property
    def label(self) -> str:
        """The source's label, with the weight set where it is not the evaluation weights."""
        return self.source.label + ("" if self.which == "evaluation" else f"-{self.which}")

    @property
    def config(self) -> Config | None:
        """The source's config."""
        return self.source.config

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint's folder, None for a base model."""
        return self.source.checkpoint

    def network(self) -> nn.Module:
        """The transformer with the source's weights; valid until :meth:`base_network` is called."""
        return self.backbone.transformer if self.policy is None else self.policy.network("evaluation")

    def base_network(self) -> nn.Module:
        """The transformer as it was before training; valid until :meth:`network` is called."""
        return self.backbone.transformer if self.policy is None else self.policy.network("reference")

    @cached_property
    def base_hashes(self) -> dict[str, str]:
        """SHA-256 of the base model's weight files by path inside its folder."""
        return weight_hashes(self.model)

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the base model's weight files and, from its manifest, of the checkpoint's weights."""
        hashes = {f"base/{name}": value for name, value in self.base_hashes.items()}
        if self.checkpoint is not None and self.config is not None:
            from ramctl.engine.checkpoint import MANIFEST_FILE, set_files

            name = set_files(self.config.lora)[self.which]
            hashes[name] = _read_json(self.checkpoint / MANIFEST_FILE)["sha256"][name]
        return hashes


def find_source(source: str, *, preset: Config | None = None, base: str | None = None) -> Source:
    """Find what the user named.

    Args:
        source: checkpoint, ``latest``, ``best``, run folder, diffusers folder or hub id.
        preset: for a base model, the config to take when its ``model.path`` is that model.
        base: for a checkpoint, where its base model lies now, when that has moved.

    Raises:
        CheckpointError: nothing is there, or no intact checkpoint, or its config cannot be read.
        ConfigError: a folder with ``model_index.json`` whose parts cannot be read.
        MissingDependencyError: a hub id that can be neither found in the cache nor downloaded.
        UsageError: ``base`` was given for a base model.
    """
    path = Path(source).expanduser()
    if _is_checkpoint_like(path):
        return _find_checkpoint(path, base)
    if base is not None:
        raise UsageError(f"{source} is a base model itself; a base can be given for a checkpoint only.")
    folder = find_resource(source)
    if (folder / _INDEX).is_file():
        return _base_source(source, preset)
    if folder.is_dir():
        raise CheckpointError(
            f"{folder} holds neither a checkpoint (step-…/manifest.json) nor a model ({_INDEX}). "
            "Name a run folder, a checkpoint in it, or a diffusers folder."
        )
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; name a checkpoint folder, a run folder or a diffusers folder.")
    # A folder of that owner's name here means that a path was meant: a missing run must not be asked of the hub.
    if _HUB_ID.match(source) and path.parts[0] not in _OURS and not path.parent.exists():
        return _base_source(source, preset)
    raise CheckpointError(_nothing_there(source, path))


def open_source(
    source: str | Source,
    *,
    device: torch.device | str = "auto",
    precision: str | None = None,
    which: str = "evaluation",
    compile: bool = False,
) -> OpenModel:
    """Load a source.

    Args:
        source: what :func:`find_source` takes or gives.
        device: where the networks live; "auto" takes CUDA where there is one.
        precision: None as the config says; "float32" computes and stores everything in float32.
        which: the weight set of a checkpoint.
        compile: let ``runtime.compile`` count, which pays where many pictures are drawn on a GPU.

    Raises:
        CheckpointError: a damaged file (it is named), or weights that do not fit the base model.
        MissingDependencyError: the base model is not there.
        ConfigError: the base model is no model of its family, or there is no CUDA device and one was asked for.
        UsageError: an unknown device, precision or weight set, or another weight set of a base model, which has one.
    """
    from ramctl.backbones.registry import load_model

    found = find_source(source) if isinstance(source, str) else source
    chosen_set = _choice("weight set", which, WHICH)
    runtime = found.config.runtime if found.config is not None else RuntimeSection()
    chosen = runtime.precision if precision is None else _choice("precision", precision, PRECISIONS)
    place = _place(device)
    if found.checkpoint is None and which != "evaluation":
        raise UsageError(f"{found.label} is a base model: it has no {which!r} weights, only its own.")
    model = found.model
    if precision == "float32":
        model = model.model_copy(update={"dtype": "float32"})
    try:
        backbone = load_model(model, place, precision=chosen)
    except (MissingDependencyError, ConfigError) as error:
        if found.checkpoint is None:
            raise
        raise type(error)(
            f"The base model of checkpoint {found.checkpoint} cannot be loaded: {error} "
            "If it has moved, say where it is with --base FOLDER."
        ) from error
    policy = _load_policy(found, backbone, chosen_set) if found.checkpoint is not None else None
    compiled = compile and runtime.compile and place.type == "cuda"
    if compiled:
        backbone.compile(backbone.transformer if policy is None else policy.frozen)
    return OpenModel(found, model, chosen, chosen_set, backbone, policy, compiled=compiled)


def weight_hashes(model: ModelSection) -> dict[str, str]:
    """SHA-256 of each weight file of a model's parts, by path inside its folder."""
    folder = find_model(model.path, with_t5=model.use_t5)
    if not (folder / _INDEX).is_file():
        from huggingface_hub import snapshot_download

        from ramctl.backbones.read_sd3 import pinned_revision

        revision = pinned_revision(model.path, model.revision)
        folder = Path(snapshot_download(model.path, revision=revision, local_files_only=True))
    parts = [name for name, value in _read_json(folder / _INDEX).items() if isinstance(value, list) and value[0]]
    files = [
        file
        for part in sorted(parts)
        if model.use_t5 or part != "text_encoder_3"
        for file in sorted((folder / part).glob("*"))
        if file.suffix in (".safetensors", ".bin")
    ]
    return {str(file.relative_to(folder)): _sha256(file) for file in files}


def _load_policy(source: Source, backbone: Backbone, which: Which) -> Policy:
    from ramctl.engine.checkpoint import load_weights
    from ramctl.engine.policy import Policy

    assert source.config is not None and source.checkpoint is not None
    policy = Policy(backbone, source.config.lora, seed=source.config.train.seed)
    load_weights(policy, backbone, source.checkpoint, which)
    return policy


def _is_checkpoint_like(path: Path) -> bool:
    """A checkpoint's folder, a pointer to one, or a folder with some in it (a damaged one included)."""
    if path.name in _POINTERS and (path.is_symlink() or path.is_file()):
        return True
    if not path.is_dir():
        return False
    return path.name.startswith("step-") or (path / "manifest.json").is_file() or any(path.glob("step-*"))


def _find_checkpoint(path: Path, base: str | None) -> Source:
    from ramctl.engine.checkpoint import CONFIG_FILE, MANIFEST_FILE, find_checkpoint

    if path.name.startswith("step-") and not (path / MANIFEST_FILE).is_file():
        raise CheckpointError(f"Checkpoint {path} is damaged: {path / MANIFEST_FILE} is missing.")
    checkpoint = find_checkpoint(path)
    file = checkpoint / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"Checkpoint {checkpoint} is damaged: {file} is missing.")
    config = load_settings(str(file.absolute())).config
    model = config.model
    if base is not None:
        model = model.model_copy(update={"path": base, "revision": None})
    return Source(model, checkpoint, config)


def _base_source(path: str, preset: Config | None) -> Source:
    config = preset if preset is not None and _same_model(preset.model.path, path) else _preset_of(path)
    if config is not None:
        return Source(config.model.model_copy(update={"path": path}), None, config)
    return Source(model_section(path), None, None)


def _preset_of(path: str) -> Config | None:
    """The first shipped preset made for this model."""
    for preset in list_presets():
        try:
            config = load_settings(preset.name).config
        except ConfigError:
            continue  # `ramctl presets` reports a broken preset; here it is only not the one looked for
        if _same_model(config.model.path, path):
            return config
    return None


def _same_model(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return find_model(one).resolve() == find_model(other).resolve()
    except MissingDependencyError:  # a preset's model of which only a part is there is not the one asked for
        return False


def model_section(path: str) -> ModelSection:
    """The model section of a base model without a preset, read off its own files.

    The resolution is the one it was trained for. A T5 whose last scale is all zero puts out zero tokens, which stand in
    for an absent encoder; it is left out.

    Raises:
        ConfigError: the files are not those of a model of a known family.
        MissingDependencyError: a hub id that can be neither found in the cache nor downloaded.
    """
    try:
        index = _read_json(_part_file(path, _INDEX))
        transformer = _read_json(_part_file(path, "transformer/config.json"))
        vae = _read_json(_part_file(path, "vae/config.json"))
        side = int(transformer["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is not a Stable Diffusion 3 model folder ({error}).") from error
    has_t5 = bool((index.get("text_encoder_3") or [None])[0])
    return ModelSection(path=path, resolution=side, use_t5=has_t5 and not _is_null_t5(find_model(path)))


def _is_null_t5(folder: Path) -> bool:
    file = folder / "text_encoder_3" / "model.safetensors"
    if not file.is_file():  # in several files, or on the hub: large, so a real one
        return False
    from safetensors import SafetensorError, safe_open

    name = "encoder.final_layer_norm.weight"
    try:
        with safe_open(file, framework="numpy") as tensors:
            return name in tensors.keys() and not tensors.get_tensor(name).any()  # noqa: SIM118 - no mapping
    except (SafetensorError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from error


def _part_file(path: str, name: str) -> Path:
    """A small file of a model: in its folder, else from the hub's cache or the hub."""
    folder = find_model(path)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ConfigError(f"Model folder {folder} is not complete: {folder / name} is missing.")
        return folder / name
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        return Path(hf_hub_download(path, name, local_files_only=True))
    except OSError:
        pass  # not in the cache
    try:
        # Asked once first: the download asks a hub that cannot be reached for most of a minute.
        get_hf_file_metadata(hf_hub_url(path, name), timeout=15)
        return Path(hf_hub_download(path, name))
    except Exception as error:  # the hub's client lets the errors of its HTTP library through
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise MissingDependencyError(
            f"{path} is no checkpoint, no folder here, and no model that could be downloaded ({reason}). "
            "Name a run folder, a checkpoint, a diffusers folder such as models/tinyworld, or a hub id."
        ) from error


def _nothing_there(source: str, path: Path) -> str:
    """Names what was looked for, and what lies near it."""
    near = ""
    if path.parent.is_dir():
        siblings = [child.name for child in path.parent.iterdir() if child.is_dir()]
        near = did_you_mean(path.name, siblings)
    return (
        f"Nothing is at {source}: no checkpoint, run folder or model folder.{near} "
        "Name one, e.g. outputs/geneval-tiny, outputs/geneval-tiny/best or models/tinyworld."
    )


def _choice(what: str, given: str, choices: tuple[Choice, ...]) -> Choice:
    for choice in choices:
        if choice == given:
            return choice
    raise UsageError(f"There is no {what} {given!r}; choose {', '.join(choices)}.{did_you_mean(given, choices)}")


def _place(device: torch.device | str) -> torch.device:
    if not isinstance(device, str):
        return device
    from ramctl.engine.distributed import connect

    return connect(_choice("device", device, DEVICES))[1]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} is damaged: it should hold a JSON object.")
    return value


def _sha256(file: Path) -> str:
    # The hub's cache names a large file by its SHA-256.
    target = file.resolve().name
    if _SHA256.match(target):
        return target
    return file_sha256(file)
