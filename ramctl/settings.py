"""Reading presets: files laid over one another, overrides on top, and where every value came from.

Precedence: the schema's default, then the preset (over the one it ``extends``), then the config file, then
the command line. Tables are merged key by key; lists are replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ramctl import config_keys
from ramctl.config import Config
from ramctl.config_keys import (
    KeyInfo,
    all_keys,
    dotted,
    explain,
    find_keys,
    parse_overrides,
    toml_key,
    toml_value,
)
from ramctl.errors import ConfigError, did_you_mean
from ramctl.resources import resource_dir

__all__ = [
    "COMMAND_LINE",
    "DEFAULT",
    "KeyInfo",
    "PresetInfo",
    "Settings",
    "all_keys",
    "config_differences",
    "explain",
    "find_keys",
    "list_presets",
    "load_settings",
    "parse_overrides",
    "settings_toml",
    "write_settings",
]

DEFAULT = "default"
COMMAND_LINE = "command line"
_OWN_KEYS = ("name", "description")
_RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


@dataclass(frozen=True)
class Settings:
    """A configuration and, for each of its keys (``optimizer.lr``), where the value came from.

    A source is ``default``, ``preset NAME``, ``file PATH`` or ``command line``.
    """

    config: Config
    provenance: Mapping[str, str]


@dataclass(frozen=True)
class PresetInfo:
    """A shipped preset."""

    name: str
    description: str
    path: Path


def load_settings(
    preset: str, *, config_file: Path | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> Settings:
    """The settings of a preset with a config file and command-line overrides laid over it.

    Args:
        preset: a shipped preset's name, or the path of a TOML file (with ``.toml`` or a slash in it).
        config_file: a TOML file of the same keys.
        overrides: pairs (key, text); keys as :func:`ramctl.config_keys.resolve_key` reads them, text in the
            form of the key's type, ``none`` for no value.

    Raises:
        ConfigError: a file is absent or no TOML; a key is unknown, of a wrong type or impossible.
    """
    layers = _Layers()
    for label, table in _preset_tables(preset):
        layers.add(table, label)
    if config_file is not None:
        label = f"file {config_file}"
        table = _read_toml(config_file, label)
        if "extends" in table:
            raise ConfigError(
                f"'extends' works in presets only ({label}). Give the file as the preset: ramctl train {config_file}"
            )
        layers.add(table, label)
    for key, text in overrides:
        path = config_keys.resolve_key(key, config_keys.ON_COMMAND_LINE)
        leaf = config_keys.find_leaf(path)
        assert leaf is not None
        layers.set(path, config_keys.parse_text(leaf, text), COMMAND_LINE)
    config = layers.validate()
    sources = {dotted(path): layers.sources.get(path, DEFAULT) for path, _ in _flatten(config.model_dump())}
    return Settings(config, MappingProxyType(sources))


def list_presets() -> list[PresetInfo]:
    """The shipped presets by name; one that cannot be read says so in its description."""
    presets = []
    for path in sorted(resource_dir("presets").glob("*.toml")):
        try:
            description = str(_read_toml(path, f"preset {path.stem}").get("description", ""))
        except ConfigError as error:
            description = f"cannot be read: {error}"
        presets.append(PresetInfo(path.stem, description, path))
    return presets


def settings_toml(settings: Settings, header_lines: Sequence[str] = ()) -> str:
    """The resolved configuration as TOML; each line's comment says where its value came from.

    Keys without a value stand as comments. Read back, it gives an equal ``config``.
    """
    lines = [f"# {line}".rstrip() for text in header_lines for line in (text.splitlines() or [""])]
    lines += _table_lines(settings.config.model_dump(), (), settings.provenance)
    return "\n".join(lines) + "\n"


def write_settings(settings: Settings, path: Path, header_lines: Sequence[str] = ()) -> None:
    """Write :func:`settings_toml` to ``path``, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(settings_toml(settings, header_lines), encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def config_differences(a: Config, b: Config) -> list[str]:
    """The keys whose values differ, one line each: ``optimizer.lr: 0.001 → 0.0005``."""
    old, new = dict(_flatten(a.model_dump())), dict(_flatten(b.model_dump()))
    lines = []
    for path in dict.fromkeys((*old, *new)):
        before = toml_value(old[path]) if path in old else "absent"
        after = toml_value(new[path]) if path in new else "absent"
        if before != after:
            lines.append(f"{dotted(path)}: {_bare_none(before)} → {_bare_none(after)}")
    return lines


class _Layers:
    """Tables laid over one another, and the source of each value in them."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.sources: dict[config_keys.Path, str] = {}
        self.problems: list[str] = []
        self._label = DEFAULT

    def add(self, table: Mapping[str, Any], label: str) -> None:
        """Lay a table over what is there."""
        self._label = label
        self._add(table, (), label)

    def _add(self, table: Mapping[str, Any], prefix: config_keys.Path, label: str) -> None:
        for name, value in table.items():
            path = (*prefix, name)
            if isinstance(value, Mapping) and config_keys.find_leaf(path) is None:
                self._node(path)
                self._add(value, path, label)
                # An unknown or empty table has no known value that would carry its source.
                self.sources[path] = label
            elif config_keys.is_table(path) and not isinstance(value, Mapping):
                self.problems.append(f"{dotted(path)} must be a table, got {_shown(value)} ({label}).")
            else:
                self.set(path, value, label)

    def set(self, path: config_keys.Path, value: Any, label: str) -> None:
        """Give one key a value."""
        self._node(path[:-1])[path[-1]] = config_keys.read_none(config_keys.find_leaf(path), value)
        self.sources[path] = label

    def _node(self, path: config_keys.Path) -> dict[str, Any]:
        node = self.data
        for part in path:
            # Only an unknown key can hold a value in one file and a table in another.
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        return node

    def validate(self) -> Config:
        """The configuration.

        Raises:
            ConfigError: the first problem and how many more there are.
        """
        problems = list(self.problems)
        config = None
        try:
            config = Config.model_validate(self.data)
        except ValidationError as error:
            details = error.errors(include_url=False)
            # A misspelled key comes first: what is missing is often the same slip.
            details.sort(key=lambda item: item["type"] != "extra_forbidden")
            if not problems:
                problems = list(dict.fromkeys(self._translate(item) for item in details))
        if problems or config is None:
            more = len(problems) - 1
            suffix = "" if not more else f"\n({more} more problem{'s' if more > 1 else ''} after this one)"
            raise ConfigError(problems[0] + suffix)
        return config

    def _translate(self, error: ErrorDetails) -> str:
        """One error of pydantic in plain words."""
        kind = error["type"]
        location = tuple(str(part) for part in error["loc"])
        if kind == "missing":
            return self._missing(location)
        path = self._existing(location)
        if kind == "extra_forbidden":
            source = self._source(path)
            where = f"on the {source}" if source == COMMAND_LINE else f"in {source}"
            return f"Unknown key {dotted(path)!r} {where}.{config_keys.suggestion(path)}"
        if kind == "value_error":
            return self._rule_broken(path, str(error["ctx"]["error"]))
        leaf = config_keys.find_leaf(path)
        wanted = "a table" if leaf is None else config_keys.type_words(leaf)
        if leaf is not None and (kind in _RANGE_ERRORS or kind == "string_pattern_mismatch"):
            wanted = config_keys.range_words(leaf)
        elif kind == "finite_number":
            wanted = "a finite number"
        return f"{dotted(path)} must be {wanted}, got {_shown(self._value(path))} ({self._source(path)})."

    def _missing(self, path: config_keys.Path) -> str:
        leaf = config_keys.find_leaf(path)
        where = self._source(path[:-1]) if len(path) > 1 else self._label
        if leaf is not None:
            return f"{dotted(path)} is missing ({where}): {leaf.field.description}."
        needed = [dotted(item.path) for item in config_keys.keys_below(path) if item.field.is_required()] or [
            "at least one key"
        ]
        return f"The table [{dotted(path)}] is missing ({where}); it needs {' and '.join(needed)}."

    def _rule_broken(self, path: config_keys.Path, text: str) -> str:
        """A rule between keys: the message, and the sources of the keys it names."""
        # A rule of one table names its keys, a rule of several tables names them in full.
        names = {leaf.path: leaf.path[-1] if path else dotted(leaf.path) for leaf in config_keys.keys_below(path)}
        named = {item: name for item, name in names.items() if name in text}
        sources = "; ".join(f"{name}: {self.sources.get(item, DEFAULT)}" for item, name in named.items())
        return f"{f'[{dotted(path)}] ' if path else ''}{text} ({sources or self._source(path)})."

    def _existing(self, location: config_keys.Path) -> config_keys.Path:
        """The part of pydantic's location that is a key: no item numbers, no names of a union's arms."""
        node: Any = self.data
        for depth, part in enumerate(location):
            if not isinstance(node, dict) or part not in node:
                return location[:depth]
            node = node[part]
        return location

    def _value(self, path: config_keys.Path) -> Any:
        node: Any = self.data
        for part in path:
            node = node[part]
        return node

    def _source(self, path: config_keys.Path) -> str:
        """Where the value at ``path`` came from; for a table, where it was last written."""
        if path in self.sources:
            return self.sources[path]
        below = [label for key, label in self.sources.items() if key[: len(path)] == path]
        return below[-1] if below else self._label


def _preset_tables(preset: str) -> list[tuple[str, dict[str, Any]]]:
    """The preset's table after those it extends, each with its label."""
    tables: list[tuple[str, dict[str, Any]]] = []
    chain: dict[Path, str] = {}
    path, label = _locate(preset, beside=None)
    while True:
        if path.resolve() in chain:
            names = " → ".join([*chain.values(), label])
            raise ConfigError(f"These presets extend one another in a circle: {names}.")
        chain[path.resolve()] = label
        table = _read_toml(path, label)
        base = table.pop("extends", None)
        if tables:
            # A name is one experiment's own: inherited, two presets would share a run folder.
            table = {key: value for key, value in table.items() if key not in _OWN_KEYS}
        tables.insert(0, (label, table))
        if base is None:
            return tables
        if not isinstance(base, str):
            raise ConfigError(f"extends must be the name of one preset, got {_shown(base)} ({label}).")
        try:
            path, label = _locate(base, beside=path.parent)
        except ConfigError as error:
            raise ConfigError(f"extends = {base!r} ({label}): {error}") from None


def _locate(preset: str, *, beside: Path | None) -> tuple[Path, str]:
    """The file of a preset and how to call it; ``beside`` is the folder relative paths start from."""
    if preset.startswith("-"):
        raise ConfigError(f"The preset comes first, before the settings; got {preset!r} in its place.")
    if preset.endswith(".toml") or "/" in preset or os.sep in preset:
        path = Path(preset).expanduser()
        if beside is not None and not path.is_absolute():
            path = beside / path
        return path, f"file {path}"
    folder = resource_dir("presets")
    names = sorted(path.stem for path in folder.glob("*.toml"))
    if preset not in names:
        known = f"The presets are {', '.join(names)}." if names else f"There are none in {folder}."
        raise ConfigError(f"There is no preset {preset!r}.{did_you_mean(preset, names)} {known}")
    return folder / f"{preset}.toml", f"preset {preset}"


def _read_toml(path: Path, label: str) -> dict[str, Any]:
    try:
        # Some editors begin a file with a byte-order mark, which TOML does not know.
        return tomli.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"The settings file {path} does not exist.") from None
    except tomli.TOMLDecodeError as error:
        raise ConfigError(f"{label} is not valid TOML, line {error.lineno}: {error.msg}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{label} is not a text file in UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"The settings file {path} cannot be read: {error.strerror}.") from None


def _flatten(table: Mapping[str, Any], prefix: config_keys.Path = ()) -> Iterator[tuple[config_keys.Path, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _table_lines(table: Mapping[str, Any], path: config_keys.Path, sources: Mapping[str, str]) -> Iterator[str]:
    """The values of a table, then its tables, each below its header."""
    for name, value in table.items():
        if not isinstance(value, Mapping):
            key = (*path, name)
            # A file's name may hold a line break, which would end the comment.
            comment = " ".join(sources[dotted(key)].split())
            yield f"{_hidden_none(key, value)}{toml_key(name)} = {toml_value(value)}  # {comment}"
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            key = (*path, name)
            if any(not isinstance(item, Mapping) for item in value.values()):
                yield ""
                yield f"[{dotted(key)}]"
            yield from _table_lines(value, key, sources)


def _hidden_none(path: config_keys.Path, value: Any) -> str:
    """``# `` for a key without a value, where leaving it out says the same."""
    leaf = config_keys.find_leaf(path)
    return "# " if value is None and leaf is not None and leaf.field.get_default() is None else ""


def _shown(value: Any) -> str:
    """A value in a message: short, on one line."""
    text = "a table" if isinstance(value, Mapping) else _bare_none(toml_value(value))
    return text if len(text) <= 80 else text[:79] + "…"


def _bare_none(text: str) -> str:
    return "none" if text == '"none"' else text
