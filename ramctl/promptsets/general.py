"""The general prompt sets, written by ``python -m ramctl.promptsets.general prompts``.

For preference rewards without a download: ``general/train.jsonl``, captions from a grammar of our own
(``general.toml``), and ``general/test.jsonl``, 220 prompts written by hand (``general_test.toml``), twenty for each of
DrawBench's eleven kinds of difficulty.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ramctl.errors import DataError, UsageError
from ramctl.prompts import Prompt
from ramctl.promptsets.choosing import Words, first_by_hash, plain, read_table, run

SEED = 20260513
#: A pattern is given up after this many draws in a row that gave no new prompt.
_PATIENCE = 200


def evaluation_prompts() -> list[Prompt]:
    """The hand-written test prompts, kind by kind."""
    table = read_table("general_test.toml")
    return [Prompt(line, {"tag": tag}) for tag, lines in table.items() for line in lines.strip().splitlines()]


def _of_kind(words: Words, name: str, patterns: Sequence[str], count: int, taken: set[str]) -> list[Prompt]:
    prompts: list[Prompt] = []
    misses = number = 0
    while len(prompts) < count:
        pattern = patterns[number % len(patterns)]
        text = words.fill(pattern, SEED, name, number)
        number += 1
        if plain(text) not in taken:
            taken.add(plain(text))
            prompts.append(Prompt(text, {"tag": name}))
            misses = 0
        elif (misses := misses + 1) > _PATIENCE * len(patterns):
            raise DataError(f"general.toml, {name}: the patterns give {len(prompts)} different prompts, not {count}.")
    return prompts


def training_prompts() -> list[Prompt]:
    """The training prompts, in an order fixed by the seed; none is a test prompt, whatever its case or punctuation.

    Raises:
        DataError: the patterns of a kind do not give as many different prompts as it is to have.
    """
    table = read_table("general.toml")
    words = Words(table["words"])
    taken = {plain(prompt.text) for prompt in evaluation_prompts()}
    prompts: list[Prompt] = []
    for kind in table["kind"]:
        prompts += _of_kind(words, kind["name"], kind["texts"].strip().splitlines(), kind["prompts"], taken)
    return first_by_hash(prompts, len(prompts), SEED, "order", name=lambda prompt: prompt.text)


def make() -> dict[str, list[Prompt]]:
    """Both files by name."""
    return {"general/test.jsonl": evaluation_prompts(), "general/train.jsonl": training_prompts()}


def main(arguments: Sequence[str]) -> None:
    """Write the sets into the folder named on the command line.

    Raises:
        UsageError: not exactly one folder is given.
    """
    run("general", make, arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        sys.exit(str(error))
