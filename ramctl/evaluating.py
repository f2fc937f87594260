"""The held-out protocol: the library behind ``ramctl evaluate``.

An evaluation is a folder (:mod:`ramctl.evaluation_folder`). Pictures that it already has of the same protocol are kept,
and so are the scores of these pictures. Several processes each draw and score their share; the first writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ramctl.config import Config, EvaluationSection, RewardTerm
from ramctl.drawbench import drawbench_file, read_drawbench
from ramctl.engine.distributed import World, connect
from ramctl.engine.randomness import keyed_seed
from ramctl.errors import MissingDependencyError, RamctlError, ScorerError, UsageError
from ramctl.evaluation_folder import (
    HASHES,
    IMAGES,
    LINES,
    PAGE,
    PROTOCOL,
    SCORES,
    KeptScores,
    choose_folder,
    set_aside,
    to_json,
)
from ramctl.evaluation_page import write_page
from ramctl.evaluation_results import (
    Compared,
    Evaluated,
    combine,
    compare,
    intervals_json,
    results_json,
    taken,
)
from ramctl.images import ImageRow
from ramctl.prompts import Prompt, read_prompts, spread_by_tag
from ramctl.resources import find_resource
from ramctl.sampling import (
    Drawn,
    DrawSettings,
    Picture,
    Progress,
    draw,
    list_pictures,
    picture_name,
    write_hashes,
)
from ramctl.scorers.base import ImageScore, Scorer, Scores
from ramctl.scorers.composite import check_output
from ramctl.scorers.folder import score_rows
from ramctl.scoring import (
    ScoredImages,
    check_used,
    image_rows,
    make_scorers,
    run_self_tests,
    summarise,
    write_json_lines,
    write_whole,
)
from ramctl.sources import OpenModel, Source, find_source, open_source

if TYPE_CHECKING:
    from torch import nn

#: Pictures of a process from which compiling (about a minute on an H200) is made up for by what each saves (0.4 s at
#: 512 pixels). What is compiled is not part of the protocol: pictures differ in rounding, as between two GPUs.
_WORTH_COMPILING = 200
#: What ``compare`` may be besides a source: the checkpoint's own base model.
BASE = "base"
DRAWBENCH = "drawbench"
#: Which weights of an open model draw: the source's, or those it was trained from.
Network = Literal["own", "base"]
OWN_NETWORK: Network = "own"
BASE_NETWORK: Network = "base"


@dataclass(frozen=True)
class Plan:
    """What is drawn and how it is judged, before any model is loaded.

    ``prompts`` are those used of ``file``; ``terms`` give scorer → weight, output, options and so on; ``is_reward``:
    their weighted sum means something.
    """

    file: Path
    prompts: Sequence[Prompt]
    limit: int
    settings: DrawSettings
    terms: Mapping[str, RewardTerm]
    is_reward: bool = True

    @property
    def texts_hash(self) -> str:
        """SHA-256 of the prompts' texts in order: what the pictures depend on."""
        return hashlib.sha256(json.dumps([prompt.text for prompt in self.prompts]).encode()).hexdigest()

    @property
    def file_hash(self) -> str:
        """SHA-256 of the prompt file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def notes(self) -> list[str]:
        """Where it falls short of a benchmark's own protocol."""
        geneval = self.terms.get("geneval")
        if geneval is None or geneval.options.get("detector") != "mask2former":
            return []  # other detectors' numbers are not GenEval's anyway
        count = self.settings.images_per_prompt
        return [] if count >= 4 else [f"GenEval's protocol is four pictures per prompt: -n 4 (now {count})"]

    def pictures(self) -> list[Picture]:
        """All pictures; their noise is that of the evaluations during training."""
        count, seed = self.settings.images_per_prompt, self.settings.seed
        return [
            Picture(picture_name(p, i, count), prompt, keyed_seed(seed, "evaluation", 0, p * count + i))
            for p, prompt in enumerate(self.prompts)
            for i in range(count)
        ]


@dataclass(frozen=True)
class Report:
    """All that one call of :func:`evaluate` found; ``is_main`` is false on the processes that write nothing.

    ``drawbench`` and ``drawbench_compared`` are the same for the DrawBench prompts, where metrics for them were named.
    """

    evaluated: Evaluated
    compared: Compared | None
    drawbench: Evaluated | None = None
    drawbench_compared: Compared | None = None
    is_main: bool = True


