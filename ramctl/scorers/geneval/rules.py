"""GenEval's rules on lists of detections: no images, no models.

Sources: the evaluator of djghosh13/geneval (``official``), and the reward server of Flow-GRPO (``strict``,
and the partial reward it trains on). All clauses of a prompt are ANDed. Colours are read from the detections:
a detector that needs a second model for them runs it on the objects it reports.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ramctl.errors import DataError, did_you_mean

RULES_VERSION = "1"
SCORE_THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_PER_CLASS = 16
#: Of two detections of a class with at least this IoU the weaker is dropped; GenEval's default 1.0: never.
MAX_OVERLAP = 1.0
_POSITION_THRESHOLD = 0.1

Box = tuple[float, float, float, float]
Partial = Literal["clamped", "flow_grpo"]
PARTIALS: tuple[Partial, ...] = get_args(Partial)
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
_INCLUDE_KEYS = ("class", "count", "color", "position")
_EXCLUDE_KEYS = ("class", "count")


@dataclass(frozen=True)
class Detection:
    """One object found in a picture.

    ``box`` is (left, top, right, bottom) in pixels, right and bottom exclusive; ``score`` the confidence in
    [0, 1]; ``color`` a colour word, None when the detector names none.
    """

    class_name: str
    score: float
    box: Box
    color: str | None = None


@dataclass(frozen=True)
class Clause:
    """One wish: objects of a class, maybe of one colour or in a relation to an earlier clause's objects."""

    class_name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int | None = None


@dataclass(frozen=True)
class Task:
    """A prompt's metadata, checked: what must be in the picture and what must not."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    @property
    def threshold(self) -> float:
        """Detections count when their score is strictly greater than this."""
        return COUNTING_THRESHOLD if self.tag == "counting" else SCORE_THRESHOLD


@dataclass(frozen=True)
class Verdict:
    """What the rules say of one picture.

    official: GenEval's own answer. strict: Flow-GRPO's, with exact counts. partial: the training reward.
    reasons: one line per check that failed, in the order of the clauses; empty when both answers are yes.
    """

    official: bool
    strict: bool
    partial: float
    reasons: tuple[str, ...]


def _known(word: Any, valid: Collection[str] | None, what: str, where: str) -> str:
    if not isinstance(word, str) or not word:
        raise DataError(f"{where}: the {what} must be a word, got {word!r}.")
    if valid is not None and word not in valid:
        hint = did_you_mean(word, valid) or f" Known: {', '.join(sorted(valid)[:12])}{', …' * (len(valid) > 12)}."
        raise DataError(f"{where}: the detector knows no {what} {word!r}.{hint}")
    return word


def _position(value: Any, index: int, where: str) -> tuple[str, int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise DataError(f'{where}: "position" must be [relation, number of an earlier clause], got {value!r}.')
    relation, target = value
    _known(relation, RELATIONS, "relation", where)
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < index:
        earlier = f"0 to {index - 1}" if index else "but there is none before the first"
        raise DataError(f'{where}: "position" must point to an earlier clause ({earlier}), got {target!r}.')
    return relation, target


def _check_keys(row: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    """Refuse conditions that the rules would not look at; a known key of the other side may stand there as null."""
    for key, value in row.items():
        if key in known or (key in _INCLUDE_KEYS and value is None):
            continue
        raise DataError(
            f"{where}: no rule looks at the key {key!r}.{did_you_mean(str(key), known)} "
            f"The keys here are {', '.join(known)}."
        )


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f'{where}: "count" must be a whole number of at least 1, got {value!r}.')
    if value > MAX_PER_CLASS:
        raise DataError(
            f'{where}: "count" is {value}, but at most {MAX_PER_CLASS} objects of a class are ever counted: '
            f"no picture could have that many."
        )
    return value


def _clause(
    row: Any,
    index: int,
    where: str,
    keys: Sequence[str],
    class_names: Collection[str] | None,
    colors: Collection[str] | None,
) -> Clause:
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with class and count, got {row!r}.")
    _check_keys(row, keys, where)
    name = _known(row.get("class"), class_names, "class", where)
    count = _count(row.get("count"), where)
    color = None if row.get("color") is None else _known(row["color"], colors, "color", where)
    relation, target = (None, None) if row.get("position") is None else _position(row["position"], index, where)
    return Clause(name, count, color, relation, target)


def parse_task(
    metadata: Mapping[str, Any],
    where: str = "GenEval metadata",
    *,
    class_names: Collection[str] | None = None,
    colors: Collection[str] | None = None,
) -> Task:
    """A prompt's metadata in GenEval's format (``tag``, ``include``, ``exclude``) as a :class:`Task`.

    Beside those three the metadata may hold anything (``prompt``, an id); a clause holds nothing but ``class``,
    ``count`` and, in ``include``, ``color`` and ``position``.

    Args:
        metadata: the JSON object of the prompt's line.
        where: names the prompt in error messages.
        class_names: the classes the detector knows; None: not checked.
        colors: the colour words the detector knows; None: not checked.

    Raises:
        DataError: no tag or include, an unknown key, class, colour or relation, a count below 1 or above 16
            (no more objects of a class are ever counted), a position that points to no earlier clause, an
            ``exclude`` that forbids what ``include`` asks for.
    """
    tag, include = metadata.get("tag"), metadata.get("include")
    if not isinstance(tag, str) or not tag:
        raise DataError(f'{where}: "tag" must be a word such as "counting", got {tag!r}.')
    if not isinstance(include, Sequence) or isinstance(include, str) or not include:
        raise DataError(f'{where}: "include" must list at least one object with class and count, got {include!r}.')
    exclude = metadata.get("exclude") or ()
    if not isinstance(exclude, Sequence) or isinstance(exclude, str):
        raise DataError(f'{where}: "exclude" must be a list, got {exclude!r}.')

    def clauses(side: str, rows: Sequence[Any], keys: Sequence[str]) -> tuple[Clause, ...]:
        return tuple(_clause(row, i, f"{where}, {side}[{i}]", keys, class_names, colors) for i, row in enumerate(rows))

    task = Task(tag, clauses("include", include, _INCLUDE_KEYS), clauses("exclude", exclude, _EXCLUDE_KEYS))
    for index, ban in enumerate(task.exclude):
        wanted = max((clause.count for clause in task.include if clause.class_name == ban.class_name), default=0)
        if wanted >= ban.count:
            raise DataError(
                f'{where}, exclude[{index}]: {ban.count} {ban.class_name} would be too many, but "include" asks for '
                f"{wanted}: no picture could be right."
            )
    return task


def _overlap(a: Box, b: Box) -> float:
    # Inclusive pixel coordinates (+1), as in GenEval.
    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0.0) * max(y1 - y0 + 1, 0.0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def select(
    detections: Sequence[Detection], threshold: float, *, max_overlap: float = MAX_OVERLAP
) -> dict[str, list[Detection]]:
    """The detections that count, by class, most confident first.

    A score has to be strictly greater than ``threshold``; the 16 best of a class are kept; with
    ``max_overlap`` below 1 a detection that overlaps a better one of its class by at least that IoU is
    dropped (after the cap, as in GenEval).
    """
    found: dict[str, list[Detection]] = {}
    for detection in sorted((d for d in detections if d.score > threshold), key=lambda d: -d.score):
        found.setdefault(detection.class_name, []).append(detection)
    for name, ranked in found.items():
        kept: list[Detection] = []
        for detection in ranked[:MAX_PER_CLASS]:
            if max_overlap >= 1 or all(_overlap(detection.box, better.box) < max_overlap for better in kept):
                kept.append(detection)
        found[name] = kept
    return found


def relations(a: Box, b: Box) -> set[str]:
    """The relations A has to B ("A is left of B" …): none, one, or two at once on a diagonal.

    The offset of the centres, shortened per axis by a tenth of both extents, is measured in lengths of the
    whole offset.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    slack = [_POSITION_THRESHOLD * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    dx, dy = (math.copysign(max(abs(o) - s, 0.0), o) for o, s in zip(offset, slack, strict=True))
    if abs(dx) < 1e-3 and abs(dy) < 1e-3:
        return set()
    length = math.hypot(*offset)
    held = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, reach in held.items() if reach / length > 0.5}


