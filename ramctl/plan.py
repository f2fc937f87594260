"""What a run would do, before it does it: sizes, forwards, memory, weights, disk. Behind ``ramctl train --dry-run``.

Nothing is trained, drawn or downloaded, and no weight of the model is read. Memory is an estimate, per process::

    resident = live + frozen network + base values of the changed weights + text encoders + autoencoder
             + trained weights * (1 policy + 1 gradient + 2 AdamW moments + 2 lagged sets), float32
             + text embeddings and endpoints of the step + the scorers' weights + the libraries
    embed    = resident, without endpoints, + the largest text encoder where they are parked
    sample   = resident + one guided pass at the sampling micro-batch + the 8-bit weights of rollout.float8
    decode   = resident + one decoding at the sampling micro-batch
    sweep    = resident + one pass at the sweep micro-batch + stored velocities
    train    = resident + one forward and backward pass at the training micro-batch + stored velocities
    update   = resident + AdamW's temporaries (as much as the trained weights) + stored velocities

Bytes of a pass are counted by running it without data (:mod:`ramctl.plan_memory`), those of the scorers' weights come
from the manifest (:mod:`ramctl.plan_scorers`). Not in the estimate: what the scorers' and the text encoders' passes
take beside their weights, and what an allocator loses to fragmentation.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ramctl.config import Config
from ramctl.errors import DataError, MissingDependencyError, RamctlError, UsageError
from ramctl.resources import download_command, find_model, find_resource

if TYPE_CHECKING:
    import torch

    from ramctl.plan_memory import Skeleton
    from ramctl.prompts import Prompt

Status = Literal["found", "download", "missing"]

#: What Python and the libraries take of a device: on the CPU measured after a step, on CUDA about what a context takes.
_LIBRARIES = {"cpu": 800_000_000, "cuda": 600_000_000}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("*.safetensors", "*.bin")
_FLOAT32 = 4
#: The part of the resident memory that the scorers' weights take.
SCORERS = "scorers' weights"
#: What to do about memory: each leaves the experiment the same. On a GPU encoders can be parked, too.
_LESS = "lower rollout.micro_batch, train.micro_batch, train.sweep_micro_batch; set train.gradient_checkpointing = true"
_PARK = ', model.text_encoders = "parked"'


@dataclass(frozen=True)
class Sizes:
    """Counts of one step over all processes, and the largest process' share."""

    processes: int
    prompts: int
    images: int
    items: int
    images_per_process: int
    items_per_process: int
    updates: int
    #: pictures of one held-out evaluation; None without a readable prompt file.
    evaluation_images: int | None


@dataclass(frozen=True)
class Forwards:
    """Network forwards of single items in one step, over all processes; ``training`` are followed by a backward."""

    sampling: int
    sweeps: int
    training: int

    @property
    def total(self) -> int:
        """All forwards."""
        return self.sampling + self.sweeps + self.training


@dataclass(frozen=True)
class MicroBatches:
    """Items at once per process, and how many passes that makes per step (both None while the model is unknown)."""

    sampling: int | None
    sweep: int | None
    training: int | None
    sampling_batches: int | None
    sweep_batches: int | None
    training_batches: int | None


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights."""

    transformer: int
    trainable: int
    text_encoders: int
    vae: int


@dataclass(frozen=True)
class Memory:
    """Estimated bytes per process: what is always there by part, and the peak of each phase.

    ``available`` are free bytes of the device (one GPU; on the CPU those of the machine), None where unknown.
    ``sharers`` processes take their part of them. ``card``: that is all the memory of a GPU that was asked about, not
    what is free here. ``uncounted`` names scorers on the device whose weights' size is not known.
    """

    resident: Mapping[str, int]
    phases: Mapping[str, int]
    available: int | None
    sharers: int
    card: bool = False
    uncounted: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """The largest phase."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether the estimate stays below what is free (true where that is unknown)."""
        return self.available is None or self.peak * self.sharers <= self.available


