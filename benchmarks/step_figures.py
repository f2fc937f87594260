"""What seconds are set against: the model's FLOPs, the machine's matrix product; and the record of all figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.plain_loop import PhaseClock
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.config import Config
from ramctl.engine.policy import Policy

#: The parts of a step, in order.
PHASES = ("text", "sample", "decode", "score", "sweep old", "sweep ref", "train", "update")


class Record:
    """Figures as they come: printed at once, and the JSON file written anew with each; nothing where ``silent``."""

    def __init__(self, path: Path | None, *, silent: bool = False) -> None:
        self.path, self.silent = path, silent
        self.figures: dict[str, Any] = {}

    def add(self, key: str, value: Any, shown: str) -> None:
        """Keep a figure and print ``shown``."""
        self.figures[key] = value
        if self.silent:
            return
        print(shown, flush=True)
        if self.path is not None:
            partial = self.path.with_name(self.path.name + ".part")
            partial.write_text(json.dumps(self.figures, indent=1), encoding="utf-8")
            partial.replace(self.path)


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
    """Count one item's passes, uncompiled, with attention as matrix products (the counter knows those everywhere)."""
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
    # With gradients allowed, though nothing asks for one: the layers are then common ones, which the counter knows.
    forward = count(lambda: backbone.velocity(policy.frozen, x, t, text))
    decode = count(lambda: backbone.decode(x))
    both = count(lambda: backbone.velocity(policy.live, x, t, text).sum().backward())  # type: ignore[no-untyped-call]
    for parameter in policy.parameters.values():
        parameter.grad = None
    return Flops(forward, both, decode)


def matrix_peak(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large matrix product, the fastest of six: bfloat16 8192³ on a GPU; both types, 4096³, on a CPU.

    A GPU slows down within a second of full load, so there is also what it keeps up for three (``sustained``).
    """
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
        if on_gpu:
            count = round(3 / min(times))
            clock.seconds.clear()
            with clock.phase("matmul"):
                for _ in range(count):
                    torch.mm(a, b)
            rates["sustained"] = 2 * size**3 * count / clock.seconds["matmul"]
    return rates
