"""What the generators of prompt sets share: choices by hash, texts from word lists, writing the files.

Nothing here uses a random generator. A choice is a function of a seed, of what it is for and of what is chosen among,
so the sets are the same on every machine, whatever the release of Python or of any package.
"""

from __future__ import annotations

import hashlib
import heapq
import re
import sys
import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ramctl.errors import DataError, UsageError
from ramctl.prompts import Prompt, write_prompts

T = TypeVar("T")

_SLOT = re.compile(r"\{(a:|A:)?(\w+)\}")
#: Words whose first sound is not that of their first letter.
_AN_BEFORE = ("hour", "honest", "heir")
_A_BEFORE = ("one", "once", "uni", "use", "eu", "ukulele")


def digest(seed: int, *purpose: object) -> bytes:
    """The SHA-256 of the seed and the purpose: the source of every choice."""
    return hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()


def pick(options: Sequence[T], seed: int, *purpose: object) -> T:
    """One of the options, chosen by hash. Raises IndexError when there is none."""
    if not options:
        raise IndexError(f"nothing to choose from for {purpose!r}")
    return options[int.from_bytes(digest(seed, *purpose)[:8], "big") % len(options)]


def first_by_hash(
    options: Iterable[T], count: int, seed: int, *purpose: object, name: Callable[[T], str] = str
) -> list[T]:
    """``count`` of the options (all, when there are fewer), in an order fixed by seed, purpose and their names alone.

    Holds no more than ``count`` options at a time.
    """
    return heapq.nsmallest(count, options, key=lambda option: digest(seed, *purpose, name(option)))


def repeated_evenly(options: Sequence[T], count: int) -> list[T]:
    """``count`` options: each as often as the next, those at the front once more where it does not come out even."""
    whole, rest = divmod(count, len(options))
    return [*options] * whole + [*options[:rest]]


def shares(total: int, proportions: Mapping[str, float]) -> dict[str, int]:
    """``total`` divided in these proportions by largest remainders; the parts sum to ``total``."""
    whole = sum(proportions.values())
    exact = {name: total * part / whole for name, part in proportions.items()}
    parts = {name: int(value) for name, value in exact.items()}
    missing = total - sum(parts.values())
    for name in sorted(exact, key=lambda name: parts[name] - exact[name])[:missing]:
        parts[name] += 1
    return parts


def plain(text: str) -> str:
    """What two texts have in common when they differ in case, spaces, punctuation or typography only."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    return "".join(character for character in folded if character.isalnum())


def article(phrase: str) -> str:
    """ "a" or "an", by the sound the phrase begins with."""
    start = phrase.lower()
    vowel = start.startswith(_AN_BEFORE) or (start[:1] in set("aeiou") and not start.startswith(_A_BEFORE))
    return "an" if vowel else "a"


def read_table(name: str) -> dict[str, Any]:
    """A TOML file that lies beside this module."""
    return tomllib.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


class Words:
    """Lists of words, and patterns filled from them.

    A pattern is a text with slots: ``{fruit}`` is one entry of the list ``fruit``, ``{a:fruit}`` the same with its
    article, ``{A:fruit}`` with a capital one. An entry may itself hold slots. A list may name other lists: an entry
    ``@fruit`` stands for all of ``fruit``, an entry ``2..9`` for the numbers from 2 to 9. Two slots of one list in a
    pattern never get the same entry.
    """

    def __init__(self, lists: Mapping[str, str]) -> None:
        """``lists``: by name, entries separated by commas or line breaks (or by ``|``, where entries hold commas)."""
        self._raw = {
            name: [
                entry
                for part in re.split(r"\|" if "|" in text else r"[,\n]", text)
                if (entry := " ".join(part.split()))
            ]
            for name, text in lists.items()
        }
        self._lists = {name: tuple(self._entries(name)) for name in self._raw}

    def _entries(self, name: str) -> Iterator[str]:
        for entry in self._raw[name]:
            if entry.startswith("@"):
                yield from self._entries(entry[1:])
            elif bounds := re.fullmatch(r"(\d+)\.\.(\d+)", entry):
                yield from map(str, range(int(bounds[1]), int(bounds[2]) + 1))
            else:
                yield entry

    def __getitem__(self, name: str) -> tuple[str, ...]:
        """The entries of a list. Raises DataError when there is no such list."""
        if name not in self._lists:
            raise DataError(f"No list of words is called {name!r}.")
        return self._lists[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the lists."""
        return iter(self._lists)

    def fill(self, pattern: str, seed: int, *purpose: object) -> str:
        """The pattern with every slot filled, chosen by hash of the seed, the purpose and the slot's place.

        Raises:
            DataError: a slot names no list.
        """
        taken: dict[str, set[str]] = {}
        number = 0

        def entry(slot: re.Match[str]) -> str:
            nonlocal number
            number += 1
            name = slot[2]
            free = [word for word in self[name] if word not in taken.setdefault(name, set())]
            word = pick(free, seed, *purpose, number, name)
            taken[name].add(word)
            while _SLOT.search(word):
                word = _SLOT.sub(entry, word)
            if slot[1] is None:
                return word
            start = article(word)
            return f"{start.capitalize() if slot[1] == 'A:' else start} {word}"

        return _SLOT.sub(entry, pattern)


def write_sets(folder: Path, sets: Mapping[str, Iterable[Prompt]]) -> list[Path]:
    """Write each set to its file below ``folder``; the paths.

    Raises:
        OSError: the folder cannot be written.
    """
    written = []
    for name, prompts in sets.items():
        write_prompts(folder / name, prompts)
        written.append(folder / name)
    return written


def run(module: str, make: Callable[[], Mapping[str, Iterable[Prompt]]], arguments: Sequence[str]) -> None:
    """The command ``python -m ramctl.promptsets.MODULE FOLDER``: write the sets below the folder.

    Raises:
        UsageError: not exactly one folder is given.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UsageError(f"Give one folder: python -m ramctl.promptsets.{module} prompts")
    for path in write_sets(Path(arguments[0]), make()):
        sys.stderr.write(f"{path}\n")
