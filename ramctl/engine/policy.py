"""One backbone's transformer and its weight sets: reference, old (lagged), policy (trained), evaluation (EMA).

Two networks are kept. ``live`` holds the trained weights and is the only one that ever gets gradients. ``frozen`` is a
plain copy of the base network into which one of the other sets is loaded at a time, LoRA merged, so that the
no-gradient forwards (nine tenths of all) carry no adapter branch and nothing is switched inside a network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ramctl.backbones.base import Backbone
from ramctl.config import LoraSection

FrozenSet = Literal["reference", "old", "evaluation"]
TensorSet = dict[str, Tensor]

_LORA_A, _LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"


def old_decay(step: int, maximum: float, warmup: float) -> float:
    """min(warmup·k, maximum): 0, .01, .5, .9, .9 at k = 0, 1, 50, 90, 200 with the paper's .01 and .9.

    k counts finished updates from 0, so the first lag is a full copy.
    """
    return min(warmup * step, maximum)


def evaluation_decay(step: int, decay: float, *, warmup: bool) -> float:
    """The evaluation EMA's decay: constant, or min(decay, (1 + k)/(10 + k))."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class Policy:
    """The weight sets of one run.

    Trained tensors are float32 whatever the base weights' dtype. ``sets`` holds ``old`` and ``evaluation`` as plain
    dictionaries with the names of the live network's trained parameters.
    """

    def __init__(self, backbone: Backbone, lora: LoraSection, *, seed: int) -> None:
        self.lora = lora
        self.frozen: nn.Module = copy.deepcopy(backbone.transformer).requires_grad_(False).eval()
        self.live: nn.Module = backbone.transformer
        self.live.requires_grad_(False)
        if lora.rank:
            # The adapter's initialisation is random; keyed by the run's seed, whatever was drawn before.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                backbone.add_lora(self.live, lora)
        else:
            self.live.float().requires_grad_(True)
        self.live.eval()  # no dropout anywhere: targets and predictions must come from the same function
        self.parameters: TensorSet = {name: p for name, p in self.live.named_parameters() if p.requires_grad}
        self.sets: dict[str, TensorSet] = {"old": self._copy(), "evaluation": self._copy()}
        # The base values of exactly those weights of `frozen` that some set changes.
        frozen_parameters = dict(self.frozen.named_parameters())
        self._targets: TensorSet = {name: frozen_parameters[name] for name in self._changed_names()}
        self._base: TensorSet = {name: p.detach().clone() for name, p in self._targets.items()}
        self._loaded: str = "reference"

    def _copy(self) -> TensorSet:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def _changed_names(self) -> Iterator[str]:
        if not self.lora.rank:
            yield from self.parameters
            return
        for name in self.parameters:
            if name.endswith(_LORA_A):
                yield name.removesuffix(_LORA_A) + ".weight"

    @torch.no_grad()
    def network(self, which: FrozenSet) -> nn.Module:
        """The frozen network with that set's weights in it (merged); the same module object every time."""
        if self._loaded != which:
            for name, target in self._targets.items():
                target.copy_(self._merged(name, which))
            self._loaded = which
        return self.frozen

    def _merged(self, name: str, which: FrozenSet) -> Tensor:
        if which == "reference":
            return self._base[name]
        tensors = self.sets[which]
        if not self.lora.rank:
            return tensors[name]
        stem = name.removesuffix(".weight")
        delta = tensors[stem + _LORA_B] @ tensors[stem + _LORA_A]
        return self._base[name].float() + self.lora.alpha / self.lora.rank * delta

    @torch.no_grad()
    def follow(self, which: Literal["old", "evaluation"], decay: float) -> None:
        """set ← decay·set + (1 − decay)·policy."""
        lagged = self.sets[which]
        for name, parameter in self.parameters.items():
            if decay == 0:  # an exact copy, where lerp with weight 1 need not be one
                lagged[name].copy_(parameter)
            else:
                lagged[name].lerp_(parameter, 1 - decay)
        if self._loaded == which:
            self._loaded = ""

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore the sets ``policy``, ``old`` and ``evaluation`` (those given), by parameter name.

        Raises:
            KeyError: a tensor is missing, is not a trained parameter of this policy, or has another shape.
        """
        for which, values in tensors.items():
            destination = self.parameters if which == "policy" else self.sets[which]
            wrong = set(values) ^ set(destination)
            if wrong:
                raise KeyError(f"set {which!r}: {len(wrong)} tensors do not match, e.g. {min(wrong)}")
            for name, value in values.items():
                if value.shape != destination[name].shape:  # copy_ would broadcast a LoRA of rank 1 into any other
                    shapes = f"{tuple(value.shape)}, not {tuple(destination[name].shape)}"
                    raise KeyError(f"set {which!r}: {name} has the shape {shapes}")
            for name, value in values.items():
                destination[name].copy_(value)
        self._loaded = ""

    def tensors(self, which: Literal["policy", "old", "evaluation"]) -> TensorSet:
        """The trained tensors of a set (detached; not copied)."""
        if which == "policy":
            return {name: p.detach() for name, p in self.parameters.items()}
        return self.sets[which]
