"""Seconds of one RAM step, ramctl against a plain loop on the same prompts, noise and weights, in the same run.

    python -m benchmarks.ram_step --model tinyworld --preset geneval-tiny                  # CPU, a minute or two
    python -m benchmarks.ram_step --preset geneval --fraction 1/24 --compile --json step.json   # a GPU, random weights

Prints, and with ``--json`` writes, each figure as soon as it is known: the peak of the machine's matrix product, the
model's FLOPs, warm-up steps, then pairs of measured steps (plain, ramctl, plain, …) with their phases, and the ratio. The
method is in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_loop import PhaseClock, PlainLoop, PlainStep
from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.config import Config
from ramctl.engine.micro_batch import auto_micro_batch
from ramctl.engine.policy import Policy
from ramctl.engine.randomness import keyed_normal, keyed_seed, keyed_uniform
from ramctl.engine.rollout import Endpoints
from ramctl.engine.trainer import RewardFunction, Trainer, _Sweep
from ramctl.prompts import Prompt, read_prompts
from ramctl.resources import find_resource
from ramctl.scorers.base import Images, ImageScore, Scores
from ramctl.settings import load_settings
from ramctl.training import make_reward

RANDOM = "random-sd35"
PHASES = ("text", "sample", "decode", "score", "sweep old", "sweep ref", "train", "update")
ONLY = ("text", "sample", "decode", "sweep", "train")
#: Largest relative differences from the plain loop, float32 on a CPU.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


class StandInReward:
    """A reward of known cost: it sleeps, so it needs no core, and gives picture i of a step a fixed value in [0, 1)."""

    def __init__(self, seconds_per_image: float) -> None:
        self.seconds_per_image = seconds_per_image

    def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Scores that depend on the place in the batch only, the same whatever the pictures' rounding."""
        time.sleep(self.seconds_per_image * len(images))
        values = keyed_uniform([keyed_seed(0, "sample", 0, i) for i in range(len(images))])
        return Scores.collect([ImageScore(float(value)) for value in values])


