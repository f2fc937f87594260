"""How ``ramctl train --dry-run`` shows a plan: tables for people, ``RESULT plan.…`` lines for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ramctl.cli._output import result, say, table

if TYPE_CHECKING:
    from ramctl.plan import Plan
    from ramctl.settings import Settings

_UNKNOWN = "unknown until the model is there"
_MARKS = {"found": "✓", "download": "↓", "missing": "✗"}


def show_plan(settings: Settings, *, processes: int) -> None:
    """Print the resolved settings and the plan of the run they describe; nothing is trained.

    Raises:
        ConfigError: the settings do not fit the model.
        UsageError: a scorer or one of its options does not exist.
    """
    from ramctl.plan import make_plan
    from ramctl.settings import settings_toml

    plan = make_plan(settings.config, processes, settings.config.runtime.device)
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
    table("Files and scorers", ("", "what", "where"), _source_rows(plan))
    for problem in plan.problems:
        say(f"✗ {problem}", style="red")
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
    rows += [(name, _size(value)) for name, value in memory.phases.items()]
    free = "unknown here" if memory.available is None else _size(memory.available)
    shared = f", shared by {memory.sharers} processes" if memory.sharers > 1 else ""
    return [*rows, ("free", free + shared)]


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
        found["memory.free"] = plan.memory.available
    if plan.disk is not None:
        found |= {"disk.checkpoint": plan.disk.checkpoint, "disk.most": plan.disk.most, "disk.free": plan.disk.free}
    found["model"] = plan.sources[0].status
    found |= {f"scorer.{scorer.name}": "ready" if scorer.ready else "missing" for scorer in plan.scorers}
    found["problems"] = len(plan.problems)
    return found


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
