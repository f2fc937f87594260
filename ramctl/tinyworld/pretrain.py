"""Pretrains the embedded model: drawn pictures → autoencoder → flow-matching transformer with its text encoders.

    python -m ramctl.tinyworld.pretrain models/tinyworld

runs on one GPU in a few minutes (the model card has the figures) and on a CPU in hours. Captions are wrong on purpose
for a share of the pictures, as web captions are, so that the model is mediocre in a way that a reward can mend.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ramctl.tinyworld.dataset import CaptionedPictures, make_dataset
from ramctl.tinyworld.model import build_pipeline, build_vae, parameter_counts, save_pipeline

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline


@dataclass(frozen=True)
class Settings:
    """Everything the pretrained weights depend on, besides the code; written beside the model."""

    pictures: int = 400_000
    wrong_captions: float = 0.45
    seed: int = 20260510
    width: int = 192
    layers: int = 6
    vae_steps: int = 2400
    vae_batch: int = 256
    vae_lr: float = 1.5e-3
    vae_kl: float = 1e-4
    steps: int = 40_000
    batch: int = 1024
    lr: float = 1e-3
    weight_decay: float = 0.01
    caption_drop: float = 0.1
    ema_decay: float = 0.9995
    #: share of steps that append the zero tokens which diffusers' own pipeline appends for an absent T5, so that the
    #: model draws the same with them (its default is 256) as without (what ramctl does, nine times cheaper).
    padded_share: float = 0.08


def _to_unit(pictures: Tensor) -> Tensor:
    """uint8 [N, 64, 64, 3] to float [N, 3, 64, 64] in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 2 % of the run, then a cosine to 2 % of the peak."""
    if progress < 0.02:
        return peak * max(progress, 1e-3) / 0.02
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98)))


class Updater:
    """One optimiser update as a function of nothing, so that a GPU can record it once and replay it.

    The networks are so small that launching their kernels one by one takes several times as long as running them. On
    CUDA each distinct ``loss`` is warmed up, recorded as a CUDA graph together with its backward pass and the update,
    and replayed; elsewhere it is simply called.
    """

    def __init__(
        self, parameters: list[nn.Parameter], peak: float, weight_decay: float, ema_decay: float | None
    ) -> None:
        self.device = parameters[0].device
        self.parameters = parameters
        self.peak = peak
        self.ema_decay = ema_decay
        self.average = [p.detach().clone() for p in parameters] if ema_decay is not None else []
        self.cuda = self.device.type == "cuda"
        self._lr = torch.tensor(0.0, device=self.device)
        self._blend = torch.tensor(0.0, device=self.device)
        self._optimizer = torch.optim.AdamW(
            parameters,
            lr=self._lr if self.cuda else peak,
            betas=(0.9, 0.99),
            weight_decay=weight_decay,
            fused=self.cuda,
            capturable=self.cuda,
        )
        #: loss function → its recording and the loss it writes; None where recording failed.
        self._recorded: dict[Callable[[], Tensor], tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}

    def _update(self, loss_of: Callable[[], Tensor]) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.average, self.parameters, strict=False):
                average.lerp_(parameter, self._blend)
        return loss.detach()

    def _record(self, loss_of: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                self._update(loss_of)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                loss = self._update(loss_of)
        except RuntimeError as error:
            print(f"no CUDA graph, several times slower: {str(error).splitlines()[0]}", flush=True)
            return None
        return graph, loss

    def step(self, loss_of: Callable[[], Tensor], step: int, progress: float) -> Tensor:
        """Take a step with the learning rate of that progress; the loss (on the device)."""
        rate = _learning_rate(progress, self.peak)
        if self.ema_decay is not None:
            self._blend.fill_(1 - min(self.ema_decay, (1 + step) / (10 + step)))
        if not self.cuda:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            return self._update(loss_of)
        self._lr.fill_(rate)
        if loss_of not in self._recorded:
            self._recorded[loss_of] = self._record(loss_of)
        recorded = self._recorded[loss_of]
        if recorded is None:
            return self._update(loss_of)
        graph, loss = recorded
        graph.replay()
        return loss


def _run(
    name: str,
    updater: Updater,
    steps: int,
    loss_at: Callable[[int], Callable[[], Tensor]],
    seconds: float = math.inf,
) -> None:
    """Take ``steps`` updates, printing now and then.

    On a machine too slow for them in ``seconds`` the schedule runs on the clock instead, so that it still ends low.
    """
    start = time.perf_counter()
    for step in range(steps):
        progress = max(step / steps, (time.perf_counter() - start) / seconds)
        if progress >= 1:
            print(f"{name}: out of time after {step} of {steps} steps", flush=True)
            return
        loss = updater.step(loss_at(step), step, progress)
        # Reading the loss also keeps the clock honest: replays are queued far faster than they run.
        if step % max(1, min(100, steps // 20)) == 0 or step == steps - 1:
            value = loss.item()
            if step % max(1, steps // 20) == 0 or step == steps - 1:
                print(
                    f"{name} {step + 1}/{steps} loss {value:.4f} {time.perf_counter() - start:.0f} s",
                    flush=True,
                )


def train_vae(pictures: Tensor, settings: Settings, device: torch.device) -> AutoencoderKL:
    """Train the autoencoder by L1 and a light KL; its scale and shift end up in its config.

    Args:
        pictures: uint8 [N, 64, 64, 3] on ``device``.
    """
    vae = build_vae().to(device, memory_format=torch.channels_last)
    updater = Updater(list(vae.parameters()), settings.vae_lr, weight_decay=0.0, ema_decay=None)

    def loss_of() -> Tensor:
        index = torch.randint(len(pictures), (settings.vae_batch,), device=device)
        batch = _to_unit(pictures[index]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            posterior = vae.encode(batch).latent_dist
            noise = torch.randn(posterior.mean.shape, device=device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - batch
        loss: Tensor = error.abs().mean() + error.square().mean() + settings.vae_kl * posterior.kl().mean() / 1024
        return loss

    _run("autoencoder", updater, settings.vae_steps, lambda step: loss_of)
    vae.eval()
    means = encode_pictures(vae, pictures[:8192])
    vae.register_to_config(shift_factor=float(means.mean()), scaling_factor=float(1 / means.std()))
    with torch.no_grad():
        probe = _to_unit(pictures[:2048])
        error = (vae.decode(vae.encode(probe).latent_dist.mean).sample - probe).abs().mean().item() / 2
    print(f"autoencoder: L1 {error:.4f} of the full range, scale {vae.config.scaling_factor:.4f}", flush=True)
    return vae


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Posterior means float32 [N, 16, 8, 8] of uint8 pictures, in batches."""
    return torch.cat([vae.encode(_to_unit(part)).latent_dist.mean.float() for part in torch.split(pictures, 2048)])


