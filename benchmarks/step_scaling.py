"""One RAM step shared by all processes against one of the same size alone: what further GPUs bring."""

from __future__ import annotations

import statistics

from benchmarks.step_figures import PHASES, Record
from benchmarks.step_pair import MeasuredStep, Pair, instrumented, ram_step, with_trainer
from ramctl.engine.distributed import World


def run_scaling(pair: Pair, world: World, record: Record, *, repeats: int) -> Pair | None:
    """Steps of all processes together; then each makes whole ones by itself, all at once; then the first one alone.

    The work is the same, though not the prompts and the noise. Micro-batches are per process, so set them, where the
    preset does not, to what a process' share fills: then the passes are the same, too. The second part tells what of a
    missing speed-up is unequal cards (a step is as fast as the slowest) and what is lost by working together.

    Returns:
        on the first process the pair with a trainer that works alone, on the others None.
    """
    together = _gathered(world, _steps(pair, repeats, warm_up=True))
    _show(record, world, "together", together)
    alone = with_trainer(pair, pair.config, pair.trainer.reward)
    apart = _gathered(world, _steps(alone, repeats, warm_up=False))
    _show(record, world, "apart", apart)
    world.leave()
    if not world.is_main:
        return None
    single = [step.seconds for step in _steps(alone, repeats, warm_up=False)]
    record.add("scaling/1", single, f"the first alone: {_shown(single)}")
    one, all_ = _median(single), _median(together[0])
    each = [_median(steps) for steps in apart]
    figures = {"alone": one, "together": all_, "apart": each, "processes": world.size}
    record.add(
        "scaling/ratio",
        figures,
        f"RESULT scaling={one / all_:.3f} ({world.size} processes, medians of {repeats} steps); against the slowest "
        f"card {max(each) / all_:.3f}; the slowest takes {max(each) / min(each):.3f} of the fastest's time",
    )
    return alone


def _gathered(world: World, steps: list[MeasuredStep]) -> list[list[dict[str, float]]]:
    """Each process' seconds by phase: the others wait for the slowest between phases."""
    every: list[list[dict[str, float]]] = world.gather([step.seconds for step in steps])
    return every


def _show(record: Record, world: World, how: str, every: list[list[dict[str, float]]]) -> None:
    for rank, steps in enumerate(every):
        record.add(f"scaling/{how}/{rank}", steps, f"{how}, process {rank} of {world.size}: {_shown(steps)}")


def _median(steps: list[dict[str, float]]) -> float:
    return statistics.median(step["total"] for step in steps)


def _steps(pair: Pair, repeats: int, *, warm_up: bool) -> list[MeasuredStep]:
    with instrumented(pair.trainer) as clock:
        steps = [ram_step(pair, clock) for _ in range(repeats + warm_up)]
    return steps[warm_up:]


def _shown(steps: list[dict[str, float]]) -> str:
    return "; ".join(", ".join(f"{name} {step[name]:.2f}" for name in ("total", *PHASES)) for step in steps)
