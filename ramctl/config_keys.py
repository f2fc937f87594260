"""The keys of the schema by name: what each takes, how a user may abbreviate it, and text as its value.

A key is a path such as ``("optimizer", "lr")``, written ``optimizer.lr``. Where the schema has a table with
free names, its paths hold a placeholder in capitals: ``reward.scorers.NAME.options.OPTION``.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tomli
import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ramctl.config import Config
from ramctl.errors import ConfigError, UsageError

Path = tuple[str, ...]

#: Leaf names that several sections have, or that read better short, and the key people mean by them.
ALIASES: Mapping[str, str] = {"seed": "train.seed", "steps": "train.steps"}

ON_COMMAND_LINE = "on the command line"

#: What TOML, which has no null, and the command line write for "no value".
_NONE_WORDS = ("none", "null")
_PLACEHOLDERS: Mapping[str, str] = {"scorers": "NAME", "options": "OPTION"}
_TYPE_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}
#: Patterns of the schema in words.
_PATTERN_WORDS: Mapping[str, str] = {
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "letters, digits, '.', '_' and '-', beginning with a letter or a digit"
}
_BOUND_WORDS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))


@dataclass(frozen=True)
class KeyInfo:
    """What a person wants to know of a key, in words; ``range`` is empty where the type says it all."""

    key: str
    type: str
    default: str
    description: str
    range: str


@dataclass(frozen=True)
class Leaf:
    """A key that holds a value: its path, the bare type, whether it may be none, its bounds, its field."""

    path: Path
    base: Any
    optional: bool
    constraints: tuple[Any, ...]
    field: FieldInfo

    @property
    def free(self) -> bool:
        """Whether the path holds a placeholder."""
        return any(part in _PLACEHOLDERS.values() for part in self.path)

    def matches(self, path: Path) -> bool:
        """Whether ``path`` names this key."""
        return len(path) == len(self.path) and all(map(_part_matches, self.path, path))


def dotted(path: Iterable[object]) -> str:
    """A path as people write it; a part that TOML would quote is quoted."""
    return ".".join(toml_key(str(part)) for part in path)


def toml_key(part: str) -> str:
    """One part of a key as TOML writes it."""
    return part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else toml_value(part)


def toml_value(value: object) -> str:
    """A value as TOML writes it, on one line; None as ``"none"``, which is read back as None."""
    if value is None:
        return '"none"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


@cache
def leaves() -> tuple[Leaf, ...]:
    """Every key of the schema, in its order."""
    return tuple(_walk(Config, ()))


def all_keys() -> list[str]:
    """Every key of the schema as text, in its order."""
    return [dotted(leaf.path) for leaf in leaves()]


def find_leaf(path: Path) -> Leaf | None:
    """The key that ``path`` names, or None."""
    return next((leaf for leaf in leaves() if leaf.matches(path)), None)


def is_table(path: Path) -> bool:
    """Whether ``path`` names a section or another table of the schema."""
    depth = len(path)
    return any(len(leaf.path) > depth and all(map(_part_matches, leaf.path, path)) for leaf in leaves())


def keys_below(path: Path) -> list[Leaf]:
    """The keys in the table ``path``."""
    return [leaf for leaf in leaves() if len(leaf.path) > len(path) and all(map(_part_matches, leaf.path, path))]


def info(leaf: Leaf, path: Path | None = None) -> KeyInfo:
    """A key in words; ``path`` replaces the placeholders of its name."""
    if leaf.path[-1] == "OPTION":
        default = "the scorer's own"
    elif leaf.field.is_required():
        default = "required"
    else:
        default = toml_value(leaf.field.get_default()).strip('"')
    return KeyInfo(
        key=dotted(path or leaf.path),
        type=type_words(leaf),
        default=default or "empty",
        description=leaf.field.description or "",
        range=range_words(leaf),
    )


def explain(key: str) -> KeyInfo:
    """What a key means; the same abbreviations as on the command line.

    Raises:
        ConfigError: no such key, a section, or an ambiguous name.
    """
    path = resolve_key(key)
    leaf = find_leaf(path)
    assert leaf is not None
    return info(leaf, path)


def find_keys(text: str) -> list[KeyInfo]:
    """The keys a reader may mean: one key, all keys of a section, or all keys of that last name.

    Raises:
        ConfigError: there is none.
    """
    path = _normalised(text)
    if is_table(path):
        return [info(leaf) for leaf in keys_below(path)]
    same_name = [info(leaf) for leaf in leaves() if len(path) == 1 and leaf.path[-1] == path[0]]
    return same_name or [explain(text)]


def type_words(leaf: Leaf) -> str:
    """What a key takes: ``a whole number``, ``one of "a", "b"``, ``a number, or none``."""
    return _base_words(leaf.base) + (", or none" if leaf.optional else "")


def range_words(leaf: Leaf) -> str:
    """The bounds of a key in words, empty when it has none."""
    words = [
        f"{phrase} {toml_value(getattr(constraint, attribute)).removesuffix('.0')}"
        for kind, attribute, phrase in _BOUND_WORDS
        for constraint in leaf.constraints
        if isinstance(constraint, kind)
    ]
    for constraint in leaf.constraints:
        pattern = getattr(constraint, "pattern", None)
        if pattern:
            words.append(_PATTERN_WORDS.get(pattern, f"text that matches {pattern}"))
    return " and ".join(words)


def resolve_key(text: str, where: str = "") -> Path:
    """The path a user means: ``section.key``, or the last name alone where only one key has it.

    Dashes and underscores are alike. :data:`ALIASES` come before the search by last name. ``where`` (such as
    ``on the command line``) goes into the message about an unknown key.

    Raises:
        ConfigError: unknown (nearest names in the message), ambiguous, or a section.
    """
    path = _normalised(text)
    if find_leaf(path) and not any(part in _PLACEHOLDERS.values() for part in path):
        return path
    if is_table(path):
        name = dotted(path)
        raise ConfigError(f"{name!r} is a section, not a key. `ramctl presets explain {name}` lists its keys.")
    if len(path) == 1:
        if path[0] in ALIASES:
            return tuple(ALIASES[path[0]].split("."))
        found = [leaf for leaf in leaves() if leaf.path[-1] == path[0]]
        if len(found) == 1 and not found[0].free:
            return found[0].path
        if found:
            names = " or ".join(dotted(leaf.path) for leaf in found)
            raise ConfigError(f"{text!r} alone does not say which key is meant: give {names}.")
    raise ConfigError(f"Unknown key {text!r}{where and ' '}{where}.{suggestion(path)}")


def suggestion(path: Path) -> str:
    """`` Did you mean 'optimizer.lr'?`` for an unknown path, or where to look when nothing is near."""
    last = path[-1]
    table = path[:-1] if is_table(path[:-1]) else ()
    groups = [
        # The same name in another section, then a slip in this one (at the top: a section), then in any.
        {dotted(leaf.path): last for leaf in leaves() if leaf.path[-1] == last and not leaf.free},
        {dotted((*table, name)): name for name in _children(table)} if table == path[:-1] else {},
        {dotted(leaf.path): leaf.path[-1] for leaf in leaves() if not leaf.free},
    ]
    for group in groups:
        near = difflib.get_close_matches(last, sorted(set(group.values())), n=2, cutoff=0.65)
        found = [key for name in near for key, value in group.items() if value == name]
        if found:
            return f" Did you mean {' or '.join(map(repr, found[:3]))}?"
    words = last.replace("_", " ")
    described = [leaf for leaf in leaves() if words and words in (leaf.field.description or "").lower()]
    if described:
        return f" Did you mean {dotted(described[0].path)!r}?"
    if table:
        return f" `ramctl presets explain {dotted(table)}` lists the keys of [{dotted(table)}]."
    return f" The sections are {', '.join(name for name in Config.model_fields if is_table((name,)))}."


def parse_text(leaf: Leaf, text: str) -> Any:
    """Text of the command line as a value of the key's type.

    Text that is no such value is returned as it stands (or as the number it is), for the schema to refuse;
    ``none`` stays text until :func:`read_none`.
    """
    word = text.strip()
    base = leaf.base
    if base is bool:
        return {"true": True, "false": False}.get(word.lower(), text)
    if base in (int, float):
        for number in (int, float):
            try:
                return number(word)
            except ValueError:
                continue
        return text
    if base is str or get_origin(base) is Literal:
        return text
    return _parse_toml(word, text)


def read_none(leaf: Leaf | None, value: Any) -> Any:
    """``"none"`` as None, where the key may be none."""
    if leaf is not None and leaf.optional and isinstance(value, str) and value.lower() in _NONE_WORDS:
        return None
    return value


def parse_overrides(arguments: Sequence[str], options: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Command-line words ``--key VALUE``, ``--key=VALUE`` as pairs (key, text) for ``load_settings``.

    A key that takes true or false may stand alone (``--path-cost``) or be negated (``--no-guard``).

    Args:
        arguments: what the command's own options have left over.
        options: names of the command's own options (``--fresh``), for hints.

    Raises:
        UsageError: a word that is no override, a key without a value, an unknown or ambiguous key.
    """
    pairs: list[tuple[str, str]] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UsageError(
                f"Unexpected argument {word!r}. Settings are given as --key VALUE, after the command's own arguments."
            )
        name, equals, value = word[2:].partition("=")
        path, negated = _resolve_option(name, options)
        leaf = find_leaf(path)
        assert leaf is not None
        flag = leaf.base is bool
        if negated:
            value = "false"
        elif flag and not equals and not (words and words[0].lower() in ("true", "false")):
            value = "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise UsageError(f"--{name} needs a value: {type_words(leaf)}.")
            value = words.pop(0)
        pairs.append((dotted(path), value))
    return pairs


