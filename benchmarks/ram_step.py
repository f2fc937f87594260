"""Seconds of one RAM step, ramctl against a plain loop on the same prompts, noise and weights, in the same run.

    python -m benchmarks.ram_step --model tinyworld --preset geneval-tiny                  # CPU, a minute or two
    python -m benchmarks.ram_step --preset geneval --fraction 1/24 --compile --json step.json   # a GPU, random weights

    torchrun --nproc_per_node 2 -m benchmarks.ram_step --preset geneval --fraction 1/24 --compile   # two against one

Prints, and with ``--json`` writes, each figure as soon as it is known: the peak of the machine's matrix product, the
model's FLOPs, warm-up steps, then pairs of measured steps (plain, ramctl, plain, …) with their phases, and the ratio.
The method is in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch

from benchmarks.plain_loop import PhaseClock
from benchmarks.step_figures import PHASES, Flops, Record, count_flops, matrix_peak
from benchmarks.step_pair import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Agreement,
    MeasuredStep,
    Pair,
    StandInReward,
    check_agreement,
    instrumented,
    load_model,
    make_pair,
    plain_step,
    ram_step,
    resolve,
)
from benchmarks.step_phases import ONLY, only_phase
from benchmarks.step_scaling import run_scaling
from benchmarks.step_variants import VARIANTS, check_variants, run_variants
from ramctl.config import Config
from ramctl.engine.distributed import World, connect
from ramctl.engine.reward import RewardFunction
from ramctl.training import make_reward

RANDOM = "random-sd35"


def table(ours: Mapping[str, float], plain: Mapping[str, float], flops: Mapping[str, float], peak: float) -> list[str]:
    """Markdown rows by phase."""
    rows = [
        "| phase | plain s | ramctl s | plain / ramctl | ramctl TFLOP/s | of the matrix peak |",
        "|---|---|---|---|---|---|",
    ]
    for phase in (*PHASES, "total"):
        a, b = ours.get(phase, 0.0), plain.get(phase, 0.0)
        work = sum(flops.values()) if phase == "total" else flops.get(phase)
        rate = f"{work / a / 1e12:.3g} | {work / a / peak:.0%}" if work and a else " | "
        ratio = f"{b / a:.2f}" if a >= 1e-3 else ""
        rows.append(f"| {phase} | {b:.3f} | {a:.3f} | {ratio} | {rate} |")
    return rows


def medians(steps: Sequence[MeasuredStep]) -> dict[str, float]:
    """The median of each phase over the steps."""
    return {name: statistics.median(step.seconds.get(name, 0.0) for step in steps) for name in steps[0].seconds}


def run_pairs(pair: Pair, record: Record, flops: Flops, peak: float, *, repeats: int, end: float) -> dict[str, float]:
    """Warm-up, then up to ``repeats`` interleaved pairs, no further one when it would end after ``end``.

    Returns:
        ramctl's seconds by phase, the medians.
    """
    with instrumented(pair.trainer) as clock:
        our_steps, plain_steps = _measure_pairs(pair, clock, record, repeats=repeats, end=end)
    _sum_up(record, our_steps, plain_steps, flops.of_step(pair.config), peak, pair.config.images_per_step)
    return medians(our_steps)


def _measure_pairs(
    pair: Pair, clock: PhaseClock, record: Record, *, repeats: int, end: float
) -> tuple[list[MeasuredStep], list[MeasuredStep]]:
    plain = plain_step(pair)
    record.add("warm_up/plain", plain.seconds, f"warm-up, plain loop: {plain.seconds['total']:.2f} s")
    ours = ram_step(pair, clock)
    record.add("warm_up/ramctl", ours.seconds, f"warm-up, ramctl: {ours.seconds['total']:.2f} s (compilation included)")
    plain_steps: list[MeasuredStep] = []
    our_steps: list[MeasuredStep] = []
    for number in range(1, repeats + 1):
        start = time.perf_counter()
        plain_steps.append(plain_step(pair))
        our_steps.append(ram_step(pair, clock))
        a, b = our_steps[-1], plain_steps[-1]
        same = Agreement.of(a, b)
        record.add(
            f"pair/{number}",
            {"ramctl": a.seconds, "plain": b.seconds, "loss": same.loss, "gradient": same.gradient}
            | {"mean_reward": {"ramctl": a.rewards, "plain": b.rewards}},
            f"pair {number}: plain {b.seconds['total']:.2f} s, ramctl {a.seconds['total']:.2f} s, ratio "
            f"{b.seconds['total'] / a.seconds['total']:.2f}; loss off by {same.loss:.1e}, gradient by "
            f"{same.gradient:.1e}",
        )
        took = time.perf_counter() - start
        if number < repeats and time.perf_counter() + took > end:
            record.add("stopped_early", number, f"no time for another pair after {number}")
            break
    return our_steps, plain_steps


def _sum_up(
    record: Record,
    our_steps: Sequence[MeasuredStep],
    plain_steps: Sequence[MeasuredStep],
    flops: Mapping[str, float],
    peak: float,
    images: int,
) -> None:
    """The table, the ratio and the rates."""
    ours_median, plain_median = medians(our_steps), medians(plain_steps)
    rows = table(ours_median, plain_median, flops, peak)
    record.add("table", {"ramctl": ours_median, "plain": plain_median}, "\n".join(["", *rows, ""]))
    ratios = [b.seconds["total"] / a.seconds["total"] for a, b in zip(our_steps, plain_steps, strict=True)]
    record.add(
        "ratio",
        {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios), "pairs": len(ratios)},
        f"RESULT ratio={statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)",
    )
    rates = {"ramctl": images / ours_median["total"], "plain": images / plain_median["total"]}
    record.add("images_per_second", rates, f"RESULT images_per_second={rates['ramctl']:.3f} plain={rates['plain']:.3f}")
    hidden = ours_median["reward"] - ours_median["score"]
    record.add(
        "reward_hidden", hidden, f"scoring took {ours_median['reward']:.2f} s, {hidden:.2f} s of it beside other phases"
    )
    _record_memory(record, our_steps[-1].peak_bytes, plain_steps[-1].peak_bytes)


def _record_memory(record: Record, ours: int | None, plain: int | None) -> None:
    if ours is None or plain is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record.add("memory/process", peak, f"peak memory of the process, both loops in it: {peak / 1e9:.2f} GB")
        return
    record.add(
        "memory",
        {"ramctl": ours, "plain": plain},
        f"RESULT peak_gb={ours / 1e9:.1f} plain={plain / 1e9:.1f} (the other loop's weights not counted)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="geneval-tiny")
    add(
        "--model",
        help=f"diffusers folder, tinyworld, or {RANDOM}; default: the embedded model for its own presets, "
        f"{RANDOM} for the others",
    )
    add("--fraction", type=Fraction, default=Fraction(1), help="of the preset's prompts per step, e.g. 1/24")
    add(
        "--scorer",
        choices=("auto", "preset", "stand-in"),
        default="auto",
        help="auto: the preset's own for the embedded model, else the stand-in",
    )
    add("--scorer-seconds", type=float, default=0.05, help="of the stand-in, per picture")
    add("--compile", action="store_true", help="runtime.compile for ramctl")
    add("--only", choices=ONLY, help="measure this phase alone")
    add("--trial", action="append", default=[], help="lay a change of benchmarks/trials.py over ramctl; repeatable")
    add(
        "--variant",
        action="append",
        default=[],
        metavar="NAME",
        help=f"after the pairs, ramctl's step so changed: {', '.join(VARIANTS)}, or KEY=VALUE",
    )
    add("--repeats", type=int, default=3, help="measured pairs")
    add("--minutes", type=float, default=7.0, help="start no further pair that would end later")
    add("--plain-micro-batch", type=int, default=0, help="of the plain loop; default: what ramctl would train with")
    add("--layers", type=int, help=f"of {RANDOM}'s stacks, for a trial run on a CPU")
    add("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="any preset key")
    add("--threads", type=int, default=0)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--json", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 1 where the embedded model's check finds the two loops apart."""
    asked = _parser().parse_args(arguments)
    began = time.perf_counter()
    world, device = connect(asked.device)
    record = Record(asked.json, silent=not world.is_main)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    overrides = [("runtime.compile", str(asked.compile).lower()), *(tuple(pair) for pair in asked.set)]
    embedded = asked.model == "tinyworld" or (asked.model is None and asked.preset.endswith("-tiny"))
    random = not embedded and asked.model in (None, RANDOM)
    if not random:
        overrides.append(("model.path", "models/tinyworld" if embedded else asked.model))
    config = resolve(asked.preset, fraction=asked.fraction, overrides=overrides)

    def remade(keys: Mapping[str, str]) -> Config:
        return resolve(asked.preset, fraction=asked.fraction, overrides=[*overrides, *keys.items()])

    check_variants(asked.variant, remade, device)
    _introduce(record, config, asked.fraction, device)
    if embedded and not asked.only and not _agree(record, asked.preset, overrides):
        print("The two loops do not compute the same step; their times would compare nothing.", file=sys.stderr)
        return 1
    peak = _measure_peaks(record, world, device, config.runtime.precision)
    backbone = load_model(config, device, random=random, layers=asked.layers)
    real = asked.scorer == "preset" or (asked.scorer == "auto" and embedded)
    reward: RewardFunction = StandInReward(asked.scorer_seconds, config.images_per_step)
    if real:
        scorers = make_reward(config)
        scorers.load()
        reward = scorers
    pair = make_pair(
        config, backbone, reward, plain_micro_batch=asked.plain_micro_batch, compile=asked.compile, world=world
    )
    sizes = {phase: batch.size for phase, batch in pair.trainer.batches.items()}
    ready = time.perf_counter() - began
    rewarding = ", ".join(config.reward.scorers) if real else f"stand-in, {asked.scorer_seconds} s a picture"
    batches = f"plain {pair.plain.micro_batch}, ramctl {sizes}"
    record.add("set_up", ready, f"ready after {ready:.0f} s; micro-batches: {batches}; reward: {rewarding}")
    flops = count_flops(backbone, pair.policy)
    record.add(
        "flops_per_item",
        vars(flops),
        f"GFLOP of one item: forward {flops.forward / 1e9:.4g}, forward and backward "
        f"{flops.forward_backward / 1e9:.4g}, decode {flops.decode / 1e9:.4g}",
    )
    with _trials(asked.trial, pair):
        if asked.only:
            _run_only(pair, record, asked.only, asked.repeats)
            return 0
        mine = run_scaling(pair, world, record, repeats=asked.repeats) if world.size > 1 else pair
        if mine is not None:
            end = began + 60 * asked.minutes
            base = run_pairs(mine, record, flops, peak, repeats=asked.repeats, end=end)
            run_variants(mine, asked.variant, record, base, remade, end=end)
    return 0