def _text(pipeline: StableDiffusion3Pipeline, tokens: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Text embeddings [B, 16 + padding, 256] and pooled [B, 256], computed as the pipeline's ``encode_prompt`` does."""
    first = pipeline.text_encoder(tokens, output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    embeddings = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
    return functional.pad(embeddings, (0, 0, 0, padding)), pooled


def train_transformer(
    pipeline: StableDiffusion3Pipeline,
    data: CaptionedPictures,
    latents: Tensor,
    settings: Settings,
    device: torch.device,
    *,
    compiled: bool = False,
    seconds: float = math.inf,
) -> None:
    """Flow matching on cached latents, transformer and text encoders together; the pipeline gets the EMA weights."""
    modules = nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]).to(device).train()
    parameters = [p for p in modules.parameters() if p.requires_grad]
    updater = Updater(parameters, settings.lr, settings.weight_decay, settings.ema_decay)
    tokens = pipeline.tokenizer(
        data.captions,
        padding="max_length",
        max_length=pipeline.tokenizer_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(device)
    empty = pipeline.tokenizer(
        "", padding="max_length", max_length=pipeline.tokenizer_max_length, return_tensors="pt"
    ).input_ids.to(device)
    transformer = torch.compile(pipeline.transformer, dynamic=False) if compiled else pipeline.transformer
    plan = np.random.default_rng(settings.seed).random(settings.steps) < settings.padded_share

    def loss_of(network: Callable[..., Any], batch: int, padding: int) -> Tensor:
        index = torch.randint(len(latents), (batch,), device=device)
        dropped = torch.rand(batch, 1, device=device) < settings.caption_drop
        clean = latents[index].float()
        noise = torch.randn(clean.shape, device=device)
        t = torch.sigmoid(torch.randn(batch, device=device))
        noisy = torch.lerp(clean, noise, t.view(-1, 1, 1, 1))
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            embeddings, pooled = _text(pipeline, torch.where(dropped, empty, tokens[index]), padding)
            velocity = network(
                hidden_states=noisy,
                encoder_hidden_states=embeddings,
                pooled_projections=pooled,
                timestep=1000 * t,
            ).sample
        return functional.mse_loss(velocity.float(), noise - clean)

    def plain() -> Tensor:
        return loss_of(transformer, settings.batch, 0)

    def padded() -> Tensor:
        # A padded step has nine times the tokens: an eighth of the batch keeps its cost the same.
        return loss_of(pipeline.transformer, max(1, settings.batch // 8), 256)

    _run("transformer", updater, settings.steps, lambda step: padded if plan[step] else plain, seconds)
    with torch.no_grad():
        for parameter, value in zip(parameters, updater.average, strict=True):
            parameter.copy_(value)
    modules.eval()


def pretrain(
    folder: Path, settings: Settings, *, processes: int, vae_from: Path | None, compiled: bool, minutes: float
) -> None:
    """Run the whole pretraining and save the pipeline, with its settings and timings, into ``folder``."""
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    data = make_dataset(settings.pictures, wrong=settings.wrong_captions, seed=settings.seed, processes=processes)
    print(f"{settings.pictures} pictures drawn in {time.perf_counter() - start:.0f} s", flush=True)
    pictures = torch.from_numpy(data.pictures).to(device)
    if vae_from is None:
        vae = train_vae(pictures, settings, device)
    else:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(vae_from, torch_dtype=torch.float32).to(device).eval()
    latents = ((encode_pictures(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor).half()
    del pictures
    pipeline = build_pipeline(width=settings.width, layers=settings.layers, vae=vae)
    print(parameter_counts(pipeline), flush=True)
    seconds = 60 * minutes - (time.perf_counter() - start)
    train_transformer(pipeline, data, latents, settings, device, compiled=compiled, seconds=seconds)
    save_pipeline(pipeline, folder)
    facts = {
        "settings": asdict(settings),
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": parameter_counts(pipeline),
    }
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"saved to {folder} after {facts['minutes']} minutes", flush=True)


def main() -> None:
    """Command line: every field of :class:`Settings` is an option."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded tinyworld model.")
    parser.add_argument("folder", type=Path, help="where the diffusers folder is written, e.g. models/tinyworld")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that draw pictures")
    parser.add_argument("--vae-from", type=Path, help="take a trained autoencoder from this folder")
    parser.add_argument("--compiled", action="store_true", help="torch.compile the transformer: faster on a GPU")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the transformer's training by then")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    run = {name: arguments.pop(name) for name in ("folder", "processes", "vae_from", "compiled", "minutes")}
    pretrain(settings=Settings(**arguments), **run)


if __name__ == "__main__":
    main()