@dataclass(frozen=True)
class FileSource:
    """Where a model or a prompt file would come from; ``detail`` is the place, or what is missing and the remedy."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class ScorerStatus:
    """Whether a scorer of the reward can work: ``detail`` says what is missing and how to get it."""

    name: str
    ready: bool
    detail: str


@dataclass(frozen=True)
class Disk:
    """Bytes of one checkpoint, of the most that lie on disk at once, and free bytes where runs are written."""

    checkpoint: int
    most: int
    free: int
    folder: Path


@dataclass(frozen=True)
class Plan:
    """All of it. ``parameters``, ``memory`` and ``disk`` are None while the model's configuration is not at hand."""

    name: str
    device: str
    steps: int
    sizes: Sizes
    forwards: Forwards
    micro_batches: MicroBatches
    parameters: Parameters | None
    memory: Memory | None
    disk: Disk | None
    sources: tuple[FileSource, ...]
    scorers: tuple[ScorerStatus, ...]

    @property
    def problems(self) -> list[str]:
        """What would stop the run, one line each; empty when it can start."""
        found = [f"{source.name}: {source.detail}" for source in self.sources if source.status == "missing"]
        found += [f"scorer {scorer.name}: {scorer.detail}" for scorer in self.scorers if not scorer.ready]
        if self.sizes.processes > self.sizes.images:
            found.append(f"processes: {self.sizes.processes} cannot share {self.sizes.images} pictures per step")
        if self.memory is not None and not self.memory.fits:
            limit = "the card has" if self.memory.card else "is free"
            remedy = _LESS + (_PARK if self.device == "cuda" else "")
            found.append(f"memory: the estimate is above what {limit}: {remedy}")
        if self.disk is not None and self.disk.most > self.disk.free:
            found.append(f"disk: the checkpoints need more than is free in {self.disk.folder}")
        return found


def make_plan(config: Config, processes: int, device: str, card: int | None = None, output: Path | None = None) -> Plan:
    """The plan of a run.

    Args:
        config: the resolved configuration.
        processes: how many processes share each step.
        device: "cpu", "cuda", or "auto" (CUDA where there is one, or a card is asked about).
        card: memory in bytes of the GPU (each process' own) that the run is planned for, wherever it is planned; None:
            this machine's devices.
        output: the run folder; ``outputs/<name>`` by default.

    Raises:
        ConfigError: the configuration does not fit the model (resolution, LoRA targets).
        UsageError: a scorer of the reward, or one of its options, does not exist; or a card is asked about for a run
            on the CPU.
    """
    import torch

    if device == "auto":
        device = "cuda" if card is not None or torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if card is not None and place.type != "cuda":
        raise UsageError(f'A card was asked about, but runtime.device is "{device}": add --runtime.device cuda.')
    skeleton, source = _networks(config, *model_source(config))
    prompt_sources, prompts, evaluation_prompts = prompt_files(config)
    sizes = _sizes(config, processes, evaluation_prompts)
    batches = _micro_batches(config, sizes, skeleton, place, card)
    memory = parameters = disk = None
    if skeleton is not None:
        parameters = _parameters(skeleton)
        memory = _memory(config, skeleton, sizes, batches, place, card)
        disk = _disk(config, parameters, output)
    return Plan(
        name=config.name,
        device=device,
        steps=config.train.steps,
        sizes=sizes,
        forwards=_forwards(config, skeleton),
        micro_batches=batches,
        parameters=parameters,
        memory=memory,
        disk=disk,
        sources=(source, *prompt_sources),
        scorers=_scorers(config, prompts),
    )


# -- sizes ------------------------------------------------------------------------------------------------------------


def _sizes(config: Config, processes: int, evaluation_prompts: int | None) -> Sizes:
    images = math.ceil(config.images_per_step / processes)
    return Sizes(
        processes=processes,
        prompts=config.rollout.prompts_per_step,
        images=config.images_per_step,
        items=config.items_per_step,
        images_per_process=images,
        items_per_process=images * config.ram.noisings_per_image,
        updates=config.ram.updates_per_step,
        evaluation_images=None
        if evaluation_prompts is None
        else evaluation_prompts * config.evaluation.images_per_prompt,
    )


