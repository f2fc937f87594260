"""GenEval's prompts at full size, written by ``python -m ramctl.promptsets.geneval prompts``.

``geneval/test.jsonl`` holds the 553 records of GenEval (Ghosh et al. 2023, djghosh13/geneval), made again by its
published recipe: one numpy Generator with seed 43, 80 + 5 x 100 draws in a fixed order, duplicates dropped. The file is
GenEval's ``evaluation_metadata.jsonl``, byte for byte.

``geneval/train.jsonl.gz`` is our own: 50,000 records of the same wording in Flow-GRPO's proportions, none of which asks
for the picture of a test record, in whatever order the objects are named.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

from ramctl.errors import UsageError
from ramctl.prompts import Prompt
from ramctl.promptsets.choosing import first_by_hash, repeated_evenly, run, shares

if TYPE_CHECKING:
    import numpy as np

Metadata = dict[str, Any]

EVALUATION_SEED = 43
EVALUATION_DRAWS = 100
TRAINING_SEED = 20260511
TRAINING_LINES = 50_000
#: Flow-GRPO's training tasks; single_object is not among them.
PROPORTIONS: Mapping[str, int] = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}

#: GenEval's names of the 80 COCO classes, in COCO's order ("computer mouse", "tv remote" and "computer keyboard" are
#: COCO's mouse, remote and keyboard).
CLASSES: tuple[str, ...] = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
#: People are never asked for in a colour.
COLORED_CLASSES = CLASSES[1:]
COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
NUMBERS: Mapping[int, str] = {2: "two", 3: "three", 4: "four"}
_MIRRORED = {"left of": "right of", "above": "below"}


def _one(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def single_object(name: str) -> Prompt:
    """ "a photo of a bench"."""
    return _prompt("single_object", _one(name), [{"class": name, "count": 1}])


def two_object(first: str, second: str) -> Prompt:
    """ "a photo of a bench and a vase"."""
    return _prompt(
        "two_object", f"{_one(first)} and {_one(second)}", [{"class": n, "count": 1} for n in (first, second)]
    )


def counting(name: str, count: int) -> Prompt:
    """ "a photo of four benchs": GenEval's plural is kept as it is, so that the prompts are the same."""
    plural = name + ("es" if name.endswith("s") else "s")
    text = f"{NUMBERS[count]} {plural}"
    return _prompt("counting", text, [{"class": name, "count": count}], [{"class": name, "count": count + 1}])


def colors(name: str, color: str) -> Prompt:
    """ "a photo of an orange laptop"."""
    return _prompt("colors", f"{_one(color)} {name}", [{"class": name, "count": 1, "color": color}])


def position(subject: str, relation: str, target: str) -> Prompt:
    """ "a photo of a chair left of a zebra"; the target's clause comes first, the subject's points to it."""
    include = [{"class": target, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]}]
    return _prompt("position", f"{_one(subject)} {relation} {_one(target)}", include)


def color_attr(first: tuple[str, str], second: tuple[str, str]) -> Prompt:
    """ "a photo of a black kite and a green bear", from two (class, colour)."""
    text = " and ".join(f"{_one(color)} {name}" for name, color in (first, second))
    return _prompt("color_attr", text, [{"class": n, "count": 1, "color": c} for n, c in (first, second)])


def _prompt(tag: str, text: str, include: list[Metadata], exclude: list[Metadata] | None = None) -> Prompt:
    # The keys stand in the order of GenEval's file: tag, include, exclude, and the prompt last.
    metadata: Metadata = {"tag": tag, "include": include}
    if exclude is not None:
        metadata["exclude"] = exclude
    return Prompt(text=f"a photo of {text}", metadata=metadata)


def unordered_key(metadata: Mapping[str, Any]) -> str:
    """A key equal for records that ask for the same picture: the order of the objects does not matter.

    "a bench and a vase" and "a vase and a bench" share it, as do "left of" and the mirrored "right of", "above" and
    the mirrored "below", and the two orders of two coloured objects.
    """
    include = metadata["include"]
    parts = [f"{clause['count']} {clause.get('color', '-')} {clause['class']}" for clause in include]
    if metadata["tag"] != "position":
        return f"{metadata['tag']}|" + "|".join(sorted(parts))
    target, subject = parts
    relation = include[1]["position"][0]
    if relation in _MIRRORED:
        relation, target, subject = _MIRRORED[relation], subject, target
    return f"position|{subject}|{relation}|{target}"


