"""The OCR prompt set, written by ``python -m ramctl.promptsets.ocr prompts``.

A prompt is a scene with a short text between straight double quotes, which is what Flow-GRPO's OCR reward reads. The
texts (shop names, book titles, warnings, notes …) and the scenes are patterns over word lists of our own, ``ocr.toml``.
The split is by text: no target of ``test`` is one of ``train``, whatever their case, spaces or punctuation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ramctl.errors import DataError, UsageError
from ramctl.prompts import Prompt
from ramctl.promptsets.choosing import Words, first_by_hash, pick, plain, read_table, run, shares

SEED = 20260512
TRAINING_PROMPTS = 20_000
TEST_PROMPTS = 1_000
#: Bounds of a target, as in the set of the Flow-GRPO paper.
SHORTEST, LONGEST, MOST_WORDS = 2, 29, 7
#: A pattern that gives no new text this many times in a row has none left.
_PATIENCE = 400

_LETTERS: Mapping[str, Callable[[str], str]] = {"written": str, "upper": str.upper}


@dataclass(frozen=True)
class Kind:
    """One kind of text: patterns for it, how it is written and where it is seen (``%`` stands for it)."""

    name: str
    targets: int
    texts: tuple[str, ...]
    letters: tuple[str, ...]
    scenes: tuple[str, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in text.splitlines() if line.strip())


def read_kinds(table: Mapping[str, Any]) -> list[Kind]:
    """The kinds of a table such as ``ocr.toml``.

    Raises:
        DataError: a scene does not hold ``"%"`` once, or holds another double quote.
    """
    kinds = []
    for row in table["kind"]:
        kind = Kind(
            row["name"], int(row["targets"]), _lines(row["texts"]), tuple(row["letters"]), _lines(row["scenes"])
        )
        for scene in kind.scenes:
            if scene.count('"%"') != 1 or scene.count('"') != 2:
                raise DataError(f'ocr.toml, {kind.name}: a scene must hold "%" exactly once: {scene}')
        kinds.append(kind)
    return kinds


def tag_of(target: str) -> str:
    """The tag of a target, by its number of words: ``one_word`` … ``four_words``, ``five_or_more``."""
    return {1: "one_word", 2: "two_words", 3: "three_words", 4: "four_words"}.get(len(target.split()), "five_or_more")


def _fits(text: str) -> bool:
    return SHORTEST <= len(text) <= LONGEST and len(text.split()) <= MOST_WORDS and '"' not in text


def _new_texts(kind: Kind, words: Words, taken: set[str]) -> Iterator[str]:
    """Texts of the kind none of which was taken: one of each pattern in turn, until no pattern has a new one."""
    tries = dict.fromkeys(kind.texts, 0)
    open_patterns = list(kind.texts)
    while open_patterns:
        for pattern in list(open_patterns):
            for _ in range(_PATIENCE):
                tries[pattern] += 1
                text = words.fill(pattern, SEED, kind.name, pattern, tries[pattern])
                if _fits(text) and plain(text) not in taken:
                    taken.add(plain(text))
                    yield text
                    break
            else:
                open_patterns.remove(pattern)


def _prompt(kind: Kind, words: Words, text: str) -> Prompt:
    target = _LETTERS[pick(kind.letters, SEED, "letters", text)](text)
    scene = words.fill(pick(kind.scenes, SEED, "scene", text), SEED, "scene", text)
    return Prompt(text=scene.replace('"%"', f'"{target}"'), metadata={"tag": tag_of(target), "target": target})


def _shuffled(prompts: Sequence[Prompt]) -> list[Prompt]:
    return first_by_hash(prompts, len(prompts), SEED, "order", name=lambda prompt: prompt.text)


def make() -> dict[str, list[Prompt]]:
    """Both files by name.

    Raises:
        DataError: the patterns of a kind do not give as many different texts as it is to have.
    """
    table = read_table("ocr.toml")
    words = Words(table["words"])
    kinds = read_kinds(table)
    proportions = {kind.name: kind.targets for kind in kinds}
    in_test, in_train = shares(TEST_PROMPTS, proportions), shares(TRAINING_PROMPTS, proportions)
    taken: set[str] = set()
    test: list[Prompt] = []
    train: list[Prompt] = []
    for kind in kinds:
        wanted = in_test[kind.name] + in_train[kind.name]
        texts = [text for _, text in zip(range(wanted), _new_texts(kind, words, taken), strict=False)]
        if len(texts) < wanted:
            raise DataError(f"ocr.toml, {kind.name}: the patterns give {len(texts)} different texts, not {wanted}.")
        prompts = [_prompt(kind, words, text) for text in first_by_hash(texts, wanted, SEED, "split")]
        test += prompts[: in_test[kind.name]]
        train += prompts[in_test[kind.name] :]
    return {"ocr/test.jsonl": _shuffled(test), "ocr/train.jsonl.gz": _shuffled(train)}


def main(arguments: Sequence[str]) -> None:
    """Write the sets into the folder named on the command line.

    Raises:
        UsageError: not exactly one folder is given.
    """
    run("ocr", make, arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        sys.exit(str(error))
