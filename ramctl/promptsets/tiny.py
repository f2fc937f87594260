"""The prompt sets of the embedded model, written by ``python -m ramctl.promptsets.tiny prompts``.

Every choice follows from hashes of ``SEED`` and what is chosen among, not from a random generator, so the four files
are the same bytes on every machine and with every release of every package. A set is split by what a prompt asks for:
the two orders of "a circle and a square", or "left of" and its mirrored "right of", never stand on both sides.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ramctl.errors import UsageError
from ramctl.prompts import Prompt, write_prompts
from ramctl.tinyworld.grammar import Metadata, all_scenes, scene_key, scene_prompt, sign_prompt

SEED = 20260510

#: Held-out arrangements by tag; those of two_object and position are asked for in both phrasings, which doubles them.
HELD_OUT: Mapping[str, int] = {
    "single_object": 2,
    "two_object": 4,
    "counting": 54,
    "colors": 16,
    "position": 24,
    "color_attr": 112,
}
_BOTH_PHRASINGS = ("two_object", "position")

#: How often each training prompt stands in the file, so that the tags come near Flow-GRPO's proportions
#: (position 7 : counting 5 : color_attr 3 : colors 1 : two_object 1), which distinct prompts cannot give.
REPEATS: Mapping[str, int] = {
    "single_object": 3,
    "two_object": 4,
    "counting": 4,
    "colors": 3,
    "position": 8,
    "color_attr": 1,
}
COLOR_ATTR_TRAINING = 248

TEST_WORDS = 240


def _shuffled(keys: Iterable[str], purpose: str) -> list[str]:
    """The keys in an order fixed by SEED and ``purpose``, whatever order they come in."""

    def rank(key: str) -> bytes:
        return hashlib.sha256(f"{SEED}/{purpose}/{key}".encode()).digest()

    return sorted(keys, key=rank)


def _features(scene: Metadata) -> list[str]:
    """What a selection of scenes should show equally often: shapes, colours, counts, relations."""
    found = []
    for clause in scene["include"]:
        color = clause.get("color", "-")
        relation = clause.get("position", ["-"])[0]
        found += [
            f"shape {clause['class']}",
            f"color {color}",
            f"relation {relation}",
            f"count {clause['class']} {clause['count']}",
        ]
    return found


def _balanced(scenes: Mapping[str, Metadata], count: int, purpose: str) -> list[str]:
    """``count`` keys, one after another the one whose features are rarest so far; ties by the seeded order."""
    waiting = _shuffled(scenes, purpose)
    seen: Counter[str] = Counter()
    chosen = []
    for _ in range(count):
        best = min(waiting, key=lambda key: sum(seen[feature] for feature in _features(scenes[key])))
        waiting.remove(best)
        chosen.append(best)
        seen.update(_features(scenes[best]))
    return chosen


def _by_key(scenes: Iterable[Metadata]) -> dict[str, list[Metadata]]:
    """The phrasings of each arrangement, under its unordered key."""
    groups: dict[str, list[Metadata]] = {}
    for scene in scenes:
        groups.setdefault(scene_key(scene), []).append(scene)
    return groups


def _one_phrasing(groups: Mapping[str, Sequence[Metadata]], key: str) -> Metadata:
    texts = {scene_prompt(scene).text: scene for scene in groups[key]}
    return texts[_shuffled(texts, "phrasing")[0]]


def geneval_tiny() -> dict[str, list[Prompt]]:
    """``train`` and ``test`` prompts of geneval-tiny, grouped by tag; ``train`` holds repeats (see ``REPEATS``)."""
    train: list[Prompt] = []
    test: list[Prompt] = []
    for tag, scenes in all_scenes().items():
        groups = _by_key(scenes)
        first = {key: phrasings[0] for key, phrasings in groups.items()}
        held_out = _balanced(first, HELD_OUT[tag], f"{tag} test")
        for key in held_out:
            asked = groups[key] if tag in _BOTH_PHRASINGS else [_one_phrasing(groups, key)]
            test += [scene_prompt(scene) for scene in asked]
        rest = {key: scene for key, scene in first.items() if key not in held_out}
        if tag == "color_attr":
            kept = [_one_phrasing(groups, key) for key in _balanced(rest, COLOR_ATTR_TRAINING, f"{tag} train")]
        else:
            kept = [scene for key in _shuffled(rest, f"{tag} train") for scene in groups[key]]
        train += [scene_prompt(scene) for scene in kept for _ in range(REPEATS[tag])]
    return {"train": train, "test": test}


def words() -> list[str]:
    """The words of ocr-tiny: real, inoffensive English words of three and four letters, in alphabetical order."""
    lines = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


def ocr_tiny() -> dict[str, list[Prompt]]:
    """``train`` and ``test`` prompts of ocr-tiny; no word is in both."""
    order = _shuffled(words(), "words")
    return {
        "train": [sign_prompt(word) for word in order[TEST_WORDS:]],
        "test": [sign_prompt(word) for word in order[:TEST_WORDS]],
    }


SETS: Mapping[str, Callable[[], dict[str, list[Prompt]]]] = {"geneval-tiny": geneval_tiny, "ocr-tiny": ocr_tiny}


def write_sets(folder: Path) -> list[Path]:
    """Write ``<set>/train.jsonl`` and ``<set>/test.jsonl`` of both sets below ``folder``; the four paths.

    Raises:
        OSError: the folder cannot be written.
    """
    written = []
    for name, make in SETS.items():
        for split, prompts in make().items():
            path = folder / name / f"{split}.jsonl"
            write_prompts(path, prompts)
            written.append(path)
    return written


def main(arguments: Sequence[str]) -> None:
    """Write the sets into the folder named on the command line.

    Raises:
        UsageError: not exactly one folder is given.
    """
    if len(arguments) != 1:
        raise UsageError("Give one folder: python -m ramctl.promptsets.tiny prompts")
    for path in write_sets(Path(arguments[0])):
        sys.stderr.write(f"{path}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UsageError as error:
        sys.exit(str(error))
