"""The interface between the engine and a diffusers model family.

Latents are float32 ``[N, C, h, w]`` in the scaled space the transformer reads. Time runs from 1 (noise) to 0 (data).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ramctl.config import LoraSection, ModelSection
from ramctl.engine.path import GaussianPath
from ramctl.engine.samplers import Sampler


@dataclass(frozen=True)
class TextEmbeddings:
    """What the transformer reads of N prompts: ``tokens`` [N, T, D] and ``pooled`` [N, P]."""

    tokens: Tensor
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def select(self, index: Tensor | slice) -> TextEmbeddings:
        """The rows of these prompts, in this order (repeats allowed)."""
        return TextEmbeddings(self.tokens[index], self.pooled[index])

    def joined(self, other: TextEmbeddings) -> TextEmbeddings:
        """These rows, then the other's."""
        return TextEmbeddings(torch.cat([self.tokens, other.tokens]), torch.cat([self.pooled, other.pooled]))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``x`` is computed: autocast's where it is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Backbone(ABC):
    """One loaded model family: text encoders, transformer, autoencoder, sampler.

    ``transformer`` is the base network; the engine passes the network to use (base, old, trained) to every call, so a
    backbone never asks which weights it runs.
    """

    path: GaussianPath
    transformer: nn.Module
    device: torch.device
    #: (C, h, w) of one latent.
    latent_shape: tuple[int, int, int]

    @classmethod
    @abstractmethod
    def load(cls, spec: ModelSection, device: torch.device, autocast: torch.dtype | None) -> Backbone:
        """Load the base model.

        Args:
            spec: the preset's model section.
            device: where the networks live.
            autocast: dtype of forward passes, None for the weights' own.

        Raises:
            MissingDependencyError: the weights are not there (the message says how to get them).
            ConfigError: the folder is no model of this family.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Embed N prompts, without gradient."""

    @property
    def velocity_dtype(self) -> torch.dtype:
        """The narrowest dtype that holds what :meth:`velocity` returns exactly: what the network computes in."""
        return torch.float32

    @abstractmethod
    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, text: TextEmbeddings) -> Tensor:
        """v(x_t, t | text) without guidance, float32 [N, C, h, w]; t float [N] in [0, 1]. Keeps gradients."""

    @abstractmethod
    def sigmas(self, steps: int, sampler: Sampler = "euler") -> Tensor:
        """The solver's noise levels in this model's grid, float32 [steps + 1] on the CPU, from 1 down to exactly 0."""

    @abstractmethod
    def sample(
        self,
        network: nn.Module,
        text: TextEmbeddings,
        x1: Tensor,
        *,
        steps: int,
        guidance_scale: float,
        negative: TextEmbeddings | None = None,
        sampler: Sampler = "euler",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Integrate the probability-flow ODE from noise x1 to endpoints x_0 [N, C, h, w], without gradient.

        Args:
            network: the transformer to use.
            text: N embeddings; x1: float32 [N, C, h, w].
            steps: steps of the solver, each one guided velocity.
            guidance_scale: classifier-free guidance; 1 skips the second pass.
            negative: one embedding for the unconditional pass; the empty prompt by default.
            sampler: the solver (:mod:`ramctl.engine.samplers`).
            guidance_interval: noise levels σ (0 data, 1 noise) at which guidance acts; elsewhere the plain velocity is
                taken, which costs one pass instead of two (arXiv 2404.07724).
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] RGB pictures on the CPU, by the one rounding all commands share."""

    @abstractmethod
    def enable_gradient_checkpointing(self, network: nn.Module) -> None:
        """Make ``network`` recompute activations in the backward pass: less memory, more time, the same gradient."""

    @abstractmethod
    def compile(self, network: nn.Module) -> None:
        """Let torch.compile fuse the network's repeated blocks, in place; the first passes of each size take longer."""

    @abstractmethod
    def float8(self, network: nn.Module) -> AbstractContextManager[None]:
        """Inside, the frozen ``network`` multiplies in 8 bits: faster, and good enough to draw pictures with."""

    @abstractmethod
    def add_lora(self, network: nn.Module, lora: LoraSection) -> None:
        """Give ``network`` one trainable LoRA (float32), B = 0.

        Raises:
            ConfigError: a target module name matches no linear layer.
        """

    @abstractmethod
    def save_set(self, folder: Path, file_name: str, tensors: Mapping[str, Tensor], lora: LoraSection) -> None:
        """Write a set of trained weights, by parameter name of the network, in the family's diffusers format."""

    @abstractmethod
    def read_set(self, path: Path, lora: LoraSection) -> dict[str, Tensor]:
        """Read what :meth:`save_set` wrote, by parameter name of the network."""