@dataclass(frozen=True)
class Request:
    """What to evaluate and how; everything unset comes from the source's training config (or the preset).

    Attributes:
        source: as :func:`ramctl.sources.find_source` takes it; with ``is_model`` it must be a base model.
        compare: another source, or ``"base"`` for the checkpoint's own base model.
        rewards, options: scorers and what they are made with.
        limit: prompts used, spread over the tags; 0 for all, whatever the config takes during training.
        settings: fields of :class:`~ramctl.sampling.DrawSettings`.
        output: the evaluation's folder; by default ``evaluations/<label>`` beside the checkpoint, and
            ``outputs/evaluations/<label>`` for a base model.
        compile: whether ``runtime.compile`` of the source's config counts; None where many pictures are drawn.
        drawbench_metrics: scorers for the prompts of ``drawbench_prompts``, or else for DrawBench's own as
            ``ramctl download-weights`` fetches them; they go into ``drawbench/`` inside it.
    """

    source: str
    is_model: bool = False
    compare: str | None = None
    preset: str | None = None
    prompts: Path | None = None
    rewards: Sequence[str] = ()
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    limit: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    output: Path | None = None
    weights: str = "evaluation"
    base: str | None = None
    device: str = "auto"
    precision: str | None = None
    compile: bool | None = None
    self_test: bool = True
    drawbench_metrics: Sequence[str] = ()
    drawbench_prompts: Path | None = None


def evaluate(request: Request, progress: Progress | None = None, note: Callable[[str], None] | None = None) -> Report:
    """Draw, score and write what the request says; called by every process alike where there are several.

    ``note`` is told, once and before anything is drawn, where the plan falls short of a benchmark's protocol.

    Raises:
        UsageError: settings that make no sense, or no prompts or scorers to be had.
        DataError: a prompt lacks what a scorer needs; ``output`` holds something else.
        ScorerError: a scorer fails its self-test, or could score no picture.
        CheckpointError, MissingDependencyError, ConfigError: a source cannot be loaded; ConfigError also where a
            scorer does not report the output that the config rewards.
    """
    preset = _preset(request.preset)
    found = find_source(request.source, preset=preset, base=request.base)
    if request.is_model and found.checkpoint is not None:
        raise UsageError(f"{request.source} is a checkpoint, no base model; give it without --model.")
    other = _find_other(request, found, preset)
    config = preset or found.config
    plans = [make_plan(request, config), *_drawbench_plan(request, config)]
    scorers = _make_scorers(plans)
    for plan, chosen in zip(plans, scorers, strict=True):
        for scorer in chosen:
            scorer.check_prompts(plan.prompts)
            lacks = scorer.missing()  # reported here, not when everything is drawn
            if lacks:
                raise MissingDependencyError(lacks[0])
    world, _ = connect(request.device)
    if note is not None and world.is_main:
        for line in (line for plan in plans for line in plan.notes()):
            note(line)
    _try_out(plans, scorers, self_test=request.self_test and world.is_main)
    many = sum(len(plan.pictures()) for plan in plans) >= _WORTH_COMPILING * world.size
    compiled = many if request.compile is None else request.compile

    def opened(source: Source, which: str) -> OpenModel:
        return open_source(source, device=request.device, precision=request.precision, which=which, compile=compiled)

    model = opened(found, request.weights)
    second, network = model, BASE_NETWORK
    if other is not None:
        which = request.weights if other.checkpoint is not None else "evaluation"
        second = opened(other, which)
        network = OWN_NETWORK
    found_parts: list[tuple[Evaluated, Compared | None]] = []
    for plan, chosen in zip(plans, scorers, strict=True):
        work = _Work(plan, chosen, world, progress)
        before = found_parts[0] if found_parts else None
        found_parts.append(_one_plan(work, request, (model, second, network), before))
    (mine, compared), *more = found_parts
    drawbench, drawbench_compared = more[0] if more else (None, None)
    world.leave()
    return Report(mine, compared, drawbench, drawbench_compared, world.is_main)


