"""Changes laid over ramctl's step, to see what each would bring on this machine, or what one that is in it does.

    python -m benchmarks.trials bf16-frozen [--fraction 1/4] [--rounds 7]
    python -m benchmarks.trials peft-lora --set train.micro_batch 64

Two trainers of the embedded model take turns in one process, one as it is and one with the changes (and keys) named.
The fastest and the median step of each are printed, the phases of the fastest, and how far the first step's loss and
gradient are from the unchanged trainer's: both start from the same weights, with the same noise and rewards.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from peft.tuners.lora import Linear
from torch import Tensor, nn

from benchmarks.step_figures import PHASES
from benchmarks.step_pair import (
    Agreement,
    MeasuredStep,
    Pair,
    StandInReward,
    instrumented,
    load_model,
    make_pair,
    ram_step,
    resolve,
)
from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.lean import LoraLinear
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.engine.policy import Policy
from ramctl.engine.trainer import Trainer

Change = Callable[[StableDiffusion3, Policy, Trainer], None]


def bf16_frozen(backbone: StableDiffusion3, policy: Policy, trainer: Trainer) -> None:
    """The no-gradient network, its activations included, in bfloat16, instead of float32 weights under autocast."""
    policy.frozen.bfloat16()
    _feed_bfloat16(backbone, policy.frozen)


def bf16_live(backbone: StableDiffusion3, policy: Policy, trainer: Trainer) -> None:
    """The trained network's base weights and activations in bfloat16; LoRA and its gradient stay float32."""
    for parameter in policy.live.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    for buffer in policy.live.buffers():
        buffer.data = buffer.data.bfloat16()
    _feed_bfloat16(backbone, policy.live)


def _feed_bfloat16(backbone: StableDiffusion3, chosen: nn.Module) -> None:
    velocity = backbone.velocity

    def narrowed(network: nn.Module, x_t: Tensor, t: Tensor, text: TextEmbeddings) -> Tensor:
        if network is chosen:
            text = TextEmbeddings(text.tokens.bfloat16(), text.pooled.bfloat16())
        return velocity(network, x_t, t, text)

    backbone.velocity = narrowed  # type: ignore[method-assign]


def peft_lora(backbone: StableDiffusion3, policy: Policy, trainer: Trainer) -> None:
    """peft's own LoRA layers in place of :class:`ramctl.backbones.lean.LoraLinear`: what that one brings."""
    for module in policy.live.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = Linear


def diffusers_attention(backbone: StableDiffusion3, policy: Policy, trainer: Trainer) -> None:
    """diffusers' attention in place of :class:`ramctl.backbones.lean.CpuJointAttention`: what that one brings."""
    for network in (policy.live, policy.frozen):
        network.set_attn_processor(JointAttnProcessor2_0())  # type: ignore[operator]


def merged_lora(backbone: StableDiffusion3, policy: Policy, trainer: Trainer) -> None:
    """LoRA layers as one product with W + s·BA, made anew in each pass and kept in the graph."""
    scale = policy.lora.alpha / policy.lora.rank

    def forward_of(module: Any) -> Callable[[Tensor], Tensor]:
        base, a, b = module.base_layer, module.lora_A["default"], module.lora_B["default"]

        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                weight = base.weight.float() + scale * (b.weight @ a.weight)
            return torch.nn.functional.linear(x, weight, base.bias)

        return forward

    for module in policy.live.modules():
        if isinstance(module, Linear):
            module.forward = forward_of(module)


def compiled(backbone: StableDiffusion3, policy: Policy, trainer: Trainer) -> None:
    """What ``runtime.compile`` does, with inductor's C++ code on a CPU; the first step compiles."""
    for network in (policy.live, policy.frozen):
        backbone.compile(network)


CHANGES: dict[str, Change] = {
    "bf16-frozen": bf16_frozen,
    "bf16-live": bf16_live,
    "merged-lora": merged_lora,
    "peft-lora": peft_lora,
    "diffusers-attention": diffusers_attention,
    "compiled": compiled,
}


@contextlib.contextmanager
def applied(names: Sequence[str], backbone: StableDiffusion3, policy: Policy, trainer: Trainer) -> Iterator[None]:
    """Lay these changes over one trainer's objects (they are not taken off again).

    Raises:
        ValueError: no change of that name.
    """
    unknown = [name for name in names if name not in CHANGES]
    if unknown:
        raise ValueError(f"There is no trial {unknown[0]!r}; there are {', '.join(CHANGES)}.")
    for name in names:
        CHANGES[name](backbone, policy, trainer)
    yield


def _make(preset: str, fraction: Fraction, overrides: Sequence[tuple[str, str]]) -> Pair:
    config = resolve(preset, fraction=fraction, overrides=overrides)
    reward = StandInReward(0.0, config.images_per_step)
    return make_pair(config, load_model(config, torch.device("cpu"), random=False, layers=None), reward)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", choices=[*CHANGES, []])
    parser.add_argument("--preset", default="geneval-tiny")
    parser.add_argument("--fraction", type=Fraction, default=Fraction(1, 4))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
    asked = parser.parse_args(arguments)
    unchanged = _make(asked.preset, asked.fraction, [])
    changed = _make(asked.preset, asked.fraction, [tuple(pair) for pair in asked.set])
    with applied(asked.changes, changed.backbone, changed.policy, changed.trainer):
        _take_turns(unchanged, changed, asked.rounds, " ".join([*asked.changes, *(f"{k}={v}" for k, v in asked.set)]))


def _take_turns(unchanged: Pair, changed: Pair, rounds: int, title: str) -> None:
    before: list[MeasuredStep] = []
    after: list[MeasuredStep] = []
    with instrumented(unchanged.trainer) as clock, instrumented(changed.trainer) as other_clock:
        for number in range(rounds + 1):
            a = ram_step(unchanged, clock)
            b = ram_step(changed, other_clock)
            if number == 0:
                off = Agreement.of(b, a)
                continue
            before.append(copy.copy(a))
            after.append(copy.copy(b))
    totals = [[step.seconds["total"] for step in steps] for steps in (before, after)]
    fastest = [min(steps, key=lambda step: step.seconds["total"]).seconds for steps in (before, after)]
    phases = ", ".join(f"{p} {fastest[0][p]:.2f} → {fastest[1][p]:.2f}" for p in PHASES if fastest[0][p] > 0.02)
    print(
        f"{title}: fastest {min(totals[0]):.2f} → {min(totals[1]):.2f} s ({min(totals[0]) / min(totals[1]):.2f}), "
        f"median {statistics.median(totals[0]):.2f} → {statistics.median(totals[1]):.2f} s "
        f"({statistics.median(totals[0]) / statistics.median(totals[1]):.2f}); {phases}; first step's loss off by "
        f"{off.loss:.1e}, gradient by {off.gradient:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
