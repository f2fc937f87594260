"""Scorers by name: what there is, one line about each, and how to make one from a preset's options.

A new scorer is one module with a :class:`~ramctl.scorers.base.Scorer` in it and one line in the table below.
Nothing is imported until a scorer is made, so listing them works with none of their packages installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_type_hints

from ramctl.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from ramctl.scorers.base import Scorer


@dataclass(frozen=True)
class _Entry:
    module: str
    class_name: str
    summary: str


_SCORERS: Mapping[str, _Entry] = {
    "geneval": _Entry(
        "ramctl.scorers.geneval.scorer",
        "GenEvalScorer",
        "objects, counts, colours and positions as the prompt asks",
    ),
    "ocr": _Entry("ramctl.scorers.ocr", "OcrScorer", "the quoted text of the prompt, read back by an OCR engine"),
    "pickscore": _Entry("ramctl.scorers.pickscore", "PickScoreScorer", "which picture people would pick"),
    "hpsv2": _Entry("ramctl.scorers.hpsv2", "Hpsv2Scorer", "which picture people prefer, HPSv2.1"),
    "aesthetic": _Entry("ramctl.scorers.aesthetic", "AestheticScorer", "LAION's predicted rating, 1 to 10"),
    "clipscore": _Entry("ramctl.scorers.clipscore", "ClipScoreScorer", "how well the picture fits the prompt"),
    "imagereward": _Entry(
        "ramctl.scorers.imagereward",
        "ImageRewardScorer",
        "how much people would like the picture for the prompt (ImageReward v1.0)",
    ),
    "deqa": _Entry(
        "ramctl.scorers.deqa.scorer",
        "DeqaScorer",
        "how good the picture looks, whatever the prompt (DeQA-Score, in an environment of its own)",
    ),
    "jpeg-compressibility": _Entry(
        "ramctl.scorers.jpeg",
        "JpegCompressibility",
        "minus the picture's size as a JPEG, in kB: plain pictures win",
    ),
    "jpeg-incompressibility": _Entry(
        "ramctl.scorers.jpeg",
        "JpegIncompressibility",
        "the picture's size as a JPEG, in kB: busy pictures win",
    ),
}


def available() -> list[str]:
    """The names :func:`create` knows."""
    return list(_SCORERS)


def describe(name: str) -> str:
    """One line about a scorer.

    Raises:
        UsageError: no scorer of that name.
    """
    return _entry(name).summary


def create(name: str, options: Mapping[str, object] | None = None) -> Scorer:
    """Make a scorer; ``options`` are its constructor's keyword arguments. Nothing heavy is loaded yet.

    Raises:
        UsageError: no scorer of that name, an option it does not have, or a value the option cannot take.
    """
    entry = _entry(name)
    scorer_class: type[Scorer] = getattr(import_module(entry.module), entry.class_name)
    checked = _check_options(name, scorer_class, dict(options or {}))
    try:
        return scorer_class(**checked)
    except (TypeError, ValueError) as error:
        raise UsageError(f"Scorer {name!r} cannot be made with {checked}: {error}") from None


def _entry(name: str) -> _Entry:
    if name not in _SCORERS:
        raise UsageError(
            f"There is no scorer {name!r}.{did_you_mean(name, _SCORERS)} The scorers are {', '.join(_SCORERS)}."
        )
    return _SCORERS[name]


def _check_options(name: str, scorer_class: type[Scorer], options: dict[str, object]) -> dict[str, Any]:
    """The options with their values brought to the types of the constructor's annotations."""
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(scorer_class).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    hints = get_type_hints(scorer_class.__init__)
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key not in parameters:
            raise UsageError(
                f"Scorer {name!r} has no option {key!r}.{did_you_mean(str(key), parameters)} {_listing(parameters)}"
            )
        problem, checked[key] = _convert(value, hints.get(key, Any))
        if problem:
            raise UsageError(f"Scorer {name!r}: option {key!r} is {value!r}: {problem}. {_listing(parameters)}")
    return checked


def _listing(parameters: Mapping[str, inspect.Parameter]) -> str:
    if not parameters:
        return "It takes no options."
    shown = [
        key if parameter.default is parameter.empty else f"{key} (default {parameter.default!r})"
        for key, parameter in parameters.items()
    ]
    return f"Its options are {', '.join(shown)}."


def _convert(value: object, hint: Any) -> tuple[str | None, Any]:
    """What is wrong with ``value`` for an annotation (or None), and the value as that type ("192" as 192)."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    # pydantic refuses the config for types that carry their own, and only foreign classes need it.
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except TypeError:
        adapter = TypeAdapter(hint)
    try:
        # A bool would pass as the number 1 or 0, which nobody means.
        return None, adapter.validate_python(value, strict=isinstance(value, bool))
    except ValidationError as error:
        return error.errors()[0]["msg"].lower(), None
