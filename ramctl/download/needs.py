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

    A name is a preset, an entry or a scorer, looked for in that order: a preset's name brings all that the preset
    needs; an entry's name the entry and, where a scorer has the same name, what else that scorer reads; a scorer's name
    what it reads with any of its engines. ``scorer:NAME`` and ``preset:NAME`` mean one of the two. Optional parts come
    along, except those in ``without``.

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
    shipped = _presets()
    for name in PAPER_PRESETS:
        if name in shipped:
            _merge(wanted, preset_needs(name))
    for entry in load_manifest().values():
        if not entry.on_request:
            _merge(wanted, [Need(entry)])
    return _in_order(wanted, without)


def inventory(without: Iterable[str] = ()) -> list[Need]:
    """All entries there are, with all their parts.

    Raises:
        UsageError: no entry has a part of ``without``.
    """
    return _in_order({name: frozenset(entry.parts) for name, entry in load_manifest().items()}, without)


def left_out(needs: Iterable[Need]) -> list[Entry]:
    """The entries fetched on request only that are not among ``needs``."""
    wanted = {need.entry.name for need in needs}
    return [entry for entry in load_manifest().values() if entry.on_request and entry.name not in wanted]


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
    for scorer, term in config.reward.scorers.items():
        _merge(wanted, scorer_needs(scorer, term.options))
    return _in_order(wanted)


def scorer_needs(name: str, options: Mapping[str, object] | None = None) -> list[Need]:
    """The entries a scorer reads; none for one that needs no download.

    Args:
        name: the scorer's.
        options: those it is set up with; None: what any of its engines reads.
    """
    return [
        _whole(entry)
        for entry in load_manifest().values()
        if any(_is_read_by(user, name, options) for user in entry.used_by)
    ]


def argument_for(entry: Entry) -> str:
    """What to type for an entry alone: where a preset has its name, too, ``scorer:`` keeps the preset's model out."""
    scorer = f"scorer:{entry.name}"
    return scorer if scorer in entry.used_by and entry.name in _presets() else entry.name


def _named(name: str) -> list[Need]:
    kind, _, rest = name.partition(":")
    scorers, presets = _scorers(), _presets()
    if kind == "scorer" and rest:
        return scorer_needs(_known(rest, scorers, "scorer"))
    if kind == "preset" and rest:
        return preset_needs(_known(rest, presets, "preset"))
    manifest = load_manifest()
    if name in presets:
        return preset_needs(name)
    if name in manifest:
        return [_whole(manifest[name]), *scorer_needs(name)]
    if name in scorers:
        return scorer_needs(name)
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


def _is_read_by(user: str, name: str, options: Mapping[str, object] | None) -> bool:
    """Whether ``user``, of an entry's ``used_by``, is the scorer ``name`` set up with these options."""
    kind, _, scorer = user.partition(":")
    scorer, _, engine = scorer.partition(".")
    return (kind, scorer) == ("scorer", name) and (not engine or options is None or options.get("engine") == engine)


def _presets() -> set[str]:
    return {preset.name for preset in list_presets()}


def _scorers() -> set[str]:
    """The scorers there are, and those the manifest speaks of."""
    users = (user.partition(":") for entry in load_manifest().values() for user in entry.used_by)
    return {*available(), *(name.partition(".")[0] for kind, _, name in users if kind == "scorer")}


def _merge(wanted: dict[str, frozenset[str]], needs: Iterable[Need]) -> None:
    for need in needs:
        wanted[need.entry.name] = wanted.get(need.entry.name, frozenset()) | need.parts


def _in_order(wanted: Mapping[str, frozenset[str]], without: Iterable[str] = ()) -> list[Need]:
    left_out = frozenset(without)
    known = {part for entry in load_manifest().values() for part in entry.parts}
    for part in left_out - known:
        raise UsageError(f"There is no optional part {part!r}. There is {', '.join(sorted(known)) or 'none'}.")
    return [Need(entry, wanted[name] - left_out) for name, entry in load_manifest().items() if name in wanted]