def _drawn_twice(rng: np.random.Generator, names: Sequence[str]) -> tuple[str, str]:
    first, second = rng.choice(len(names), size=2, replace=False)
    return names[first], names[second]


def _drawn(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[rng.choice(len(names))]


def _draws(rng: np.random.Generator, draws: int) -> Iterator[Prompt]:
    """Every draw of GenEval's recipe. The order of the calls to the generator is part of it."""
    for index in rng.choice(len(CLASSES), size=len(CLASSES), replace=False):
        yield single_object(CLASSES[index])
    for _ in range(draws):
        yield two_object(*_drawn_twice(rng, CLASSES))
    for _ in range(draws):
        name = _drawn(rng, CLASSES)
        yield counting(name, int(rng.integers(2, 4, endpoint=True)))
    for _ in range(draws):
        name = _drawn(rng, COLORED_CLASSES)
        yield colors(name, _drawn(rng, COLORS))
    for _ in range(draws):
        subject, target = _drawn_twice(rng, CLASSES)
        yield position(subject, _drawn(rng, RELATIONS), target)
    for _ in range(draws):
        names = _drawn_twice(rng, COLORED_CLASSES)
        words = _drawn_twice(rng, COLORS)
        yield color_attr((names[0], words[0]), (names[1], words[1]))


def evaluation_prompts(seed: int = EVALUATION_SEED, draws: int = EVALUATION_DRAWS) -> list[Prompt]:
    """GenEval's evaluation records; with the defaults the 553 of the benchmark, in its order.

    numpy promises the same stream of a Generator within a release only, so it is the shipped file that is the
    benchmark; a test tells when an installed numpy draws differently.
    """
    import numpy as np

    # Within a tag a prompt's text tells its record, so equal texts are equal records.
    return list({prompt.text: prompt for prompt in _draws(np.random.default_rng(seed), draws)}.values())


def _all_two_object() -> Iterator[Prompt]:
    yield from (two_object(first, second) for first, second in permutations(CLASSES, 2))


def _all_counting() -> Iterator[Prompt]:
    yield from (counting(name, count) for name, count in product(CLASSES, NUMBERS))


def _all_colors() -> Iterator[Prompt]:
    yield from (colors(name, color) for name, color in product(COLORED_CLASSES, COLORS))


def _all_position() -> Iterator[Prompt]:
    for (subject, target), relation in product(permutations(CLASSES, 2), RELATIONS):
        yield position(subject, relation, target)


def _all_color_attr() -> Iterator[Prompt]:
    for names, words in product(permutations(COLORED_CLASSES, 2), permutations(COLORS, 2)):
        yield color_attr((names[0], words[0]), (names[1], words[1]))


_SPACES: Mapping[str, Callable[[], Iterator[Prompt]]] = {
    "position": _all_position,
    "counting": _all_counting,
    "color_attr": _all_color_attr,
    "colors": _all_colors,
    "two_object": _all_two_object,
}


def training_prompts(held_out: Iterable[Prompt], lines: int = TRAINING_LINES) -> list[Prompt]:
    """``lines`` training records in Flow-GRPO's proportions, in an order fixed by the seed.

    A tag with more prompts than it needs gives that many different ones; a smaller one (counting, colors) gives each
    of its prompts equally often, give or take one. No record shares its unordered key with one of ``held_out``.
    """
    reserved = {unordered_key(prompt.metadata) for prompt in held_out}
    chosen: dict[str, Prompt] = {}
    for tag, count in shares(lines, PROPORTIONS).items():
        free = (prompt for prompt in _SPACES[tag]() if unordered_key(prompt.metadata) not in reserved)
        different = first_by_hash(free, count, TRAINING_SEED, tag, name=lambda prompt: prompt.text)
        lines_of_tag = repeated_evenly(different, count)
        chosen.update({f"{number} {prompt.text}": prompt for number, prompt in enumerate(lines_of_tag)})
    return [chosen[place] for place in first_by_hash(chosen, len(chosen), TRAINING_SEED, "order")]


def make() -> dict[str, list[Prompt]]:
    """Both files by name."""
    test = evaluation_prompts()
    return {"geneval/test.jsonl": test, "geneval/train.jsonl.gz": training_prompts(test)}


def main(arguments: Sequence[str]) -> None:
    """Write the sets into the folder named on the command line.

    Raises:
        UsageError: not exactly one folder is given.
    """
    run("geneval", make, arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        sys.exit(str(error))