def _all_related(objects: Sequence[Detection], targets: Sequence[Detection], relation: str) -> bool:
    return all(relation in relations(a.box, b.box) for a in objects for b in targets)


def _wrong_color(clause: Clause, objects: Sequence[Detection], matching: int) -> str:
    seen = ", ".join(str(d.color or "no known colour") for d in objects)
    return f"expected {clause.count} {clause.color} {clause.class_name}, found {matching} (seen: {seen})"


def official_correct(found: Mapping[str, Sequence[Detection]], task: Task) -> tuple[bool, list[str]]:
    """GenEval's own rule, and why it says no.

    Extra objects are tolerated (the ``count`` most confident are looked at) unless ``exclude`` forbids them.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in task.include:
        objects = found.get(clause.class_name, ())[: clause.count]
        before = len(reasons)
        if len(objects) < clause.count:
            reasons.append(f"expected at least {clause.count} {clause.class_name}, found {len(objects)}")
        elif clause.color is not None:
            matching = sum(d.color == clause.color for d in objects)
            if matching < clause.count:
                reasons.append(_wrong_color(clause, objects, matching))
        if len(reasons) == before and clause.relation is not None and clause.target is not None:
            targets = groups[clause.target]
            if targets is None:
                reasons.append(f"no target for {clause.class_name} to be {clause.relation}")
            elif not _all_related(objects, targets, clause.relation):
                reasons.append(f"{clause.class_name} is not {clause.relation} {targets[0].class_name}")
        groups.append(objects if len(reasons) == before else None)
    for clause in task.exclude:
        number = len(found.get(clause.class_name, ()))
        if number >= clause.count:
            reasons.append(f"expected fewer than {clause.count} {clause.class_name}, found {number}")
    return not reasons, reasons


@dataclass(frozen=True)
class _ClauseOutcome:
    """Flow-GRPO's checks of one clause; None where a check was not asked for or not reached."""

    objects: Sequence[Detection]
    exact: bool
    count_term: float
    color_term: float | None
    target_found: bool | None
    related: bool | None
    reason: str | None


