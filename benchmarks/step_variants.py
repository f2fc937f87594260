"""ramctl's step with one thing changed or undone, after the pairs of :mod:`benchmarks.ram_step`: what each brings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.activations import GELU

from benchmarks.step_figures import Record
from benchmarks.step_pair import MeasuredStep, Pair, StandInReward, instrumented, ram_step, with_trainer
from ramctl.backbones.float8 import has_float8_products, turn_into
from ramctl.backbones.lean import GpuGelu
from ramctl.config import Config
from ramctl.engine import reward
from ramctl.engine.reward import RewardFunction

Change = Callable[[Pair], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def _separate_gelu(pair: Pair) -> Iterator[None]:
    """diffusers' gelu, a kernel of its own after the product."""
    layers = [module for module in pair.policy.frozen.modules() if type(module) is GpuGelu]
    for layer in layers:
        turn_into(layer, GELU)
    try:
        yield
    finally:
        for layer in layers:
            turn_into(layer, GpuGelu)


def _eager_decoder(pair: Pair) -> contextlib.AbstractContextManager[Any]:
    return patch.object(pair.backbone._pipeline.vae.decoder, "_compiled_call_impl", None)


def _shared_stream(pair: Pair) -> contextlib.AbstractContextManager[Any]:
    """Scorers in the networks' own queue of the GPU."""
    return patch.object(reward, "reward_stream", lambda device: None)


@dataclass(frozen=True)
class Variant:
    """Preset keys laid over, a change of the objects, or a reward that takes this share of the sweeps' time.

    ``compiles``: the first step compiles, so a second one is measured.
    """

    says: str
    keys: Mapping[str, str] = field(default_factory=dict)
    change: Change = contextlib.nullcontext
    reward_of_sweeps: float = 0.0
    compiles: bool = False


VARIANTS: dict[str, Variant] = {
    "float8": Variant("rollouts in 8 bits", {"rollout.float8": "true"}, compiles=True),
    "slow-reward": Variant("a reward that takes as long as both sweeps", reward_of_sweeps=1.0),
    "second-order": Variant(
        "ten steps of dpm2m for twenty of euler", {"rollout.sampler": "dpm2m", "rollout.sampling_steps": "10"}
    ),
    "shared-stream": Variant("scorers in the networks' queue of the GPU", change=_shared_stream),
    "eager-decoder": Variant("the autoencoder as diffusers runs it", change=_eager_decoder),
    "separate-gelu": Variant("gelu apart from its product", change=_separate_gelu, compiles=True),
    "guidance-interval": Variant(
        "guidance at noise 0.3 to 0.9 only",
        {"rollout.guidance_min_noise": "0.3", "rollout.guidance_max_noise": "0.9"},
        compiles=True,
    ),
}


def find_variant(name: str) -> Variant:
    """A variant by its name; ``KEY=VALUE`` lays that key over.

    Raises:
        SystemExit: there is none.
    """
    key, is_key, value = name.partition("=")
    if is_key:
        return Variant("as it says", {key: value}, compiles=True)
    if name not in VARIANTS:
        raise SystemExit(f"--variant {name}: there is none; there are {', '.join(VARIANTS)}, or KEY=VALUE.")
    return VARIANTS[name]


def check_variants(names: Sequence[str], remade: Callable[[Mapping[str, str]], Config], device: torch.device) -> None:
    """Refuse variants that cannot be measured, before anything else is.

    Raises:
        ConfigError: keys that do not go together.
        SystemExit: no such variant, or no 8-bit products on this device.
    """
    for name in names:
        if remade(find_variant(name).keys).rollout.float8 and not has_float8_products(device):
            raise SystemExit(f"--variant {name}: {device} has no 8-bit products.")


def run_variants(
    pair: Pair,
    names: Sequence[str],
    record: Record,
    base: Mapping[str, float],
    remade: Callable[[Mapping[str, str]], Config],
    *,
    end: float,
) -> None:
    """One measured step of each variant, beside ``base``, the medians of the unchanged step; none begun after ``end``.

    Args:
        remade: the pair's config with further keys.
    """
    sweeps = base["sweep old"] + base["sweep ref"]
    for name in names:
        if time.perf_counter() > end:
            record.add(f"variant/{name}", None, f"{name}: no time left")
            continue
        variant = find_variant(name)
        config = remade(variant.keys)
        scored_by: RewardFunction = pair.trainer.reward
        if variant.reward_of_sweeps:
            scored_by = StandInReward(
                variant.reward_of_sweeps * sweeps / config.images_per_step, config.images_per_step
            )
        with variant.change(pair):
            step = _measure(pair, config, scored_by, warm_up=variant.compiles)
        shown = ", ".join(f"{p} {base[p]:.2f} → {step.seconds[p]:.2f}" for p in base if base[p] > 0.2)
        ratio = step.seconds["total"] / base["total"]
        record.add(f"variant/{name}", step.seconds, f"{name} ({variant.says}): {shown}; of the step's time {ratio:.3f}")


def _measure(pair: Pair, config: Config, scored_by: RewardFunction, *, warm_up: bool) -> MeasuredStep:
    changed = with_trainer(pair, config, scored_by)
    with instrumented(changed.trainer) as clock:
        if warm_up:
            ram_step(changed, clock)
        return ram_step(changed, clock)