def _make_scorers(plans: Sequence[Plan]) -> list[list[Scorer]]:
    """Each plan's scorers; one made the same way for two plans is made once, as its weights may fill a GPU."""
    made: dict[str, Scorer] = {}
    chosen = []
    for plan in plans:
        keys = {name: json.dumps([name, term.options], sort_keys=True) for name, term in plan.terms.items()}
        new = {name: dict(plan.terms[name].options) for name, key in keys.items() if key not in made}
        made.update({keys[scorer.name]: scorer for scorer in make_scorers(list(new), new)})
        chosen.append([made[key] for key in keys.values()])
    return chosen


def _try_out(plans: Sequence[Plan], scorers: Sequence[Sequence[Scorer]], *, self_test: bool) -> None:
    """Let each scorer judge known pictures, where wanted, and show that it reports what its plan rewards."""
    if self_test:
        run_self_tests(list({id(scorer): scorer for chosen in scorers for scorer in chosen}.values()))
    for plan, chosen in zip(plans, scorers, strict=True):
        for scorer in chosen:
            check_output(scorer, plan.terms[scorer.name].output, plan.prompts[0])


def _one_plan(
    work: _Work,
    request: Request,
    models: tuple[OpenModel, OpenModel, Network],
    before: tuple[Evaluated, Compared | None] | None,
) -> tuple[Evaluated, Compared | None]:
    """One plan for the source and what it is compared with; a second plan goes inside the folders of the first."""
    model, second, network = models
    if before is None:
        mine = work.run(model, OWN_NETWORK, request.output, _default_folder(model, OWN_NETWORK))
    else:
        mine = work.run(model, OWN_NETWORK, None, before[0].folder / DRAWBENCH)
    if request.compare is None:
        if work.world.is_main:
            _write_pages(mine, None)
        return mine, None
    place = _default_folder(second, network)
    if before is not None and before[1] is not None:
        other = work.run(second, network, None, before[1].other.folder / DRAWBENCH)
    else:
        inside = None if request.output is None else request.output / f"compare-{place.name}"
        other = work.run(second, network, inside, place)
    compared = compare(mine, other)
    if work.world.is_main:
        _write_comparison(mine.folder / SCORES, compared)
        _write_pages(mine, compared)
    work.world.barrier()
    return mine, compared


def make_plan(request: Request, config: Config | None) -> Plan:
    """Prompts, settings and scorers of a request, over those of a config.

    Raises:
        UsageError: neither the request nor a config names prompts or scorers.
        DataError: the prompt file is absent or broken.
    """
    given = request.prompts or (config.prompts.evaluation if config is not None else None)
    if given is None:
        raise UsageError(
            f"{request.source} brings no held-out prompts: give --preset NAME, or --prompts FILE and --rewards NAME."
        )
    terms = dict(config.reward.scorers) if config is not None else {}
    if request.rewards:
        terms = {name: terms.get(name, RewardTerm()) for name in request.rewards}
    if not terms:
        raise UsageError(f"No scorer for {request.source}: give --rewards NAME, or --preset NAME.")
    check_used(request.options, [*terms, *request.drawbench_metrics])
    for name, options in request.options.items():
        if name in terms:
            term = terms[name]
            terms[name] = term.model_copy(update={"options": {**term.options, **options}})
    section = config.evaluation if config is not None else EvaluationSection()
    file = find_resource(given)
    return _plan(request, section, file, read_prompts(file), terms)


def _drawbench_plan(request: Request, config: Config | None) -> list[Plan]:
    if not request.drawbench_metrics:
        if request.drawbench_prompts is not None:
            raise UsageError(
                f"No metrics for {request.drawbench_prompts}: name some, "
                "e.g. --drawbench-metrics imagereward,pickscore."
            )
        return []
    section = config.evaluation if config is not None else EvaluationSection()
    terms = {name: RewardTerm(options=dict(request.options.get(name, {}))) for name in request.drawbench_metrics}
    file = drawbench_file(request.drawbench_prompts)
    plan = _plan(request, section, file, read_drawbench(file), terms)
    return [replace(plan, is_reward=len(terms) == 1)]


