"""Drawing pictures into folders: the library behind ``ramctl sample``, and the drawing half of ``ramctl evaluate``.

Pictures come from the same function as in training (:func:`ramctl.engine.rollout.generate`), the noise of each is keyed
by what it is for, and each is written as soon as it is drawn.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ramctl import __version__
from ramctl.engine.micro_batch import MicroBatch, auto_micro_batch, drawing_batch
from ramctl.engine.randomness import keyed_seed
from ramctl.engine.rollout import generate
from ramctl.engine.samplers import SAMPLERS, Sampler
from ramctl.errors import DataError, RamctlError, UsageError, did_you_mean
from ramctl.images import GRID, METADATA, Image, load_image, make_grid, save_png
from ramctl.lora_export import WithLora
from ramctl.prompts import Prompt, is_unicode, write_prompts
from ramctl.runfolder import numbered
from ramctl.scoring import write_whole

if TYPE_CHECKING:
    from torch import nn

    from ramctl.backbones.base import Backbone
    from ramctl.config import EvaluationSection
    from ramctl.sources import OpenModel, Source

#: phase, pictures done, pictures in all.
Progress = Callable[[str, int, int], None]

#: What was drawn and how, beside the pictures.
FACTS = "sampling.json"
_GRID_SIDE = 128
_GRID_PIXELS = 24_000_000


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are drawn: all that their look depends on besides weights and prompts.

    Raises:
        UsageError: a number that makes no sense.
    """

    sampling_steps: int
    guidance_scale: float
    negative_prompt: str
    seed: int
    images_per_prompt: int
    sampler: Sampler = "euler"

    def __post_init__(self) -> None:
        for name, least in (("sampling_steps", 1), ("images_per_prompt", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be {least} or more, got {getattr(self, name)}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UsageError(f"guidance_scale must be 0 or more (1 is none), got {self.guidance_scale}.")
        if not is_unicode(self.negative_prompt):
            raise UsageError(f"The negative prompt {self.negative_prompt!r} is not valid Unicode.")
        if self.sampler not in SAMPLERS:
            raise UsageError(
                f"There is no sampler {self.sampler!r}; choose {' or '.join(SAMPLERS)}."
                f"{did_you_mean(self.sampler, SAMPLERS)}"
            )

    @classmethod
    def of(cls, section: EvaluationSection) -> DrawSettings:
        """Those of a config's evaluation section."""
        return cls(
            section.sampling_steps,
            section.guidance_scale,
            section.negative_prompt,
            section.seed,
            section.images_per_prompt,
            section.sampler,
        )

    def changed(self, **values: Any) -> DrawSettings:
        """With these values; a None keeps what is there."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Picture:
    """One picture to draw: its file's name, its prompt and the seed of its noise."""

    name: str
    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Drawn:
    """What :func:`draw` found and did: ``kept`` pictures were there, those ``changed`` were there but other ones.

    ``hashes`` are the SHA-256 of the pictures' files by name, those of the pictures asked for.
    """

    kept: int
    changed: tuple[str, ...]
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Samples:
    """What :func:`sample` wrote. ``base`` is the untrained model's folder where it was asked for."""

    folder: Path
    images: int
    tuned: Path
    base: Path | None
    grid: Path


def picture_name(prompt: int, image: int, images_per_prompt: int) -> str:
    """``00012.png``, or ``00012-03.png`` where a prompt has several pictures."""
    return f"{prompt:05d}.png" if images_per_prompt == 1 else f"{prompt:05d}-{image:02d}.png"


def check_request(
    source: Source, prompts: Sequence[Prompt], output: Path | None, *, compare_base: bool, with_lora: bool = False
) -> None:
    """Refuse what :func:`sample` cannot do, before a model is loaded for it; raises the same errors."""
    if not prompts:
        raise UsageError("No prompts: give --prompt TEXT (repeatable) or --prompts FILE.")
    if not all(prompt.text.strip() for prompt in prompts):
        raise UsageError("A prompt is empty; write what the picture should show.")
    broken = next((prompt.text for prompt in prompts if not is_unicode(prompt.text)), None)
    if broken is not None:
        raise UsageError(f"The prompt {broken!r} is not valid Unicode; type it in a UTF-8 terminal, or use --prompts.")
    if compare_base and source.checkpoint is None and not with_lora:
        raise UsageError(
            f"{source.label} is a base model; --compare-base needs a checkpoint or a --lora to compare with it."
        )
    if output is not None:
        _check_output(output)


def _check_output(output: Path) -> None:
    """Refuse a folder that is in use, or that cannot be made."""
    if output.exists():
        if not output.is_dir():
            raise DataError(f"Output folder {output} is a file; choose another with --output.")
        if any(output.iterdir()):
            raise DataError(f"Output folder {output} exists and is not empty; choose another with --output.")
    there = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise DataError(f"Output folder {output} cannot be made in {there}; choose another with --output.")


def sample(
    model: OpenModel,
    prompts: Sequence[Prompt],
    settings: DrawSettings,
    *,
    output: Path | None = None,
    compare_base: bool = False,
    progress: Progress | None = None,
) -> Samples:
    """Draw pictures into a new folder that ``ramctl score`` reads.

    Pictures and ``metadata.jsonl`` lie in the folder itself; with ``compare_base`` in its subfolders ``tuned`` and
    ``base``, picture by picture from the same noise, and the grid shows each pair, the base on the left.

    Args:
        output: a folder that is not there yet or empty; None takes ``outputs/samples/<label>``, numbered when taken.

    Raises:
        UsageError: no prompts, an empty one, or ``compare_base`` for a base model.
        DataError: ``output`` is not empty.
    """
    check_request(model.source, prompts, output, compare_base=compare_base, with_lora=isinstance(model, WithLora))
    folder = output or numbered(Path("outputs") / "samples" / model.label)
    count = settings.images_per_prompt
    pictures = [
        # Keyed by prompt and picture apart: asking for more pictures leaves the first ones as they were.
        Picture(picture_name(p, i, count), prompt, keyed_seed(settings.seed, "sample", i, p))
        for p, prompt in enumerate(prompts)
        for i in range(count)
    ]
    tuned = folder / "tuned" if compare_base else folder
    base = folder / "base" if compare_base else None
    if base is not None:
        draw(model.backbone, model.base_network(), pictures, settings, base, phase="base", progress=progress)
    draw(model.backbone, model.network(), pictures, settings, tuned, phase="drawing", progress=progress)
    names = [picture.name for picture in pictures]
    save_png(_grid([tuned] if base is None else [base, tuned], names, count), folder / GRID)
    _write_facts(folder / FACTS, model, settings, compare_base)
    return Samples(folder, len(pictures) * (1 + compare_base), tuned, base, folder / GRID)


def draw(
    backbone: Backbone,
    network: nn.Module,
    pictures: Sequence[Picture],
    settings: DrawSettings,
    folder: Path,
    *,
    phase: str = "drawing",
    progress: Progress | None = None,
    micro_batch: int = 0,
    list_them: bool = True,
    hash_list: Path | None = None,
) -> Drawn:
    """Draw the pictures that are not in the folder yet, and list all of them in its ``metadata.jsonl``.

    A batch with a missing picture is drawn as a whole, so that each picture comes from the same batch, bit for bit,
    whether or not the work was interrupted.

    Args:
        hash_list: where the SHA-256 of each picture is noted before it gets its name (as ``sha256sum`` writes it,
            relative to the list's folder). A picture that is there but is not the one noted is drawn anew. Without a
            list, every picture that can be read counts as drawn.
    """
    size = micro_batch or auto_micro_batch(backbone.latent_shape, backbone.device, training=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RamctlError(f"Folder {folder} cannot be made: {error.strerror or error}.") from None
    at_once = drawing_batch(size)
    known = None if hash_list is None else read_hashes(hash_list)
    hashes: dict[str, str] = {}
    changed: list[str] = []
    kept = 0
    for start in range(0, len(pictures), size):
        batch = pictures[start : start + size]
        missing = []
        for i, picture in enumerate(batch):
            digest = _drawn_hash(folder / picture.name)
            if digest is not None and (known is None or known.get(_listed(folder, picture.name)) == digest):
                hashes[picture.name] = digest
                continue
            missing.append(i)
            if (folder / picture.name).exists():
                changed.append(picture.name)
        kept += len(batch) - len(missing)
        if missing:
            images = _generate(backbone, network, batch, settings, at_once)
            hashes.update({batch[i].name: _save_whole(images[i], folder / batch[i].name, hash_list) for i in missing})
        if progress is not None:
            progress(phase, start + len(batch), len(pictures))
    if list_them:
        list_pictures(folder, pictures)
    return Drawn(kept, tuple(changed), hashes)


def _generate(
    backbone: Backbone, network: nn.Module, batch: Sequence[Picture], settings: DrawSettings, at_once: MicroBatch
) -> Image:
    return generate(
        backbone,
        network,
        [picture.prompt.text for picture in batch],
        [picture.seed for picture in batch],
        steps=settings.sampling_steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt,
        sampler=settings.sampler,
        micro_batch=at_once,
    ).images


def read_hashes(path: Path) -> dict[str, str]:
    """A list as ``sha256sum`` writes it, by file; of a file listed twice the later line, broken lines left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    parted = [line.partition("  ") for line in lines]
    return {name: digest for digest, gap, name in parted if gap and len(digest) == 64}


def write_hashes(path: Path, folder: Path, hashes: Mapping[str, str]) -> None:
    """Replace a list by that of these pictures of a folder beside it.

    Raises:
        RamctlError: it cannot be written.
    """
    write_whole(path, "".join(f"{digest}  {_listed(folder, name)}\n" for name, digest in hashes.items()))


def _note(path: Path, line: str) -> None:
    """Append a line in one piece, so that several processes can; on a line of its own after one cut short."""
    with path.open("ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        torn = size > 0 and stream.read() != b"\n"
        stream.write((("\n" if torn else "") + line).encode())


def _listed(folder: Path, name: str) -> str:
    return f"{folder.name}/{name}"


def list_pictures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write the ``metadata.jsonl`` of a folder of pictures."""
    write_prompts(
        folder / METADATA,
        [Prompt(p.prompt.text, {"file_name": p.name, **_without_file(p.prompt)}) for p in pictures],
    )


def _without_file(prompt: Prompt) -> dict[str, Any]:
    return {key: value for key, value in prompt.metadata.items() if key not in ("file_name", "file")}


def _drawn_hash(path: Path) -> str | None:
    """The SHA-256 of a picture's file, None where there is no readable picture."""
    if not path.is_file():
        return None
    try:
        load_image(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (DataError, OSError):
        return None  # cut off while it was written


def _save_whole(image: Image, path: Path, hash_list: Path | None) -> str:
    """Write a picture under a hidden name first, so that a file with its name is whole; its SHA-256.

    The hash is noted before that name is given: a picture that is there and not noted is none of ours.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        save_png(image, temporary)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        if hash_list is not None:
            _note(hash_list, f"{digest}  {_listed(path.parent, path.name)}\n")
        temporary.replace(path)
        return digest
    except OSError as error:
        raise RamctlError(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        temporary.unlink(missing_ok=True)


def _grid(folders: Sequence[Path], names: Sequence[str], per_prompt: int) -> Image:
    """One line per prompt (a single prompt's pictures in a square), the folders' pictures of one name side by side.

    Only the first prompts are shown where all would make a picture too large to open.
    """
    side = len(load_image(folders[0] / names[0]))
    scale = max(1, _GRID_SIDE // side)
    columns = per_prompt * len(folders)
    if len(names) == per_prompt:
        columns = math.ceil(math.sqrt(len(names))) * len(folders)
    shown = max(per_prompt, min(len(names), _GRID_PIXELS // ((side * scale) ** 2 * len(folders))))
    images = [load_image(folder / name) for name in names[: shown - shown % per_prompt] for folder in folders]
    return make_grid(np.stack(images), columns, scale=scale)


def _write_facts(path: Path, model: OpenModel, settings: DrawSettings, compare_base: bool) -> None:
    facts = {
        "ramctl": __version__,
        "source": model.label,
        "checkpoint": str(model.checkpoint) if model.checkpoint else None,
        "model": model.model.model_dump(),
        "weights": model.which if model.checkpoint else "base",
        **({"lora": str(model.file)} if isinstance(model, WithLora) else {}),
        "sha256": model.hashes,
        "device": model.backbone.device.type,
        "precision": model.precision,
        "compare_base": compare_base,
        **asdict(settings),
    }
    write_whole(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