def _resolve_option(name: str, options: Iterable[str]) -> tuple[Path, bool]:
    """The path of ``--name`` and whether it is the negation of a true-or-false key."""
    try:
        return resolve_key(name, ON_COMMAND_LINE), False
    except ConfigError as error:
        if name.startswith(("no-", "no_")):
            try:
                path = resolve_key(name[3:])
            except ConfigError:
                raise error from None
            leaf = find_leaf(path)
            if leaf is not None and leaf.base is bool:
                return path, True
        near = difflib.get_close_matches(f"--{name}", list(options), n=1, cutoff=0.75)
        if near and str(error).startswith("Unknown"):
            raise UsageError(f"Unknown option --{name}. Did you mean {near[0]}?") from None
        raise


def _walk(model: type[BaseModel], prefix: Path) -> Iterator[Leaf]:
    for name, field in model.model_fields.items():
        base, constraints, optional = _unwrap(field.annotation, field.metadata)
        path = (*prefix, name)
        if get_origin(base) is dict:
            path = (*path, _PLACEHOLDERS[name])
            base, constraints, optional = _unwrap(get_args(base)[1], [])
        if isinstance(base, type) and issubclass(base, BaseModel):
            yield from _walk(base, path)
        else:
            yield Leaf(path, base, optional, tuple(constraints), field)