def _plan(
    request: Request,
    section: EvaluationSection,
    file: Path,
    prompts: Sequence[Prompt],
    terms: Mapping[str, RewardTerm],
) -> Plan:
    limit = request.limit
    if limit < 0:
        raise UsageError(f"limit must be 0 (all prompts) or more, got {limit}.")
    chosen = spread_by_tag(prompts, limit) if limit else prompts
    return Plan(file, chosen, limit, DrawSettings.of(section).changed(**request.settings), terms)


class _Work:
    """One plan, carried out for one source after the other."""

    def __init__(self, plan: Plan, scorers: Sequence[Scorer], world: World, progress: Progress | None) -> None:
        self.plan, self.scorers, self.world = plan, scorers, world
        self.progress = progress if world.is_main else None

    def run(self, model: OpenModel, network: Network, given: Path | None, default: Path) -> Evaluated:
        """Draw and score all pictures of one source, and write its folder."""
        protocol = drawing_protocol(self.plan, model, network)
        folder = self._folder(given, default, protocol)
        pictures = self.plan.pictures()
        share = self.world.share(len(pictures))
        mine = [pictures[i] for i in share]
        # Only now: the two networks of a checkpoint are one module, loaded in turn.
        weights: nn.Module = model.network() if network == "own" else model.base_network()
        label = BASE if network == "base" else model.label
        drawn = draw(
            model.backbone,
            weights,
            mine,
            self.plan.settings,
            folder / IMAGES,
            phase=f"drawing {label}",
            progress=self.progress,
            list_them=False,
            hash_list=folder / HASHES,
        )
        if self.world.is_main:
            list_pictures(folder / IMAGES, pictures)
        evaluated = self._score(folder, pictures, mine, label, drawn)
        if self.world.is_main:
            self._write(evaluated, protocol, model, network)
        self.world.barrier()
        return evaluated

    def _folder(self, given: Path | None, default: Path, protocol: Mapping[str, Any]) -> Path:
        """The folder to work in, the same on every process; its protocol is written."""
        problem: RamctlError | None = None
        folder = Path()
        if self.world.is_main:
            try:
                folder = choose_folder(given, default, protocol)
                write_whole(folder / PROTOCOL, to_json(protocol))
            except RamctlError as error:
                problem = error
        told, place = self.world.broadcast((None if problem is None else str(problem), str(folder)))
        if told is not None:
            raise problem or RamctlError(told)
        return Path(place)

    def _score(
        self, folder: Path, pictures: Sequence[Picture], mine: Sequence[Picture], label: str, drawn: Drawn
    ) -> Evaluated:
        images = folder / IMAGES
        kept = KeptScores(folder, self.plan.file_hash)
        found = {scorer.name: self._ask(scorer, folder, mine, drawn, kept) for scorer in self.scorers}
        parts = self.world.gather(({name: scores for name, (scores, _) in found.items()}, drawn))
        scores = {name: Scores.joined([part[0][name] for part in parts]) for name in found}
        rows = [ImageRow(images / picture.name, picture.prompt) for picture in pictures]
        whole = ScoredImages(rows, scores, {scorer.name: scorer.version for scorer in self.scorers})
        useless = whole.without_result()
        if useless:
            raise ScorerError(
                f"No picture in {images} could be scored by {', '.join(useless)}; the first reason: "
                f"{whole.scores[useless[0]].errors[0]}"
            )
        total = combine(scores, self.plan.terms)
        return Evaluated(
            label,
            folder,
            whole,
            total,
            summarise(total, [row.prompt for row in rows]),
            whole.summaries(),
            self.plan.settings.images_per_prompt,
            kept=sum(part[1].kept for part in parts),
            changed=[name for part in parts for name in part[1].changed],
            kept_scores=sum(self.world.gather(sum(count for _, count in found.values()))),
            hashes={name: digest for part in parts for name, digest in part[1].hashes.items()},
            has_total=self.plan.is_reward,
        )

    def _ask(
        self, scorer: Scorer, folder: Path, mine: Sequence[Picture], drawn: Drawn, kept: KeptScores
    ) -> tuple[Scores, int]:
        """The scorer's word on this process' pictures, and how often it had been said before."""
        options, version = self.plan.terms[scorer.name].options, scorer.version
        said: dict[int, ImageScore] = {}
        for i, picture in enumerate(mine):
            digest = drawn.hashes[picture.name]
            known = kept.find(scorer.name, version, options, f"{IMAGES}/{picture.name}", digest)
            if known is not None:
                said[i] = known
        asked = [i for i in range(len(mine)) if i not in said]
        rows = [ImageRow(folder / IMAGES / mine[i].name, mine[i].prompt) for i in asked]
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.progress is not None:
                self.progress(scorer.name, done, len(rows))

        answers = score_rows(scorer, rows, on_progress=advance) if rows else Scores.collect([])
        together = Scores.joined([Scores.collect(list(said.values())), answers])
        return taken(together, np.argsort([*said, *asked])), len(said)

    def _write(self, evaluated: Evaluated, protocol: Mapping[str, Any], model: OpenModel, network: Network) -> None:
        from ramctl.training import versions

        folder = evaluated.folder
        plan = self.plan
        scorers = {
            name: {"version": version, **plan.terms[name].model_dump()}
            for name, version in evaluated.scored.versions.items()
        }
        content = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": {
                "label": evaluated.label,
                "checkpoint": str(model.checkpoint) if model.checkpoint and network == "own" else None,
                "model": model.model.model_dump(),
            },
            "protocol": {
                **protocol,
                "prompt_file": str(plan.file),
                "prompt_file_sha256": plan.file_hash,
                "prompt_limit": plan.limit,
                "pictures_sha256": HASHES,
            },
            "scorers": scorers,
            "versions": versions(),
            "processes": self.world.size,
            "compiled": model.compiled,
            "results": results_json(evaluated),
        }
        set_aside(folder, scorers)
        write_hashes(folder / HASHES, folder / IMAGES, evaluated.hashes)
        rows = image_rows(evaluated.scored, relative_to=folder)
        names = [row.path.name for row in evaluated.scored.rows]
        lines = [{**row, "sha256": evaluated.hashes[name]} for row, name in zip(rows, names, strict=True)]
        write_json_lines(folder / LINES, lines)
        write_whole(folder / SCORES, to_json(content))


