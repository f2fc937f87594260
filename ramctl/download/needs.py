"""From what a user names - an entry, a scorer, a preset - to the entries it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from ramctl.errors import UsageError, did_you_mean
from ramctl.scorers.registry import available
from ramctl.settings import list_presets, load_settings
from ramctl.weights import Entry, load_manifest

#: The paper's experiments; what they and an evaluation need is what is fetched when nothing is named.
PAPER_PRESETS = ("geneval", "ocr", "pickscore")
_T5 = "t5"


@dataclass(frozen=True)
class Need:
    """An entry with the optional parts that are wanted of it."""

    entry: Entry
    parts: frozenset[str] = frozenset()


def resolve(names: Iterable[str], without: Iterable[str] = ()) -> list[Need]:
    """The entries that the named things take, each once, in the manifest's order.

    A name is an entry, a scorer or a preset. An entry's name brings the entry and, where a scorer has the same name,
    what else that scorer reads. Another name brings what the scorer and the preset of that name need. ``scorer:NAME``
    and ``preset:NAME`` mean one of the two. Optional parts come along, except those in ``without``.

    Raises:
        UsageError: nothing has that name, or no entry has such a part.
    """
    wanted: dict[str, frozenset[str]] = {}
    for name in names:
        _merge(wanted, _named(name))
    return _in_order(wanted, without)


def everything(without: Iterable[str] = ()) -> list[Need]:
    """What the paper's presets and the metrics of an evaluation take, without the entries fetched on request only.

    Raises:
        UsageError: no entry has a part of ``without``.
    """
    wanted: dict[str, frozenset[str]] = {}
    shipped = {preset.name for preset in list_presets()}
    for name in PAPER_PRESETS:
        if name in shipped:
            _merge(wanted, preset_needs(name))
    for entry in load_manifest().values():
        if not entry.on_request:
            _merge(wanted, [Need(entry)])
    return _in_order(wanted, without)


def preset_needs(name: str) -> list[Need]:
    """What a shipped preset takes: its model, its prompts in the store, what its scorers read.

    A preset on a model that ramctl ships needs nothing: its scorers do without downloads, too.

    Raises:
        ConfigError: no preset of that name, or one that cannot be read.
    """
    config = load_settings(name).config
    wanted: dict[str, frozenset[str]] = {}
    base = next((entry for entry in load_manifest().values() if entry.repo == config.model.path), None)
    if base is None:
        return []
    _merge(wanted, [Need(base, frozenset({_T5} & set(base.parts)) if config.model.use_t5 else frozenset())])
    for file in (config.prompts.train, config.prompts.evaluation):
        first, *rest = PurePosixPath(str(file)).parts
        if first == "weights" and rest and rest[0] in load_manifest():
            _merge(wanted, [Need(load_manifest()[rest[0]])])
    for scorer in config.reward.scorers:
        _merge(wanted, scorer_needs(scorer))
    return _in_order(wanted)


def scorer_needs(name: str) -> list[Need]:
    """The entries a scorer reads; none for one that needs no download."""
    return [_whole(entry) for entry in load_manifest().values() if f"scorer:{name}" in entry.used_by]


def _named(name: str) -> list[Need]:
    kind, _, rest = name.partition(":")
    scorers = _scorers()
    presets = {preset.name for preset in list_presets()}
    if kind == "scorer" and rest:
        return scorer_needs(_known(rest, scorers, "scorer"))
    if kind == "preset" and rest:
        return preset_needs(_known(rest, presets, "preset"))
    manifest = load_manifest()
    if name in manifest:
        return [_whole(manifest[name]), *scorer_needs(name)]
    if name in scorers or name in presets:
        return scorer_needs(name) + (preset_needs(name) if name in presets else [])
    known = dict.fromkeys([*manifest, *scorers, *presets])
    raise UsageError(
        f"Nothing that can be downloaded is called {name!r}.{did_you_mean(name, known)} "
        "`ramctl download-weights --list` shows what there is."
    )


def _whole(entry: Entry) -> Need:
    return Need(entry, frozenset(entry.parts))


def _known(name: str, names: Iterable[str], kind: str) -> str:
    names = list(names)
    if name not in names:
        raise UsageError(f"There is no {kind} {name!r}.{did_you_mean(name, names)}")
    return name


def _scorers() -> set[str]:
    """The scorers there are, and those the manifest speaks of."""
    users = (user for entry in load_manifest().values() for user in entry.used_by)
    return {*available(), *(user.removeprefix("scorer:") for user in users if user.startswith("scorer:"))}


def _merge(wanted: dict[str, frozenset[str]], needs: Iterable[Need]) -> None:
    for need in needs:
        wanted[need.entry.name] = wanted.get(need.entry.name, frozenset()) | need.parts


def _in_order(wanted: Mapping[str, frozenset[str]], without: Iterable[str] = ()) -> list[Need]:
    left_out = frozenset(without)
    known = {part for entry in load_manifest().values() for part in entry.parts}
    for part in left_out - known:
        raise UsageError(f"There is no optional part {part!r}. There is {', '.join(sorted(known)) or 'none'}.")
    return [Need(entry, wanted[name] - left_out) for name, entry in load_manifest().items() if name in wanted]
