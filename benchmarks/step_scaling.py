"""One RAM step shared by all processes against one of the same size alone: what further GPUs bring."""

from __future__ import annotations

import statistics

from benchmarks.step_figures import Record
from benchmarks.step_pair import MeasuredStep, Pair, instrumented, ram_step, with_trainer
from ramctl.engine.distributed import World


def run_scaling(pair: Pair, world: World, record: Record, *, repeats: int) -> Pair | None:
    """Steps of all processes together, then the first one's alone, when the others have left.

    The work is the same, though not the prompts and the noise. Micro-batches are per process, so set them, where the
    preset does not, to what a process' share fills: then the passes are the same, too.

    Returns:
        on the first process the pair with a trainer that works alone, on the others None.
    """
    together = _steps(pair, repeats, warm_up=True)
    # Each process' own phases: the step is as fast as the slowest card, and the others wait for it between phases.
    every = world.gather([step.seconds for step in together])
    for rank, steps in enumerate(every):
        record.add(f"scaling/{world.size}/{rank}", steps, f"process {rank} of {world.size}: {_shown(steps)}")
    world.leave()
    if not world.is_main:
        return None
    alone = with_trainer(pair, pair.config, pair.trainer.reward)
    single = _steps(alone, repeats, warm_up=False)
    record.add(
        "scaling/1", [step.seconds for step in single], f"the first alone: {_shown([step.seconds for step in single])}"
    )
    times = [statistics.median(step.seconds["total"] for step in steps) for steps in (single, together)]
    record.add(
        "scaling/ratio",
        {"alone": times[0], "together": times[1], "processes": world.size},
        f"RESULT scaling={times[0] / times[1]:.3f} ({world.size} processes, medians of {repeats} steps)",
    )
    return alone


def _steps(pair: Pair, repeats: int, *, warm_up: bool) -> list[MeasuredStep]:
    with instrumented(pair.trainer) as clock:
        steps = [ram_step(pair, clock) for _ in range(repeats + warm_up)]
    return steps[warm_up:]


def _shown(steps: list[dict[str, float]]) -> str:
    names = ("total", "text", "sample", "decode", "score", "sweep old", "sweep ref", "train", "update")
    return "; ".join(", ".join(f"{name} {step[name]:.2f}" for name in names) for step in steps)