def drawing_protocol(plan: Plan, model: OpenModel, network: Network) -> dict[str, Any]:
    """All that the pictures depend on; two evaluations with the same one have the same pictures."""
    hashes = model.hashes
    if network == "base":
        hashes = {f"base/{name}": value for name, value in model.base_hashes.items()}
    own = model.checkpoint is not None and network == "own"
    return {
        "weights": model.which if own else "base",
        "sha256": hashes,
        "prompts": len(plan.prompts),
        "prompt_texts_sha256": plan.texts_hash,
        **asdict(plan.settings),
        **{key: getattr(model.model, key) for key in ("resolution", "dtype", "use_t5", "max_sequence_length")},
        "precision": model.precision,
        "device": model.backbone.device.type,
    }


def _preset(name: str | None) -> Config | None:
    if name is None:
        return None
    from ramctl.settings import load_settings

    return load_settings(name).config


def _find_other(request: Request, found: Source, preset: Config | None) -> Source | None:
    """What to open besides the source: nothing for its own base model, which is open already."""
    if request.compare is not None and request.compare != BASE:
        return find_source(request.compare, preset=preset)
    if request.compare == BASE and found.checkpoint is None:
        raise UsageError(f"{found.label} is a base model itself; compare it with another source.")
    return None


def _default_folder(model: OpenModel, network: Network) -> Path:
    if model.checkpoint is None:
        return Path("outputs") / "evaluations" / model.label
    suffix = "" if model.which == "evaluation" else f"-{model.which}"
    name = BASE if network == "base" else model.checkpoint.name + suffix
    return model.checkpoint.parent / "evaluations" / name


def _write_comparison(file: Path, compared: Compared) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content["comparison"] = {
        "other": compared.other.label,
        "folder": str(compared.other.folder),
        "results": results_json(compared.other),
        "differences": intervals_json(compared.differences),
        "scorer_differences": intervals_json(compared.scorer_differences),
    }
    write_whole(file, to_json(content))


def _write_pages(evaluated: Evaluated, compared: Compared | None) -> None:
    """The page of each folder; that of the source shows the comparison."""
    write_page(evaluated.folder / PAGE, evaluated, compared)
    if compared is not None and compared.other.folder != evaluated.folder:
        write_page(compared.other.folder / PAGE, compared.other, None)