def _unwrap(annotation: Any, metadata: Sequence[Any]) -> tuple[Any, list[Any], bool]:
    """The bare type, its constraints, and whether None is allowed."""
    constraints = list(metadata)
    if get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            constraints += item.metadata if isinstance(item, FieldInfo) else [item]
        base, inner, optional = _unwrap(annotation, [])
        return base, constraints + inner, optional
    if get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation):
        others = [arm for arm in get_args(annotation) if arm is not type(None)]
        if len(others) == 1:
            base, inner, _ = _unwrap(others[0], [])
            return base, constraints + inner, True
    return annotation, constraints, False


def _base_words(base: Any) -> str:
    if get_origin(base) is Literal:
        return "one of " + ", ".join(toml_value(choice) for choice in get_args(base))
    if get_origin(base) is tuple:
        return 'a list of texts such as ["a", "b"]'
    if get_origin(base) in (Union, types.UnionType):
        return ", ".join(_base_words(arm) for arm in get_args(base))
    return _TYPE_WORDS[base]


def _children(table: Path) -> list[str]:
    """The names in a table of the schema, free ones left out."""
    names = dict.fromkeys(leaf.path[len(table)] for leaf in keys_below(table))
    return [name for name in names if name not in _PLACEHOLDERS.values()]


def _part_matches(pattern: str, part: str) -> bool:
    return pattern == part or pattern in _PLACEHOLDERS.values()


def _normalised(text: str) -> Path:
    """A typed key as a path: underscores for dashes, except in the free names of scorers."""
    parts = text.strip().split(".")
    plain = tuple(part.replace("-", "_") for part in parts)
    if plain[:2] == ("reward", "scorers"):
        return (*plain[:2], *parts[2:3], *plain[3:])
    return plain


def _parse_toml(word: str, text: str) -> Any:
    try:
        return tomli.loads(f"x = {word}")["x"]
    except tomli.TOMLDecodeError:
        return text
