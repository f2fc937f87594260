"""ramctl's trainer and the plain loop side by side: how they are made, stepped, timed and compared."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.plain_loop import PhaseClock, PlainLoop, PlainStep
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.config import Config
from ramctl.engine.distributed import World
from ramctl.engine.micro_batch import auto_micro_batch
from ramctl.engine.policy import Policy
from ramctl.engine.randomness import keyed_seed, keyed_uniform
from ramctl.engine.reward import RewardFunction
from ramctl.engine.trainer import Trainer
from ramctl.prompts import Prompt, read_prompts
from ramctl.resources import find_resource
from ramctl.scorers.base import Images, ImageScore, Scores
from ramctl.settings import load_settings

#: Largest relative differences from the plain loop, float32 on a CPU.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


class StandInReward:
    """A reward of known cost: it sleeps, so it needs no core.

    Pictures get fixed values in [0, 1) in the order in which they come, again from the first one after ``pictures`` of
    them: the same in each step of so many, whatever the pictures' rounding and the batches they come in.
    """

    def __init__(self, seconds_per_image: float, pictures: int) -> None:
        self.seconds_per_image, self.pictures = seconds_per_image, pictures
        self._seen = 0

    def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Scores of the next pictures."""
        time.sleep(self.seconds_per_image * len(images))
        places = [(self._seen + i) % self.pictures for i in range(len(images))]
        self._seen += len(images)
        values = keyed_uniform([keyed_seed(0, "sample", 0, place) for place in places])
        return Scores.collect([ImageScore(float(value)) for value in values])


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
    world: World | None = None,
) -> Pair:
    """Both loops. The plain one takes the micro-batch that ramctl would train with, unless told.

    Of several processes ``world`` is the place; the plain loop knows one only.
    """
    prompts = read_prompts(find_resource(config.prompts.train))
    micro_batch = plain_micro_batch or auto_micro_batch(backbone.latent_shape, backbone.device, training=True)
    plain = PlainLoop(config, backbone, prompts, reward, micro_batch=micro_batch)
    policy = Policy(backbone, config.lora, seed=config.train.seed)
    if compile:
        for network in (policy.live, policy.frozen):
            backbone.compile(network)
    pair = Pair(config, backbone, policy, Trainer(config, backbone, policy, prompts, reward, world), plain)
    pair.align()
    return pair


@contextlib.contextmanager
def instrumented(trainer: Trainer) -> Iterator[PhaseClock]:
    """Time the trainer's parts: inside, its methods and its backbone's are wrapped on these two objects."""
    clock = PhaseClock(trainer.backbone.device)
    wrapped = contextlib.ExitStack()

    def wrap(owner: Any, method: str, name: Callable[..., str]) -> None:
        original = getattr(owner, method)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            with clock.phase(name(*arguments)):
                return original(*arguments, **keywords)

        wrapped.enter_context(patch.object(owner, method, timed))

    with wrapped:
        wrap(trainer.backbone, "encode", lambda *_: "text")
        wrap(trainer.backbone, "decode", lambda *_: "decode")
        wrap(trainer, "_rollout", lambda *_: "rollout")
        wrap(trainer, "_sweep", lambda *_: "sweep")
        wrap(trainer, "_sweep_pass", lambda *a: "sweep old" if a[4] == "old" else "sweep ref")
        wrap(trainer, "_accumulate", lambda *_: "train")
        wrap(trainer, "_update", lambda *_: "update")
        wrap(trainer, "_lag", lambda *_: "update")
        yield clock


def with_trainer(pair: Pair, config: Config, reward: RewardFunction) -> Pair:
    """The same weights and plain loop with a new trainer, which works alone."""
    trainer = Trainer(config, pair.backbone, pair.policy, pair.trainer.prompts, reward)
    return Pair(config, pair.backbone, pair.policy, trainer, pair.plain)


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
        return cls(_relative(abs(ours.loss - plain.loss), abs(plain.loss)), _relative(difference, norm) ** 0.5)

    @property
    def within_tolerance(self) -> bool:
        """Whether both are within the stated tolerance of float32 on a CPU."""
        return self.loss <= LOSS_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE


def _relative(difference: float, size: float) -> float:
    """0 / 0 is agreement: where all rewards of each group are equal, loss and gradient of the first step are zero."""
    return difference / size if size else (0.0 if difference == 0 else math.inf)


@torch.no_grad()
def spread_weights(policy: Policy, seed: int = 0) -> None:
    """Give policy and old weights different LoRAs with B ≠ 0, so that exchanging any two of the three sets shows."""
    generator = torch.Generator().manual_seed(seed)
    for which in ("policy", "old"):
        tensors = policy.tensors("policy" if which == "policy" else "old")
        noise = {name: torch.randn(t.shape, generator=generator).to(t.device) for name, t in tensors.items()}
        policy.load({which: {name: t + 0.02 * noise[name] for name, t in tensors.items()}})


def check_agreement(preset: str, overrides: Sequence[tuple[str, str]] = ()) -> Agreement:
    """A small step of both loops on the embedded model in float32: 2 prompts × 4 pictures × 2 noisings."""
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
    pair = make_pair(config, backbone, StandInReward(0.0, config.images_per_step), plain_micro_batch=3)
    spread_weights(pair.policy)
    plain = plain_step(pair)
    with instrumented(pair.trainer) as clock:
        return Agreement.of(ram_step(pair, clock), plain)