def _strict_clause(
    clause: Clause, found: Mapping[str, Sequence[Detection]], groups: Sequence[Sequence[Detection] | None]
) -> _ClauseOutcome:
    objects = found.get(clause.class_name, ())
    count_term = 1 - abs(clause.count - len(objects)) / clause.count
    if len(objects) != clause.count:
        shortage = f"expected exactly {clause.count} {clause.class_name}, found {len(objects)}"
        return _ClauseOutcome(objects, False, count_term, None, None, None, shortage)
    color_term: float | None = None
    reason: str | None = None
    if clause.color is not None:
        matching = sum(d.color == clause.color for d in objects)
        color_term = 1 - abs(clause.count - matching) / clause.count
        if matching != clause.count:
            reason = _wrong_color(clause, objects, matching)
    target_found: bool | None = None
    related: bool | None = None
    if clause.relation is not None and clause.target is not None and reason is None:
        targets = groups[clause.target]
        target_found = targets is not None
        if targets is None:
            reason = f"no target for {clause.class_name} to be {clause.relation}"
        else:
            related = _all_related(objects, targets, clause.relation)
            if not related:
                reason = f"{clause.class_name} is not {clause.relation} {targets[0].class_name}"
    return _ClauseOutcome(objects, True, count_term, color_term, target_found, related, reason)


def _flow_grpo_terms(clause: Clause, outcome: _ClauseOutcome) -> list[float]:
    # Kept bug-compatible: a failed relation appends a 0 and then the same closing 1 as a relation that holds,
    # and nothing keeps a term from going below zero.
    terms = [outcome.count_term]
    if not outcome.exact:
        return terms + ([0.0] if clause.color is not None or clause.relation is not None else [])
    if outcome.color_term is not None:
        terms.append(outcome.color_term)
    if outcome.target_found is False:
        terms.append(0.0)
    elif outcome.related is not None:
        terms.extend([1.0] if outcome.related else [0.0, 1.0])
    return terms


def _clamped_terms(clause: Clause, outcome: _ClauseOutcome) -> list[float]:
    terms = [outcome.count_term]
    if clause.color is not None:
        terms.append(outcome.color_term or 0.0)
    if clause.relation is not None:
        terms.append(1.0 if outcome.related else 0.0)
    return [min(max(term, 0.0), 1.0) for term in terms]


def strict_and_partial(
    found: Mapping[str, Sequence[Detection]], task: Task, partial: Partial = "clamped"
) -> tuple[bool, float, list[str]]:
    """Flow-GRPO's ``strict_accuracy`` and ``score``, and why the answer is no.

    Strict wants exactly ``count`` detections of each included class and does not look at ``exclude``. The
    partial reward is the mean of one term per check; ``"flow_grpo"`` computes it as the reward server does (a
    wrong side costs less than it should, many extra objects make it very negative), ``"clamped"`` counts each
    check once, within [0, 1].
    """
    terms: list[float] = []
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in task.include:
        outcome = _strict_clause(clause, found, groups)
        terms.extend((_flow_grpo_terms if partial == "flow_grpo" else _clamped_terms)(clause, outcome))
        if outcome.reason is not None:
            reasons.append(outcome.reason)
        groups.append(outcome.objects if outcome.reason is None else None)
    return not reasons, sum(terms) / len(terms), reasons


def judge(
    detections: Sequence[Detection],
    task: Task,
    *,
    partial: Partial = "clamped",
    max_overlap: float = MAX_OVERLAP,
) -> Verdict:
    """Apply GenEval's and Flow-GRPO's rules to the detections of one picture."""
    found = select(detections, task.threshold, max_overlap=max_overlap)
    official, official_reasons = official_correct(found, task)
    strict, reward, strict_reasons = strict_and_partial(found, task, partial)
    # A clause too scarce for the official rule is too scarce for the strict one as well: say it once.
    extra = [r for r in official_reasons if r.startswith("expected fewer") and r not in strict_reasons]
    return Verdict(official, strict, reward, (*strict_reasons, *extra))


def extra_objects(detections: Sequence[Detection], task: Task) -> int:
    """Detections above the task's threshold beyond those the prompt asks for, of any class; GenEval forgives
    most of them."""
    asked: dict[str, int] = {}
    for clause in task.include:
        asked[clause.class_name] = asked.get(clause.class_name, 0) + clause.count
    found: dict[str, int] = {}
    for detection in detections:
        if detection.score > task.threshold:
            found[detection.class_name] = found.get(detection.class_name, 0) + 1
    return sum(max(number - asked.get(name, 0), 0) for name, number in found.items())
