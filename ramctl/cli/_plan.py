"""How ``ramctl train --dry-run`` shows a plan: tables for people, ``RESULT plan.…`` lines for scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ramctl.cli._output import result, say, table
from ramctl.errors import UsageError
from ramctl.plan import SCORERS

if TYPE_CHECKING:
    from pathlib import Path

    from ramctl.plan import Memory, Plan
    from ramctl.settings import Settings

_GIB = 2**30
_UNKNOWN = "unknown until the model is there"
_MARKS = {"found": "✓", "download": "↓", "missing": "✗"}


def show_plan(
    settings: Settings, *, processes: int, gpu_memory: float | None = None, output: Path | None = None
) -> None:
    """Print the resolved settings and the plan of the run they describe; nothing is trained.

    Args:
        settings: the run's.
        processes: how many share each step.
        output: the run folder; ``outputs/<name>`` by default.
        gpu_memory: GiB of a GPU to plan for instead of this machine's devices: cards sold with 24 GB have 24 GiB.

    Raises:
        ConfigError: the settings do not fit the model.
        UsageError: a scorer or one of its options does not exist, or a card is asked about for a run on the CPU.
    """
    from ramctl.plan import make_plan
    from ramctl.settings import settings_toml

    if gpu_memory is not None and not math.isfinite(gpu_memory):
        raise UsageError(f"--gpu-memory is {gpu_memory}; give the card's memory in GB, e.g. --gpu-memory 24.")
    card = None if gpu_memory is None else int(gpu_memory * _GIB)
    plan = make_plan(settings.config, processes, settings.config.runtime.device, card, output)
    say(settings_toml(settings, [f"{plan.name}, resolved; comments say where a value came from"]).rstrip() + "\n")
    render_plan(plan)


def render_plan(plan: Plan) -> None:
    """Tables on standard error, ``RESULT plan.<key>=<value>`` lines on standard output."""
    table(
        f"One step of {plan.name} ({plan.steps} steps, {plan.sizes.processes} × {plan.device})",
        ("phase", "forwards", "at once", "passes per process"),
        _step_rows(plan),
    )
    table("Sizes", ("what", "number"), _size_rows(plan))
    table("Memory per process", ("phase", "estimate"), _memory_rows(plan))
    if plan.memory is not None:
        say(_not_counted(plan.memory))
    table("Files and scorers", ("", "what", "where"), _source_rows(plan))
    for problem in plan.problems:
        say(f"✗ {problem}", style="red")
    if plan.memory is not None:
        say(_verdict(plan.memory, plan.device), style=None if plan.memory.fits else "red")
    for key, value in _results(plan).items():
        result(f"plan.{key}", value)


def _step_rows(plan: Plan) -> list[tuple[object, ...]]:
    forwards, batches = plan.forwards, plan.micro_batches

    def shown(value: int | None) -> object:
        return "?" if value is None else value

    return [
        ("sample", forwards.sampling, shown(batches.sampling), shown(batches.sampling_batches)),
        ("sweep", forwards.sweeps, shown(batches.sweep), shown(batches.sweep_batches)),
        ("train (and backward)", forwards.training, shown(batches.training), shown(batches.training_batches)),
    ]


def _size_rows(plan: Plan) -> list[tuple[object, ...]]:
    sizes, parameters, disk = plan.sizes, plan.parameters, plan.disk
    rows: list[tuple[object, ...]] = [
        ("prompts per step", sizes.prompts),
        ("pictures per step", f"{sizes.images} ({sizes.images_per_process} per process)"),
        ("items per step", f"{sizes.items} ({sizes.items_per_process} per process)"),
        ("optimizer updates per step", sizes.updates),
    ]
    if sizes.evaluation_images is not None:
        rows.append(("pictures per evaluation", sizes.evaluation_images))
    if parameters is None or disk is None:
        return [*rows, ("parameters", _UNKNOWN)]
    return [
        *rows,
        ("transformer parameters", _millions(parameters.transformer)),
        ("trained parameters", _millions(parameters.trainable)),
        ("text encoder parameters", _millions(parameters.text_encoders)),
        ("autoencoder parameters", _millions(parameters.vae)),
        ("one checkpoint", _size(disk.checkpoint)),
        ("checkpoints at most", f"{_size(disk.most)} ({_size(disk.free)} free for {disk.folder})"),
    ]


def _memory_rows(plan: Plan) -> list[tuple[object, ...]]:
    memory = plan.memory
    if memory is None:
        return [("all", _UNKNOWN)]
    always = sum(memory.resident.values())
    largest = sorted(memory.resident.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {_size(value)}" for name, value in largest)
    rows: list[tuple[object, ...]] = [("always", f"{_size(always)} ({parts}, …)")]
    if memory.resident[SCORERS]:
        rows.append((f"of it {SCORERS}", _size(memory.resident[SCORERS])))
    rows += [(name, _size(value)) for name, value in memory.phases.items()]
    if memory.card and memory.available is not None:
        return [*rows, ("the card", f"{_size(memory.available)} ({_gib(memory.available)} GiB)")]
    free = "unknown here" if memory.available is None else _size(memory.available)
    shared = f", shared by {memory.sharers} processes" if memory.sharers > 1 else ""
    return [*rows, ("free", free + shared)]


def _not_counted(memory: Memory) -> str:
    """What the estimate leaves out."""
    weights = f" the weights of the scorer {', '.join(memory.uncounted)};" if memory.uncounted else ""
    return (
        f"Not counted:{weights} what the scorers' and the text encoders' passes take beside their weights, and what "
        "the allocator loses to fragmentation."
    )


def _verdict(memory: Memory, device: str) -> str:
    """One line: whether the largest phase fits, and by how much."""
    phase = max(memory.phases, key=lambda name: memory.phases[name])
    peak = f"the peak is {_size(memory.peak)} ({phase})"
    if memory.available is None:
        return f"Fits? {peak} per process; what is free is unknown here. --gpu-memory 24 asks about a card with 24 GB."
    if memory.sharers > 1:
        peak += f" in each of {memory.sharers} processes"
    spare = memory.available - memory.peak * memory.sharers
    difference = f"{_size(spare)} to spare" if spare >= 0 else f"{_size(-spare)} too much"
    if memory.card:
        size = _gib(memory.available)
        place = f"{size} GB (a card of {size} GiB = {_size(memory.available)}, with nothing else on it)"
    else:
        place = f"the {_size(memory.available)} free on this {'GPU' if device == 'cuda' else 'machine'}"
    answer = "✓ fits" if memory.fits else "✗ does not fit"
    hint = "" if memory.card else "; --gpu-memory 24 asks about a card with 24 GB"
    return f"{answer} {place}: {peak}, {difference}{hint}"


def _source_rows(plan: Plan) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = [(_MARKS[s.status], s.name, s.detail) for s in plan.sources]
    return rows + [(_MARKS["found" if s.ready else "missing"], f"scorer {s.name}", s.detail) for s in plan.scorers]


def _results(plan: Plan) -> Mapping[str, object]:
    sizes, forwards, batches = plan.sizes, plan.forwards, plan.micro_batches
    found: dict[str, object] = {
        "device": plan.device,
        "processes": sizes.processes,
        "steps": plan.steps,
        "prompts_per_step": sizes.prompts,
        "images_per_step": sizes.images,
        "images_per_process": sizes.images_per_process,
        "items_per_step": sizes.items,
        "items_per_process": sizes.items_per_process,
        "updates_per_step": sizes.updates,
        "evaluation_images": sizes.evaluation_images,
        "forwards.sample": forwards.sampling,
        "forwards.sweep": forwards.sweeps,
        "forwards.train": forwards.training,
        "micro_batch.sample": batches.sampling,
        "micro_batch.sweep": batches.sweep,
        "micro_batch.train": batches.training,
    }
    if plan.parameters is not None:
        found["parameters.transformer"] = plan.parameters.transformer
        found["parameters.trained"] = plan.parameters.trainable
        found["parameters.text_encoders"] = plan.parameters.text_encoders
        found["parameters.vae"] = plan.parameters.vae
    if plan.memory is not None:
        found |= {f"memory.{name}": value for name, value in plan.memory.phases.items()}
        found["memory.scorers"] = plan.memory.resident[SCORERS]
        found["memory.free"] = plan.memory.available
        found["peak_gb"] = plan.memory.peak / 1e9
        found["fits"] = None if plan.memory.available is None else plan.memory.fits
    if plan.disk is not None:
        found |= {"disk.checkpoint": plan.disk.checkpoint, "disk.most": plan.disk.most, "disk.free": plan.disk.free}
    found["model"] = plan.sources[0].status
    found |= {f"scorer.{scorer.name}": "ready" if scorer.ready else "missing" for scorer in plan.scorers}
    found["problems"] = len(plan.problems)
    return found


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _gib(count: int) -> str:
    return f"{count / _GIB:.4g}"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