class Record:
    """Figures as they come: printed at once, and the JSON file written anew with each."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.figures: dict[str, Any] = {}

    def add(self, key: str, value: Any, shown: str) -> None:
        """Keep a figure and print ``shown``."""
        self.figures[key] = value
        print(shown, flush=True)
        if self.path is not None:
            partial = self.path.with_name(self.path.name + ".part")
            partial.write_text(json.dumps(self.figures, indent=1), encoding="utf-8")
            partial.replace(self.path)


# -- what is measured ------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """ramctl and the plain loop over the same base weights, prompts and reward."""

    config: Config
    backbone: StableDiffusion3
    policy: Policy
    trainer: Trainer
    plain: PlainLoop

    def align(self) -> None:
        """Give the plain loop ramctl's weights and step, so that rounding does not add up from step to step."""
        self.plain.load(self.policy.tensors("policy"), self.policy.tensors("old"))
        self.plain.step_index = self.trainer.step_index

    def resident_bytes(self) -> int:
        """What ramctl alone keeps in memory between steps."""
        tensors = [*self.policy.live.parameters(), *self.policy.frozen.parameters(), *self.policy._base.values()]
        tensors += [tensor for which in self.policy.sets.values() for tensor in which.values()]
        state = self.trainer.optimizer.state.values()
        tensors += [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def resolve(preset: str, *, fraction: Fraction = Fraction(1), overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """The preset with a fraction of its prompts per step.

    Raises:
        ValueError: the fraction does not leave a whole number of prompts.
    """
    config = load_settings(preset, overrides=list(overrides)).config
    prompts = config.rollout.prompts_per_step * fraction
    if prompts.denominator != 1 or prompts < 1:
        raise ValueError(f"--fraction {fraction} of {config.rollout.prompts_per_step} prompts is no whole number.")
    return load_settings(preset, overrides=[*overrides, ("rollout.prompts_per_step", str(prompts))]).config


def load_model(config: Config, device: torch.device, *, random: bool, layers: int | None) -> StableDiffusion3:
    """The preset's folder, or SD3.5-Medium's architecture with random weights made on the device."""
    autocast = torch.bfloat16 if config.runtime.precision == "bfloat16" else None
    if not random:
        return StableDiffusion3.load(config.model, device, autocast)
    from benchmarks.random_sd35 import build_pipeline

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32)
    try:
        with torch.device(device):
            pipeline = build_pipeline(layers=layers, with_t5=config.model.use_t5)
    finally:
        torch.set_default_dtype(before)
    return StableDiffusion3(pipeline, config.model, device, autocast)


def make_pair(
    config: Config,
    backbone: StableDiffusion3,
    reward: RewardFunction,
    *,
    plain_micro_batch: int = 0,
    compile: bool = False,
) -> Pair:
    """Both loops. The plain one takes the micro-batch that ramctl would train with, unless told."""
    prompts = read_prompts(find_resource(config.prompts.train))
    micro_batch = plain_micro_batch or auto_micro_batch(backbone.latent_shape, backbone.device, training=True)
    plain = PlainLoop(config, backbone, prompts, reward, micro_batch=micro_batch)
    policy = Policy(backbone, config.lora, seed=config.train.seed)
    if compile:
        for network in (policy.live, policy.frozen):
            backbone.compile(network)
    pair = Pair(config, backbone, policy, Trainer(config, backbone, policy, prompts, reward), plain)
    pair.align()
    return pair


def instrument(trainer: Trainer) -> PhaseClock:
    """Time the trainer's parts from outside, by wrapping its methods and its backbone's on these two objects."""
    clock = PhaseClock(trainer.backbone.device)

    def wrap(owner: Any, method: str, name: Callable[..., str]) -> None:
        original = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with clock.phase(name(*arguments)):
                return original(*arguments, **keywords)

        setattr(owner, method, timed)

    wrap(trainer.backbone, "encode", lambda *_: "text")
    wrap(trainer.backbone, "decode", lambda *_: "decode")
    wrap(trainer, "_rollout", lambda *_: "rollout")
    wrap(trainer, "_sweep", lambda *_: "sweep")
    wrap(trainer, "_sweep_pass", lambda *a: "sweep old" if a[4] == "old" else "sweep ref")
    wrap(trainer, "_accumulate", lambda *_: "train")
    wrap(trainer, "_update", lambda *_: "update")
    wrap(trainer, "_lag", lambda *_: "update")
    return clock


@dataclass(frozen=True)
class MeasuredStep:
    """One step of either loop: seconds by phase and ``total``, and the most it took of the GPU (None on a CPU)."""

    loss: float
    gradients: Mapping[str, Tensor]
    rewards: float
    seconds: dict[str, float]
    peak_bytes: int | None


def ram_step(pair: Pair, clock: PhaseClock) -> MeasuredStep:
    """One step of ``Trainer.step``; ``score`` is the time for which it had to wait, ``reward`` what scoring took."""
    clock.seconds.clear()
    clock.wait()
    start = time.perf_counter()
    metrics = pair.trainer.step().metrics
    clock.wait()
    total = time.perf_counter() - start
    seconds = dict(clock.seconds)
    rollout, sweep = seconds.pop("rollout"), seconds.pop("sweep")
    seconds["sample"] = rollout - seconds["text"] - seconds["decode"]
    # Loading the reference's weights into the frozen network lies between the two sweeps; the old ones' is in `sample`.
    seconds["sweep ref"] = sweep - seconds["sweep old"]
    seconds |= {"score": metrics["seconds/score"], "reward": metrics["seconds/reward"], "total": total}
    gradients = {name: p.grad for name, p in pair.policy.parameters.items() if p.grad is not None}
    peak = None
    if "memory/peak_gb" in metrics:
        peak = int(torch.cuda.max_memory_allocated(clock.device)) - pair.plain.resident_bytes()
    return MeasuredStep(metrics["loss"], gradients, metrics["reward/mean"], seconds, peak)


def plain_step(pair: Pair) -> MeasuredStep:
    """One step of the plain loop from the same state; where memory runs out, with half the micro-batch."""
    device, resident = pair.backbone.device, pair.resident_bytes()
    while True:
        pair.align()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        result: PlainStep | None = None
        with contextlib.suppress(torch.OutOfMemoryError):
            result = pair.plain.step()
        if result is not None:
            break
        if pair.plain.micro_batch < 2:
            raise SystemExit("The plain loop does not fit into this GPU even with one picture at a time.")
        pair.plain.micro_batch //= 2
        print(f"plain loop: out of memory, micro-batch now {pair.plain.micro_batch}", flush=True)
    peak = torch.cuda.max_memory_allocated(device) - resident if device.type == "cuda" else None
    return MeasuredStep(result.loss, result.gradients, float(result.rewards.mean()), result.seconds, peak)


# -- agreement --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far ramctl's step is from the plain one: |a − b|/|b| of the losses, ‖a − b‖/‖b‖ of the whole gradient."""

    loss: float
    gradient: float

    @classmethod
    def of(cls, ours: MeasuredStep, plain: MeasuredStep) -> Agreement:
        """Compare two measured steps."""
        if set(ours.gradients) != set(plain.gradients):
            raise ValueError("the two loops have gradients of different parameters")
        difference = sum(float((ours.gradients[k] - g).double().square().sum()) for k, g in plain.gradients.items())
        norm = sum(float(gradient.double().square().sum()) for gradient in plain.gradients.values())
        return cls(abs(ours.loss - plain.loss) / abs(plain.loss), (difference / norm) ** 0.5)

    @property
    def within_tolerance(self) -> bool:
        """Whether both are within the stated tolerance of float32 on a CPU."""
        return self.loss <= LOSS_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


@torch.no_grad()
def spread_weights(policy: Policy, seed: int = 0) -> None:
    """Give policy and old weights different LoRAs with B ≠ 0, so that exchanging any two of the three sets shows."""
    generator = torch.Generator().manual_seed(seed)
    for which in ("policy", "old"):
        tensors = policy.tensors("policy" if which == "policy" else "old")
        noise = {name: torch.randn(t.shape, generator=generator).to(t.device) for name, t in tensors.items()}
        policy.load({which: {name: t + 0.02 * noise[name] for name, t in tensors.items()}})


def check_agreement(preset: str, overrides: Sequence[tuple[str, str]] = ()) -> Agreement:
    """Both loops' step on the embedded model in float32, small: 2 prompts × 4 pictures × 2 noisings, 4 sampling steps."""
    small = {
        "rollout.prompts_per_step": "2",
        "rollout.images_per_prompt": "4",
        "rollout.sampling_steps": "4",
        "ram.noisings_per_image": "2",
        "runtime.precision": "float32",
        "runtime.device": "cpu",
    }
    config = load_settings(preset, overrides=[*small.items(), *overrides]).config
    backbone = load_model(config, torch.device("cpu"), random=False, layers=None)
    # Neither loop's batches may divide the step evenly, else an error in the remainder would not show.
    pair = make_pair(config, backbone, StandInReward(0.0), plain_micro_batch=3)
    spread_weights(pair.policy)
    clock = instrument(pair.trainer)
    plain = plain_step(pair)
    return Agreement.of(ram_step(pair, clock), plain)


# -- FLOPs and the machine ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """FLOPs of the model's parts for one item: a matrix product of [m, k] and [k, n] counts 2mkn."""

    forward: int
    forward_backward: int
    decode: int

    def of_step(self, config: Config) -> dict[str, float]:
        """FLOPs by phase; the same for both loops, whatever each computes besides."""
        passes = 1 if config.rollout.guidance_scale == 1.0 else 2
        images, items = config.images_per_step, config.items_per_step
        return {
            "sample": float(images * config.rollout.sampling_steps * passes * self.forward),
            "decode": float(images * self.decode),
            "sweep old": float(items * self.forward),
            "sweep ref": float(items * self.forward),
            "train": float(items * self.forward_backward),
        }


def count_flops(backbone: StableDiffusion3, policy: Policy) -> Flops:
    """Count one item's passes with torch's counter, uncompiled, with attention as matrix products (so it is counted)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count(work: Callable[[], Any]) -> int:
        with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            counter = FlopCounterMode(display=False)
            with counter:
                work()
        return int(counter.get_total_flops())

    text = backbone.encode(["a red circle"])
    x = torch.zeros(1, *backbone.latent_shape, device=backbone.device)
    t = torch.full((1,), 0.5, device=backbone.device)
    with torch.no_grad():
        forward = count(lambda: backbone.velocity(policy.frozen, x, t, text))
        decode = count(lambda: backbone.decode(x))
    both = count(lambda: backbone.velocity(policy.live, x, t, text).sum().backward())  # type: ignore[no-untyped-call]
    for parameter in policy.parameters.values():
        parameter.grad = None
    return Flops(forward, both, decode)


def matrix_peak(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large matrix product, the fastest of several: bfloat16 8192³ on a GPU; both types, 4096³, on a CPU."""
    on_gpu = device.type == "cuda"
    size, dtypes = (8192, [torch.bfloat16]) if on_gpu else (4096, [torch.float32, torch.bfloat16])
    clock = PhaseClock(device)
    rates: dict[str, float] = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        repeats = 20 if on_gpu else 1
        times = []
        for _ in range(6):
            clock.seconds.clear()
            with clock.phase("matmul"):
                for _ in range(repeats):
                    torch.mm(a, b)
            times.append(clock.seconds["matmul"] / repeats)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / min(times)
    return rates


# -- single phases ------------------------------------------------------------------------------------------------------


def only_phase(pair: Pair, phase: str) -> tuple[float, float]:
    """Seconds (ramctl, plain) of one phase alone, on random latents where it needs pictures' latents."""
    config, backbone, trainer, plain = pair.config, pair.backbone, pair.trainer, pair.plain
    count, group, device = config.images_per_step, config.rollout.images_per_prompt, backbone.device
    prompts = [trainer.prompts[i // group % len(trainer.prompts)].text for i in range(count)]
    unique = list(dict.fromkeys(prompts))
    rows = torch.tensor([unique.index(prompt) for prompt in prompts], device=device)
    x = keyed_normal(range(count), backbone.latent_shape, device)
    clock, plain_clock = PhaseClock(device), PhaseClock(device)
    batches = [range(i, min(i + plain.micro_batch, count)) for i in range(0, count, plain.micro_batch)]

    if phase == "text":
        with clock.phase(phase):
            backbone.encode(unique)
            backbone.encode([""])
        with plain_clock.phase(phase):
            for batch in batches:
                plain.embed([prompts[i] for i in batch])
    elif phase == "decode":
        with clock.phase(phase):
            for part in torch.split(x, trainer.batches["sample"].size):
                backbone.decode(part)
        with plain_clock.phase(phase):
            for batch in batches:
                plain.decode(x[batch.start : batch.stop])
    else:
        text, empty = backbone.encode(unique), backbone.encode([""])
        texts = [(text.tokens[rows[b.start : b.stop]], text.pooled[rows[b.start : b.stop]]) for b in batches]
        if phase == "sample":
            with plain_clock.phase(phase):
                for batch, own in zip(batches, texts, strict=True):
                    plain.sample(batch, own, (empty.tokens, empty.pooled))
            with clock.phase(phase):
                _sample_all(pair, text, rows, x, empty)
        else:
            for batch, own in zip(batches, texts, strict=True):
                for noising in range(config.ram.noisings_per_image):
                    part = x[batch.start : batch.stop]
                    plain.train_on(batch, noising, part, own, torch.zeros(len(batch)), plain_clock)
            plain.optimizer.zero_grad()
            endpoints = Endpoints(x, backbone.decode(x[:1]).numpy(), text, rows)
            _sweep_or_train(trainer, endpoints, phase, clock)
    plain_seconds = plain_clock.seconds
    if phase == "sweep":
        return clock.seconds[phase], plain_seconds["sweep old"] + plain_seconds["sweep ref"]
    return clock.seconds[phase], plain_seconds[phase]


def _sample_all(pair: Pair, text: TextEmbeddings, rows: Tensor, x: Tensor, empty: TextEmbeddings) -> None:
    rollout = pair.config.rollout
    network = pair.policy.network("old")
    size = pair.trainer.batches["sample"].size
    for part, own in zip(torch.split(x, size), torch.split(rows, size), strict=True):
        pair.backbone.sample(
            network,
            text.select(own),
            part,
            steps=rollout.sampling_steps,
            guidance_scale=rollout.guidance_scale,
            negative=empty,
        )


def _sweep_or_train(trainer: Trainer, endpoints: Endpoints, phase: str, clock: PhaseClock) -> None:
    share, noisings = range(len(endpoints)), trainer.config.ram.noisings_per_image
    if phase == "sweep":
        with clock.phase(phase):
            trainer._sweep(endpoints, share)
        return
    velocities = torch.zeros(len(endpoints) * noisings, *endpoints.latents.shape[1:], device=endpoints.latents.device)
    sweep = _Sweep(velocities, velocities, None, None)
    advantages = torch.zeros(len(endpoints), dtype=torch.float64)
    with clock.phase(phase):
        trainer._accumulate(endpoints, share, sweep, advantages, range(noisings), trainer.batches["train"].size)


# -- the run ------------------------------------------------------------------------------------------------------------


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


def run_pairs(pair: Pair, record: Record, flops: Flops, peak: float, *, repeats: int, end: float) -> None:
    """Warm-up, then up to ``repeats`` interleaved pairs, no further one when it would end after ``end``."""
    clock = instrument(pair.trainer)
    plain = plain_step(pair)
    record.add("warm_up/plain", plain.seconds, f"warm-up, plain loop: {plain.seconds['total']:.2f} s")
    ours = ram_step(pair, clock)
    record.add("warm_up/ramctl", ours.seconds, f"warm-up, ramctl: {ours.seconds['total']:.2f} s (compilation included)")
    images = pair.config.images_per_step
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
            f"{b.seconds['total'] / a.seconds['total']:.2f}; loss off by {same.loss:.1e}, gradient by {same.gradient:.1e}",
        )
        took = time.perf_counter() - start
        if number < repeats and time.perf_counter() + took > end:
            record.add("stopped_early", number, f"no time for another pair after {number}")
            break
    ours_median, plain_median = medians(our_steps), medians(plain_steps)
    rows = table(ours_median, plain_median, flops.of_step(pair.config), peak)
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
        "reward_hidden", hidden, f"scoring took {ours_median['reward']:.2f} s, {hidden:.2f} s of it under the sweeps"
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
        f"RESULT peak_gb={ours / 1e9:.1f} plain={plain / 1e9:.1f} (text encoders included, the other loop's weights not)",
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
    add("--repeats", type=int, default=3, help="measured pairs")
    add("--minutes", type=float, default=7.0, help="start no further pair that would end later")
    add("--plain-micro-batch", type=int, default=0, help="of the plain loop; default: what ramctl would train with")
    add("--layers", type=int, help=f"of {RANDOM}'s stacks, for a trial run on a CPU")
    add("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="any preset key")
    add("--threads", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 1 where the embedded model's check finds the two loops apart."""
    asked = _parser().parse_args(arguments)
    began = time.perf_counter()
    record = Record(asked.json)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    overrides = [tuple(pair) for pair in asked.set]
    embedded = asked.model == "tinyworld" or (asked.model is None and asked.preset.endswith("-tiny"))
    random = not embedded and asked.model in (None, RANDOM)
    if not random:
        overrides.append(("model.path", "models/tinyworld" if embedded else asked.model))
    config = resolve(asked.preset, fraction=asked.fraction, overrides=overrides)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    record.add("command", sys.argv[1:], f"python -m benchmarks.ram_step {' '.join(sys.argv[1:])}")
    record.add(
        "machine",
        {"device": name, "torch": torch.__version__, "python": platform.python_version()},
        f"{name}, torch {torch.__version__}",
    )
    record.add(
        "step",
        {
            "preset": config.name,
            "images": config.images_per_step,
            "items": config.items_per_step,
            "fraction": str(asked.fraction),
        },
        f"{config.name}, {asked.fraction} of a step: {config.images_per_step} pictures, {config.items_per_step} items",
    )
    if embedded and not asked.only:
        same = check_agreement(asked.preset, overrides)
        record.add(
            "agreement_float32",
            {"loss": same.loss, "gradient": same.gradient},
            f"float32 check: loss off by {same.loss:.1e} (at most {LOSS_TOLERANCE:g}), gradient by "
            f"{same.gradient:.1e} (at most {GRADIENT_TOLERANCE:g})",
        )
        if not same.within_tolerance:
            print("The two loops do not compute the same step; their times would compare nothing.", file=sys.stderr)
            return 1
    peaks = matrix_peak(device)
    shown = ", ".join(f"{dtype} {rate / 1e12:.3g}" for dtype, rate in peaks.items())
    record.add("matrix_peak", peaks, f"matrix peak, TFLOP/s: {shown}")
    peak = peaks.get(config.runtime.precision) or max(peaks.values())
    backbone = load_model(config, device, random=random, layers=asked.layers)
    real = asked.scorer == "preset" or (asked.scorer == "auto" and embedded)
    reward: RewardFunction = StandInReward(asked.scorer_seconds)
    if real:
        scorers = make_reward(config)
        scorers.load()
        reward = scorers
    pair = make_pair(config, backbone, reward, plain_micro_batch=asked.plain_micro_batch, compile=asked.compile)
    sizes = {phase: batch.size for phase, batch in pair.trainer.batches.items()}
    record.add(
        "set_up",
        time.perf_counter() - began,
        f"set up in {time.perf_counter() - began:.0f} s; micro-batches: plain {pair.plain.micro_batch}, ramctl {sizes}; "
        f"reward: {', '.join(config.reward.scorers) if real else f'stand-in, {asked.scorer_seconds} s a picture'}",
    )
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
        else:
            run_pairs(pair, record, flops, peak, repeats=asked.repeats, end=began + 60 * asked.minutes)
    return 0


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
