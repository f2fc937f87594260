"""What ``ramctl doctor`` says of scorers and presets: ready, or what is missing with the command that gets it.

A scorer is also tried on its pictures with known answers where that is cheap, or where an embedded preset stands on it.
Those whose weights are downloaded are gigabytes to load and are tried only when asked (``--deep``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ramctl.doctor_check import Check, CheckFunction, Status
from ramctl.errors import MissingDependencyError, RamctlError
from ramctl.settings import Settings


@dataclass
class Setup:
    """A scorer with its options (as given, and with its defaults filled in) and the presets that use it so."""

    name: str
    options: Mapping[str, object]
    filled_in: Mapping[str, object]
    presets: list[Settings] = field(default_factory=list)

    @property
    def required(self) -> bool:
        """Whether a preset on the embedded model uses it, so that its absence is a failure."""
        return any(embedded(preset) for preset in self.presets)


def embedded(preset: Settings) -> bool:
    """Whether a preset's model travels with ramctl."""
    return preset.config.model.path.startswith("models/")


def scorer_checks(presets: Iterable[Settings], *, deep: bool) -> Iterator[tuple[str, CheckFunction]]:
    """Every scorer as it is by default, and as the presets set it up where that is something else.

    Args:
        presets: the presets that could be read.
        deep: try those with downloaded weights, too.
    """
    for setup in _setups(presets):
        default = setup.options == {}
        label = f"scorer {setup.name}" + ("" if default else f" ({setup.presets[0].config.name})")
        tried = deep or setup.required or not _has_downloaded_weights(setup.name)
        yield label, partial(check_scorer, label, setup.name, setup.options, setup.required, tried=tried)


def check_scorer(label: str, name: str, options: Mapping[str, object], required: bool, *, tried: bool = True) -> Check:
    """Whether a scorer has all it needs and, if ``tried``, loads and judges its bundled pictures right.

    Args:
        label: the name of the check.
        name: the scorer's name in the registry.
        options: its options.
        required: a preset on the embedded model uses it, so that its absence is a failure.
        tried: load it; without, only what it would read is looked for.
    """
    from ramctl.scorers.registry import create

    absent: Status = "failed" if required else "warning"
    try:
        scorer = create(name, options)
        missing = scorer.missing()
        if missing:
            return Check(label, absent, "; ".join(missing), _download_command("scorer", name, missing))
        if not tried:
            return Check(label, "ok", f"all there, not tried (ramctl doctor --deep does): {scorer.version}")
        test = scorer.self_test()
    except (MissingDependencyError, ImportError) as error:
        advice = "" if isinstance(error, MissingDependencyError) else "pip install --upgrade ramctl"
        return Check(label, absent, str(error), advice)
    except RamctlError as error:
        return Check(label, "failed", str(error))
    if not test.passed:
        remedy = "Its scores cannot be trusted on this machine; compare the packages above with ramctl's."
        return Check(label, "failed", f"self-test failed: {test.summary}", remedy)
    return Check(label, "ok", f"ready: {test.summary}")


def check_preset(preset: Settings) -> Check:
    """Whether a preset has its model, its prompts and what its scorers read; nothing is loaded."""
    label = f"preset {preset.config.name}"
    lacks = [*_missing_sources(preset), *_missing_of_scorers(preset)]
    if not lacks:
        return Check(label, "ok", "has its model, prompts and scorers")
    status: Status = "failed" if embedded(preset) else "warning"
    return Check(label, status, f"lacks {'; '.join(lacks)}", _download_command("preset", preset.config.name, lacks))


def _missing_sources(preset: Settings) -> list[str]:
    """The model and the prompt files that are not on this machine, as ``train --dry-run`` would say it."""
    from ramctl.plan import model_source, prompt_files

    sources = [model_source(preset.config)[1], *prompt_files(preset.config)[0]]
    return [f"{source.name}: {source.detail}" for source in sources if source.status != "found"]


def _missing_of_scorers(preset: Settings) -> list[str]:
    from ramctl.scorers.registry import create

    lacks = []
    for name, term in preset.config.reward.scorers.items():
        try:
            lines = create(name, dict(term.options)).missing()
        except (RamctlError, ImportError) as error:
            lines = [str(error)]
        lacks += [f"scorer {name}: {line}" for line in lines]
    return lacks


def _setups(presets: Iterable[Settings]) -> list[Setup]:
    """The defaults of every scorer, then the other setups that presets use; each once."""
    from ramctl.scorers.registry import available

    setups = [Setup(name, {}, _default_options(name)) for name in available()]
    for preset in presets:
        for name, term in preset.config.reward.scorers.items():
            options = dict(term.options)
            filled_in = {**_default_options(name), **options}
            known = next((setup for setup in setups if (setup.name, setup.filled_in) == (name, filled_in)), None)
            if known is None:
                known = Setup(name, options, filled_in)
                setups.append(known)
            known.presets.append(preset)
    return setups


def _has_downloaded_weights(name: str) -> bool:
    """Whether a manifest entry belongs to the scorer."""
    from ramctl.weights import load_manifest

    return any(f"scorer:{name}" in entry.used_by for entry in load_manifest().values())


def _download_command(kind: str, name: str, lacks: Iterable[str]) -> str:
    """The command that fetches all of a scorer's or preset's downloads; empty when none is lacking.

    What a scorer reports ends at the first absent file, so its own line need not name every download.
    """
    command = "ramctl download-weights"
    return f"All its downloads: {command} {kind}:{name}" if any(command in line for line in lacks) else ""


def _default_options(name: str) -> dict[str, Any]:
    """A scorer's options as they are without a preset; empty for an unknown one, which its check reports."""
    import inspect

    from ramctl.scorers.registry import create

    try:
        parameters = inspect.signature(type(create(name)).__init__).parameters.values()
    except (RamctlError, ImportError):
        return {}
    return {item.name: item.default for item in parameters if item.default is not item.empty}