def _introduce(record: Record, config: Config, fraction: Fraction, device: torch.device) -> None:
    """What is measured, and on what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    record.add("command", sys.argv[1:], f"python -m benchmarks.ram_step {' '.join(sys.argv[1:])}")
    record.add(
        "machine",
        {"device": name, "torch": torch.__version__, "python": platform.python_version()},
        f"{name}, torch {torch.__version__}",
    )
    images, items = config.images_per_step, config.items_per_step
    record.add(
        "step",
        {"preset": config.name, "images": images, "items": items, "fraction": str(fraction)},
        f"{config.name}, {fraction} of a step: {images} pictures, {items} items",
    )


def _agree(record: Record, preset: str, overrides: Sequence[tuple[str, str]]) -> bool:
    """Whether both loops compute the same on the embedded model in float32."""
    same = check_agreement(preset, overrides)
    record.add(
        "agreement_float32",
        {"loss": same.loss, "gradient": same.gradient},
        f"float32 check: loss off by {same.loss:.1e} (at most {LOSS_TOLERANCE:g}), gradient by "
        f"{same.gradient:.1e} (at most {GRADIENT_TOLERANCE:g})",
    )
    return same.within_tolerance


def _measure_peaks(record: Record, world: World, device: torch.device, precision: str) -> float:
    """The matrix peak of every process' device; the first one's in the type of the passes, FLOP/s."""
    every = world.gather(matrix_peak(device))
    for rank, rates in enumerate(every):
        shown = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in rates.items())
        whose = f" of process {rank}" if world.size > 1 else ""
        record.add(f"matrix_peak/{rank}" if rank else "matrix_peak", rates, f"matrix peak{whose}, TFLOP/s: {shown}")
    peaks: dict[str, float] = every[0]
    return peaks.get(precision) or max(peaks.values())


def _run_only(pair: Pair, record: Record, phase: str, repeats: int) -> None:
    ours, plain = only_phase(pair, phase)
    record.add("warm_up", {"ramctl": ours, "plain": plain}, f"warm-up: plain {plain:.2f} s, ramctl {ours:.2f} s")
    times = [only_phase(pair, phase) for _ in range(repeats)]
    ours, plain = (statistics.median(column) for column in zip(*times, strict=True))
    record.add(
        phase,
        {"ramctl": ours, "plain": plain, "all": times},
        f"RESULT {phase}: plain {plain:.3f} s, ramctl {ours:.3f} s, ratio {plain / ours:.2f}",
    )


@contextlib.contextmanager
def _trials(names: Sequence[str], pair: Pair) -> Iterator[None]:
    if not names:
        yield
        return
    from benchmarks.trials import applied

    with applied(names, pair.backbone, pair.policy, pair.trainer):
        yield


if __name__ == "__main__":
    raise SystemExit(main())
