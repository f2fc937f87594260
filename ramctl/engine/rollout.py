"""Prompts to pictures: embed each prompt once, sample with the given weights, decode. Train, sample and evaluate all
draw their pictures here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ramctl.backbones.base import Backbone, TextEmbeddings
from ramctl.engine.micro_batch import MicroBatch, auto_micro_batch, drawing_batch
from ramctl.engine.randomness import keyed_normal
from ramctl.engine.samplers import Sampler

#: called with the pictures just finished, uint8 [n, H, W, 3], batch by batch in order.
Drawn = Callable[[NDArray[np.uint8]], None]


@dataclass(frozen=True)
class Endpoints:
    """N endpoints of this process.

    latents: float32 [N, C, h, w] on the device. images: uint8 [N, H, W, 3].
    text: embeddings of the different prompts; text_row: int64 [N], the row of each endpoint's prompt.
    """

    latents: Tensor
    images: NDArray[np.uint8]
    text: TextEmbeddings
    text_row: Tensor

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def generate(
    backbone: Backbone,
    network: nn.Module,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
    sampler: Sampler = "euler",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    micro_batch: int | MicroBatch = 0,
    drawn: Drawn | None = None,
) -> Endpoints:
    """Draw one picture per prompt; picture i depends on ``prompts[i]``, ``seeds[i]`` and the weights only.

    Args:
        network: the transformer to sample with.
        prompts: N texts, repeats allowed (each different text is embedded once).
        seeds: N seeds of the starting noise.
        micro_batch: pictures at once; 0 chooses.
        drawn: is given each batch of pictures as soon as it is there.

    Raises:
        OutOfMemoryError: the GPU has no room for half of ``micro_batch``.
    """
    unique = list(dict.fromkeys(prompts))
    rows = torch.tensor([unique.index(prompt) for prompt in prompts], dtype=torch.long, device=backbone.device)
    text = backbone.encode(unique)
    negative = backbone.encode([negative_prompt]) if guidance_scale != 1.0 else None
    if not isinstance(micro_batch, MicroBatch):
        size = micro_batch or auto_micro_batch(backbone.latent_shape, backbone.device, training=False)
        micro_batch = drawing_batch(size)
    latents: list[Tensor] = []
    images: list[NDArray[np.uint8]] = []
    start = 0

    def draw(size: int) -> tuple[Tensor, NDArray[np.uint8]]:
        part = slice(start, start + size)
        x0 = backbone.sample(
            network,
            text.select(rows[part]),
            keyed_normal(seeds[part], backbone.latent_shape, backbone.device),
            steps=steps,
            guidance_scale=guidance_scale,
            negative=negative,
            sampler=sampler,
            guidance_interval=guidance_interval,
        )
        return x0, backbone.decode(x0).numpy()

    while start < len(prompts):
        x0, pictures = micro_batch.run(draw, len(prompts) - start)
        latents.append(x0)
        images.append(pictures)
        start += len(x0)
        if drawn is not None:
            drawn(pictures)
    return Endpoints(torch.cat(latents), np.concatenate(images), text, rows)
