"""One phase of a step alone, in both loops."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.plain_loop import PhaseClock
from benchmarks.step_pair import Pair
from ramctl.backbones.base import TextEmbeddings
from ramctl.engine.randomness import keyed_normal
from ramctl.engine.rollout import Endpoints
from ramctl.engine.trainer import Trainer, _Sweep

ONLY = ("text", "sample", "decode", "sweep", "train")


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
