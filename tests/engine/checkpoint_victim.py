"""Saves checkpoints until it is killed; run as a program by test_checkpoint.py, which looks at what is left.

    python checkpoint_victim.py calls PRESET FOLDER    die before the k-th file-system call of a save, for every k
    python checkpoint_victim.py random PRESET FOLDER   be killed by SIGKILL at random moments of saving in a loop

The model is loaded once; each death is that of a forked child. The parent prints one line of JSON per death.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.engine.checkpoint import MANIFEST_FILE, CheckpointStore, damage, find_checkpoint
from ramctl.engine.policy import Policy
from ramctl.engine.trainer import Trainer
from ramctl.prompts import read_prompts
from ramctl.scorers.composite import Reward, Term
from ramctl.scorers.jpeg import JpegCompressibility
from ramctl.settings import load_settings

MOMENTS = 24


def make_trainer(preset: str) -> Trainer:
    """A trainer after one step, so that the optimizer has its moments."""
    # Few small tensors: what is tested is the order of calls, and there are many deaths.
    config = load_settings(preset, overrides=[("rank", "1"), ("target_modules", '["attn.to_q"]')]).config
    backbone = StableDiffusion3.load(config.model, torch.device("cpu"), None)
    policy = Policy(backbone, config.lora, seed=0)
    trainer = Trainer(
        config, backbone, policy, read_prompts(config.prompts.train), Reward([Term(JpegCompressibility())])
    )
    trainer.step()
    return trainer


def save(trainer: Trainer, folder: Path, step: int) -> None:
    """Save as step ``step``; every tensor holds that number, so that a mixture of two checkpoints shows."""
    trainer.step_index = step
    with torch.no_grad():
        for parameter in trainer.policy.parameters.values():
            parameter.fill_(step)
        for state in trainer.optimizer.state.values():
            state["exp_avg"].fill_(step)
    trainer.policy.follow("old", 0.0)
    trainer.policy.follow("evaluation", 0.0)
    CheckpointStore(folder, keep=2).save(trainer, "config\n", {"number": step}, best=step % 2 == 0)


def inspect(folder: Path, trainer: Trainer) -> dict[str, object]:
    """What a user finds: the newest intact checkpoint, whether it is whole, and whether ``latest`` can be loaded."""
    newest, problems = CheckpointStore(folder).newest_intact()
    found: dict[str, object] = {"problems": problems, "newest": newest.name if newest else None}
    if newest is not None:
        state = CheckpointStore.restore(newest, trainer)
        tensors = [t for which in ("policy", "old", "evaluation") for t in trainer.policy.tensors(which).values()]
        tensors += [s["exp_avg"] for s in trainer.optimizer.state.values()]
        found["whole"] = state.extra["number"] == state.step and all(bool((t == state.step).all()) for t in tensors)
    for path in (folder, folder / "latest"):
        chosen = find_checkpoint(path)
        found[path.name if path.name == "latest" else "folder"] = [chosen.name, damage(chosen)]
    return found


def in_child(work: Callable[[], None]) -> int:
    """Fork, work, and end without any clean-up; the child's process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    return child


def die_at(call: int, folder: Path, event_log: Path) -> None:
    """End this process before its ``call``-th file-system call (as Python's audit events count them) in ``folder``."""
    seen = 0
    within = str(folder)
    watched = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.chmod", "shutil.rmtree")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in watched and any(within in os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | Path)):
            seen += 1
            if seen == call:
                descriptor = os.open(event_log, os.O_WRONLY | os.O_CREAT)
                os.write(descriptor, event.encode())
                os._exit(77)

    sys.addaudithook(hook)


def report(trainer: Trainer, folder: Path, **facts: object) -> None:
    """One line: what is found as the kill left it, and after the next run has swept."""
    row: dict[str, object] = {**facts, "before": inspect(folder, trainer)}
    CheckpointStore(folder).sweep_leftovers()
    row["after"] = inspect(folder, trainer)
    row["left"] = sorted(p.name for p in folder.iterdir() if p.name.startswith("."))
    print(json.dumps(row), flush=True)


def every_call(trainer: Trainer, folder: Path) -> None:
    """An ordinary save that prunes; the save of a step that is there already, damaged; the same, intact."""
    other = copy.deepcopy(trainer, {id(p := trainer.backbone._pipeline): p})  # type: ignore[attr-defined]
    for situation in ("next", "again-damaged", "again-intact"):
        pristine = folder / f"{situation}-pristine"
        for step in (1, 2, 3):
            save(trainer, pristine, step)
        if situation == "again-damaged":
            (pristine / "step-000003" / MANIFEST_FILE).write_text("{}")
        call, code = 0, 77
        while code == 77:
            call += 1
            run = folder / f"{situation}-{call}"
            shutil.copytree(pristine, run, symlinks=True)
            log = folder / "event"
            log.unlink(missing_ok=True)

            def work(call: int = call, run: Path = run, situation: str = situation, log: Path = log) -> None:
                die_at(call, run, log)
                save(trainer, run, 4 if situation == "next" else 3)

            _, status = os.waitpid(in_child(work), 0)
            code = os.waitstatus_to_exitcode(status)
            event = log.read_text() if log.is_file() else ""
            report(other, run, situation=situation, call=call, code=code, event=event)
            shutil.rmtree(run)


def random_moments(trainer: Trainer, folder: Path) -> None:
    """Kill a child that saves step after step; the next child goes on in the same folder, as a resumed run would."""
    other = copy.deepcopy(trainer, {id(p := trainer.backbone._pipeline): p})  # type: ignore[attr-defined]
    save(trainer, folder, 1)
    rng = random.Random(20)
    for moment in range(MOMENTS):
        newest, _ = CheckpointStore(folder).newest_intact()
        assert newest is not None
        first = int(newest.name.removeprefix("step-")) + 1

        def work(first: int = first) -> None:
            for step in range(first, first + 10_000):
                save(trainer, folder, step)

        child = in_child(work)
        time.sleep(0.02 + 0.25 * rng.random())
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        report(other, folder, moment=moment, code=os.waitstatus_to_exitcode(status), first=first)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, preset, target = sys.argv[1:]
    made = make_trainer(preset)
    {"calls": every_call, "random": random_moments}[kind](made, Path(target))