def _forwards(config: Config, skeleton: Skeleton | None) -> Forwards:
    """Passes of a step over all processes; without the model's time grid every step counts as guided."""
    rollout = config.rollout
    steps = rollout.sampling_steps
    guided = 0 if rollout.guidance_scale == 1.0 else steps
    if skeleton is not None:
        arguments = steps, rollout.guidance_scale, rollout.sampler, rollout.guidance_interval
        guided = sum(skeleton.backbone.guided_steps(*arguments))
    # With the path cost both networks also look at each item's intermediate point.
    sweeps = 4 if config.ram.path_cost else 2
    return Forwards(
        sampling=config.images_per_step * (steps + guided),
        sweeps=config.items_per_step * sweeps,
        training=config.items_per_step,
    )


def _micro_batches(
    config: Config, sizes: Sizes, skeleton: Skeleton | None, device: torch.device, card: int | None
) -> MicroBatches:
    from ramctl.engine.micro_batch import auto_micro_batch, even_batch

    def most(given: int, *, training: bool) -> int | None:
        if not given and skeleton is not None:
            given = auto_micro_batch(skeleton.backbone.latent_shape, device, training=training, card=card)
        return given or None

    # Processes' shares of the pictures differ by one where they do not divide, and updates' shares of the noisings.
    count, updates, images = config.ram.noisings_per_image, config.ram.updates_per_step, sizes.images_per_process
    pictures = sorted({sizes.images // sizes.processes, images} - {0})
    noisings = [len(range(update, count, updates)) for update in range(updates)]

    def size(given: int | None, per_picture: Sequence[int]) -> int | None:
        """The largest pass: each share is taken in equal ones."""
        if given is None:
            return None
        return max(even_batch(share * each, given) for share in pictures for each in per_picture)

    def passes(given: int | None, per_picture: Sequence[int]) -> int | None:
        return None if given is None else sum(math.ceil(images * each / given) for each in per_picture)

    sampling = most(config.rollout.micro_batch, training=False)
    sweep = most(config.train.sweep_micro_batch, training=False)
    training = most(config.train.micro_batch, training=True)
    return MicroBatches(
        sampling=size(sampling, [1]),
        sweep=size(sweep, [count]),
        training=size(training, noisings),
        sampling_batches=passes(sampling, [1]),
        sweep_batches=passes(sweep, [count]),
        training_batches=passes(training, noisings),
    )


def _parameters(skeleton: Skeleton) -> Parameters:
    def count(modules: tuple[torch.nn.Module, ...]) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    return Parameters(
        transformer=count((skeleton.policy.frozen,)),
        trainable=sum(p.numel() for p in skeleton.policy.parameters.values()),
        text_encoders=count(skeleton.encoders),
        vae=count((skeleton.vae,)),
    )


# -- memory and disk --------------------------------------------------------------------------------------------------


def _memory(
    config: Config,
    skeleton: Skeleton,
    sizes: Sizes,
    batches: MicroBatches,
    device: torch.device,
    card: int | None,
) -> Memory:
    from ramctl.plan_memory import trace_passes
    from ramctl.plan_scorers import scorer_weights

    scorers = scorer_weights(config, device, sizes.processes)
    resident = {**_resident(config, skeleton, sizes, device, card), SCORERS: scorers.total}
    assert batches.sampling and batches.sweep and batches.training
    passes = trace_passes(
        skeleton,
        config,
        device,
        {"sampling": batches.sampling, "sweep": batches.sweep, "training": batches.training},
    )
    one_set = sizes.items_per_process * math.prod(skeleton.backbone.latent_shape)
    one_set *= skeleton.backbone.velocity_dtype.itemsize
    stored = (4 if config.ram.path_cost else 2) * one_set
    base = sum(resident.values())
    # Parked encoders come one at a time while the step's prompts are embedded, before there are endpoints.
    parked = 0 if resident["text encoders"] else max(_encoder_bytes(skeleton))
    phases = {
        "embed": base - resident["endpoints"] + parked,
        "sample": base + passes.sampling + (_float8_bytes(skeleton) if config.rollout.float8 else 0),
        "decode": base + passes.decoding,
        "sweep": base + passes.sweep + stored,
        "train": base + passes.training + stored,
        "update": base + resident["policy weights"] + stored,
    }
    sharers = sizes.processes if device.type == "cpu" else 1
    available = _free_memory(device) if card is None else card
    return Memory(resident, phases, available, sharers, card is not None, scorers.unknown)


def _float8_bytes(skeleton: Skeleton) -> int:
    from ramctl.backbones.float8 import float8_layers

    return sum(layer.weight.numel() for layer in float8_layers(skeleton.policy.frozen))


def _encoder_bytes(skeleton: Skeleton) -> list[int]:
    from ramctl.plan_memory import tensor_bytes

    return [tensor_bytes(encoder.parameters()) for encoder in skeleton.encoders]


def _resident(
    config: Config, skeleton: Skeleton, sizes: Sizes, device: torch.device, card: int | None
) -> dict[str, int]:
    """Bytes that stay through a whole step, by part; without the scorers'."""
    from ramctl.backbones.read_sd3 import DTYPES
    from ramctl.backbones.sd3 import parks_encoders
    from ramctl.plan_memory import tensor_bytes

    policy, text = skeleton.policy, skeleton.text
    trained = tensor_bytes(policy.parameters.values())
    # A process' pictures are consecutive, so they can begin and end in the middle of a prompt's group.
    prompts = min(sizes.prompts, math.ceil(sizes.images_per_process / config.rollout.images_per_prompt) + 1)
    embedding = (text.tokens * text.width + text.pooled) * DTYPES[config.model.dtype].itemsize
    endpoint = math.prod(skeleton.backbone.latent_shape) * _FLOAT32
    return {
        "live network": tensor_bytes(p for p in policy.live.parameters() if not p.requires_grad),
        "frozen network": tensor_bytes(policy.frozen.parameters()),
        "base values": tensor_bytes(policy._base.values()),
        "text encoders": 0 if parks_encoders(config.model, device, card) else sum(_encoder_bytes(skeleton)),
        "autoencoder": tensor_bytes(skeleton.vae.parameters()),
        "policy weights": trained,
        "gradients": trained,
        "AdamW moments": 2 * trained,
        "old and evaluation weights": 2 * trained,
        "text embeddings": prompts * embedding,
        "endpoints": sizes.images_per_process * endpoint,
        "libraries": _LIBRARIES[device.type],
    }


def _free_memory(device: torch.device) -> int | None:
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    from ramctl.doctor import memory_bytes

    return memory_bytes()[1]


def _disk(config: Config, parameters: Parameters, output: Path | None) -> Disk:
    # Three weight sets and AdamW's two moments. On disk at once: those kept, the best one, and one being written.
    checkpoint = 5 * parameters.trainable * _FLOAT32
    folder = (output or Path("outputs", config.name)).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    most = (config.checkpoint.keep + 2) * checkpoint
    return Disk(checkpoint, most, shutil.disk_usage(existing).free, folder)


# -- files and scorers ------------------------------------------------------------------------------------------------


def model_source(config: Config) -> tuple[Path | None, FileSource]:
    """The model's folder where its configurations are at hand, and where its weights would come from."""
    path, name = config.model.path, f"model {config.model.path}"
    try:
        folder = find_model(path, with_t5=config.model.use_t5)
    except MissingDependencyError as error:
        return None, FileSource(name, "missing", str(error))
    if (folder / "model_index.json").is_file():
        absent = _absent_weights(folder, config)
        if absent:
            return folder, FileSource(name, "missing", f"{absent} holds no weights; {_remedy(path)}")
        return folder, FileSource(name, "found", str(folder))
    if folder.exists():
        return None, FileSource(name, "missing", f"{folder} is no diffusers folder (it has no model_index.json)")
    if path.startswith(("models/", "prompts/", "presets/")) or not _HUB_ID.fullmatch(path):
        return None, FileSource(name, "missing", f"{folder} does not exist; {_remedy(path)}")
    return _hub_source(config, name)


def _hub_source(config: Config, name: str) -> tuple[Path | None, FileSource]:
    from huggingface_hub import constants, try_to_load_from_cache

    from ramctl.backbones.read_sd3 import pinned_revision

    path = config.model.path
    index = try_to_load_from_cache(path, "model_index.json", revision=pinned_revision(path, config.model.revision))
    folder = Path(index).parent if isinstance(index, str) else None
    if folder is not None and not _absent_weights(folder, config):
        return folder, FileSource(name, "found", str(folder))
    fetch = download_command(path) or f"hf download {path}"
    if constants.HF_HUB_OFFLINE:
        detail = f"not in the cache, and HF_HUB_OFFLINE is set; with a network run: {fetch}"
        return folder, FileSource(name, "missing", detail)
    detail = f"from the Hugging Face hub when the run starts, or now with: {fetch}"
    return folder, FileSource(name, "download", detail)


def _remedy(path: str) -> str:
    if path.startswith("models/"):
        return "pip install --force-reinstall ramctl; in a checkout: git lfs pull"
    return "give a diffusers folder or a hub id: --model.path PATH"


def _absent_weights(folder: Path, config: Config) -> Path | None:
    """The first part of the model that has no weight file, or None."""
    parts = ["transformer", "vae", "text_encoder", "text_encoder_2"]
    parts += ["text_encoder_3"] if config.model.use_t5 else []
    for part in parts:
        if not any(file for pattern in _WEIGHTS for file in (folder / part).glob(pattern)):
            return folder / part
    return None


def _networks(config: Config, folder: Path | None, source: FileSource) -> tuple[Skeleton | None, FileSource]:
    """The networks without data: of the model's folder, else of the architecture that is known to be behind its id."""
    from ramctl.backbones import sd35_medium

    skeleton = None
    if folder is not None:
        skeleton, source = _skeleton(folder, config, source)
    if skeleton is not None or config.model.path != sd35_medium.HUB_ID:
        return skeleton, source
    from ramctl.plan_memory import build_skeleton

    with tempfile.TemporaryDirectory() as place:
        sd35_medium.write_configs(Path(place), with_t5=config.model.use_t5)
        skeleton = build_skeleton(Path(place), config, _tokens(Path(place)))
    note = "the shapes planned with are those of the known architecture, not read from the model"
    return skeleton, replace(source, detail=f"{source.detail} ({note})")


def _skeleton(folder: Path, config: Config, source: FileSource) -> tuple[Skeleton | None, FileSource]:
    """The networks without data, and the source again: a folder whose configurations cannot be read is no model."""
    from ramctl.plan_memory import build_skeleton

    try:
        return build_skeleton(folder, config, _tokens(folder)), source
    except (OSError, ValueError, KeyError, TypeError) as error:
        if source.status == "download":  # an incomplete cache
            return None, source
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return None, FileSource(source.name, "missing", f"{folder} is not a Stable Diffusion 3 model ({reason})")


def _tokens(folder: Path) -> int | None:
    """Tokens per prompt of the CLIP tokenizer, where it says so."""
    try:
        settings = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
        return int(settings["model_max_length"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prompt_files(config: Config) -> tuple[list[FileSource], list[Prompt], int | None]:
    """Both prompt files, the training prompts, and how many held-out prompts an evaluation uses."""
    source, prompts = _prompt_file("training prompts", config.prompts.train)
    if config.prompts.evaluation is None:
        return [source], prompts, None
    held_out_source, held_out = _prompt_file("held-out prompts", config.prompts.evaluation)
    if held_out_source.status == "missing":
        return [source, held_out_source], prompts, None
    wanted = config.evaluation.prompts
    return [source, held_out_source], prompts, min(wanted, len(held_out)) if wanted else len(held_out)


def _prompt_file(name: str, path: str) -> tuple[FileSource, list[Prompt]]:
    from ramctl.prompts import read_prompts

    file = find_resource(path)
    try:
        prompts = read_prompts(file)
    except DataError as error:
        return FileSource(name, "missing", str(error)), []
    return FileSource(name, "found", f"{file} ({len(prompts)} prompts)"), prompts


def _scorers(config: Config, prompts: list[Prompt]) -> tuple[ScorerStatus, ...]:
    """Each scorer of the reward, loaded and shown the training prompts."""
    from ramctl.scorers.composite import check_output
    from ramctl.scorers.registry import create

    statuses = []
    for name, term in config.reward.scorers.items():
        scorer = create(name, dict(term.options))
        try:
            scorer.ensure_loaded()
            scorer.check_prompts(prompts)
            if prompts:
                check_output(scorer, term.output, prompts[0])
        except (RamctlError, ImportError) as error:
            statuses.append(ScorerStatus(name, False, str(error)))
        else:
            statuses.append(ScorerStatus(name, True, "ready"))
    return tuple(statuses)
