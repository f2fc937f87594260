"""One RAM step written the way research scripts are: what :mod:`benchmarks.ram_step` measures ``ramctl`` against.

One eager network of diffusers with two peft adapters that are switched for every forward pass, guidance by a doubled
batch, one micro-batch size for everything, prompts embedded batch by batch with their duplicates, the autoencoder in
float32, and one thing after the other: sample, decode, score, then for each micro-batch the reference's, the old and
the trained network's pass. It draws its random numbers from ramctl's keys, so it computes the same step: the same
pictures, targets, loss and gradient up to rounding (``tests/benchmarks/test_plain_loop.py`` holds the tolerance).
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import JointAttnProcessor2_0
from numpy.typing import NDArray
from torch import Tensor

from ramctl.backbones.lean import GpuGelu
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.config import Config
from ramctl.engine.policy import old_decay
from ramctl.engine.randomness import keyed_normal, keyed_seed, keyed_uniform, prompts_of_step
from ramctl.engine.reward import RewardFunction
from ramctl.engine.trainer import learning_rate
from ramctl.prompts import Prompt

#: The trained adapter has the name that ramctl gives its own, so that parameters have the same names in both.
POLICY, OLD = "default", "old"


class PhaseClock:
    """Seconds by phase; the device is waited for at both ends of each, so that a phase pays for its own work only."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def wait(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase."""
        self.wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class PlainStep:
    """What a step computed, for comparison.

    loss: mean over the step's items. gradients: what the optimizer got, by parameter name. latents: float32
    [N, C, h, w]. rewards: float32 [N]. seconds: by phase, and ``total``.
    """

    loss: float
    gradients: dict[str, Tensor]
    latents: Tensor
    rewards: NDArray[np.float32]
    seconds: dict[str, float]


class PlainLoop:
    """The loop and its state.

    Args:
        config: the preset; LoRA, the Euler sampler, one update per step, and neither path cost nor stratified times.
        backbone: its encoders, autoencoder and scheduler are used; its transformer, still without LoRA, is copied.
        prompts: the training prompts.
        reward: scores the pictures of a step.
        micro_batch: the one size, bounded by what the gradient pass has room for.

    Raises:
        ValueError: the preset asks for something that this loop does not do.
    """

    def __init__(
        self,
        config: Config,
        backbone: StableDiffusion3,
        prompts: Sequence[Prompt],
        reward: RewardFunction,
        *,
        micro_batch: int,
    ) -> None:
        _refuse_unknown(config)
        self.config, self.prompts, self.reward = config, list(prompts), reward
        self.micro_batch = micro_batch
        self.device, self.latent_shape = backbone.device, backbone.latent_shape
        self.autocast_dtype = backbone._autocast_dtype
        self.pipeline = backbone._pipeline
        self.scheduler = copy.deepcopy(self.pipeline.scheduler)
        self.vae = copy.deepcopy(self.pipeline.vae).float().to(memory_format=torch.contiguous_format)
        self.transformer: Any = copy.deepcopy(backbone.transformer)
        self.transformer.set_attn_processor(JointAttnProcessor2_0())
        for module in self.transformer.modules():
            if type(module) is GpuGelu:
                module.__class__ = GELU
        self._add_adapters()
        self.parameters = self._adapter(POLICY)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.epsilon,
            weight_decay=config.optimizer.weight_decay,
        )
        self.step_index = 0

    def _add_adapters(self) -> None:
        from peft import LoraConfig

        lora = self.config.lora
        for name in (OLD, POLICY):
            self.transformer.add_adapter(
                LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules)),
                adapter_name=name,
            )
        for name, parameter in self.transformer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def _adapter(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        """An adapter's parameters by the names of the trained one."""
        return {
            name.replace(f".{adapter}.", f".{POLICY}."): parameter
            for name, parameter in self.transformer.named_parameters()
            if f".{adapter}." in name
        }

    @torch.no_grad()
    def load(self, policy: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
        """Take over ramctl's two sets, by parameter name.

        Raises:
            KeyError: a set does not have exactly this loop's parameters.
        """
        for adapter, tensors in ((POLICY, policy), (OLD, old)):
            own = self._adapter(adapter)
            if set(own) != set(tensors):
                raise KeyError(f"{adapter}: other parameters, e.g. {min(set(own) ^ set(tensors))}")
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def resident_bytes(self) -> int:
        """What this loop alone keeps in memory between steps: its network, autoencoder and optimizer state."""
        tensors = [*self.transformer.parameters(), *self.vae.parameters()]
        tensors += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # -- the step ---------------------------------------------------------------------------------------------------

    def step(self) -> PlainStep:
        """Run one step and count it."""
        clock = PhaseClock(self.device)
        config = self.config
        start = time.perf_counter()
        chosen = prompts_of_step(self.step_index, config.rollout.prompts_per_step, len(self.prompts), config.train.seed)
        prompts = [self.prompts[i] for i in chosen for _ in range(config.rollout.images_per_prompt)]
        batches = [
            range(first, min(first + self.micro_batch, len(prompts)))
            for first in range(0, len(prompts), self.micro_batch)
        ]
        texts, latents, images = [], [], []
        with clock.phase("text"):
            empty = self.embed([""])
        for batch in batches:
            with clock.phase("text"):
                texts.append(self.embed([prompts[i].text for i in batch]))
            with clock.phase("sample"):
                latents.append(self.sample(batch, texts[-1], empty))
            with clock.phase("decode"):
                images.append(self.decode(latents[-1]))
        with clock.phase("score"):
            rewards = self.reward.score(np.concatenate(images), prompts).value
        advantages = self._advantages(rewards)
        self.optimizer.zero_grad()
        loss = 0.0
        for batch, text, x0 in zip(batches, texts, latents, strict=True):
            for noising in range(config.ram.noisings_per_image):
                loss += self.train_on(batch, noising, x0, text, advantages[batch.start : batch.stop], clock)
        with clock.phase("update"):
            self._update()
        gradients = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        seconds = {**clock.seconds, "total": time.perf_counter() - start}
        return PlainStep(loss / config.items_per_step, gradients, torch.cat(latents), rewards, seconds)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token [N, T, D] and pooled [N, P] embeddings of a batch, each prompt as often as it occurs."""
        spec = self.config.model
        with self._autocast():
            tokens, _, pooled, _ = self.pipeline.encode_prompt(
                prompt=texts,
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=spec.max_sequence_length if spec.use_t5 else 0,
            )
        return tokens, pooled

    def _forward(self, x: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        """The network's velocity in float32, with the adapter that is on."""
        with self._autocast():
            velocity: Tensor = self.transformer(
                hidden_states=x.to(tokens.dtype),
                timestep=1000 * sigma,
                encoder_hidden_states=tokens,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        return velocity.float()

    @torch.no_grad()
    def sample(self, batch: range, text: tuple[Tensor, Tensor], empty: tuple[Tensor, Tensor]) -> Tensor:
        """Endpoints float32 [N, C, h, w] of the pictures in ``batch``, by the scheduler of the pipeline."""
        tokens, pooled = text
        rollout, seed = self.config.rollout, self.config.train.seed
        self.transformer.set_adapter(OLD)
        x = keyed_normal(
            [keyed_seed(seed, "endpoint", self.step_index, i) for i in batch], self.latent_shape, self.device
        )
        guided = rollout.guidance_scale != 1.0
        if guided:
            tokens = torch.cat([empty[0].expand_as(tokens), tokens])
            pooled = torch.cat([empty[1].expand_as(pooled), pooled])
        self.scheduler.set_timesteps(rollout.sampling_steps, device=self.device)
        for timestep in self.scheduler.timesteps:
            both = torch.cat([x, x]) if guided else x
            velocity = self._forward(both, (timestep / 1000).expand(len(both)), tokens, pooled)
            if guided:
                unconditional, conditional = velocity.chunk(2)
                velocity = unconditional + rollout.guidance_scale * (conditional - unconditional)
            x = self.scheduler.step(velocity, timestep, x, return_dict=False)[0]
        return x

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """uint8 [N, H, W, 3], the autoencoder in float32."""
        scaled = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        pictures = (self.vae.decode(scaled, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        array: NDArray[np.uint8] = (pictures * 255).round().permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
        return array

    def _advantages(self, rewards: NDArray[np.float32]) -> Tensor:
        """float64 [N]: rewards less their group's mean, over the std of all; 0 where there is no reward."""
        ram = self.config.ram
        grouped = rewards.astype(np.float64).reshape(-1, self.config.rollout.images_per_prompt)
        centred = (grouped - np.nanmean(grouped, axis=1, keepdims=True)).reshape(-1)
        if ram.advantage_scale == "pooled_std":
            centred /= np.nanstd(grouped) + ram.advantage_epsilon
        limit = np.inf if ram.advantage_clip is None else ram.advantage_clip
        return torch.from_numpy(np.nan_to_num(centred).clip(-limit, limit))

    def train_on(
        self,
        batch: range,
        noising: int,
        x0: Tensor,
        text: tuple[Tensor, Tensor],
        advantages: Tensor,
        clock: PhaseClock,
    ) -> float:
        """Three forward passes and one backward pass for one noising of each picture; the sum of the items' losses."""
        ram, seed = self.config.ram, self.config.train.seed
        items = [i * ram.noisings_per_image + noising for i in batch]
        uniform = keyed_uniform([keyed_seed(seed, "time", self.step_index, i) for i in items])
        power = ram.time_power + 1
        low, high = ram.min_time**power, ram.max_time**power
        t = ((low + uniform * (high - low)) ** (1 / power)).float().to(self.device)
        noise = keyed_normal(
            [keyed_seed(seed, "noising", self.step_index, i) for i in items], self.latent_shape, self.device
        )
        column = t[:, None, None, None]
        x_t = (1 - column) * x0 + column * noise
        with torch.no_grad(), clock.phase("sweep ref"):
            self.transformer.disable_adapters()
            v_ref = self._forward(x_t, t, *text)
            self.transformer.enable_adapters()
        with torch.no_grad(), clock.phase("sweep old"):
            self.transformer.set_adapter(OLD)
            v_old = self._forward(x_t, t, *text)
        with clock.phase("train"):
            self.transformer.set_adapter(POLICY)
            weight = (ram.reward_multiplier * advantages).float().to(self.device)[:, None, None, None]
            target = v_ref + weight * ((noise - x0) - v_old)
            losses = (self._forward(x_t, t, *text) - target).square().flatten(1).mean(1)
            (losses.sum() / self.config.items_per_step).backward()  # type: ignore[no-untyped-call]
            return float(losses.detach().sum())

    def _update(self) -> None:
        limit = self.config.optimizer.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, self.step_index)
        self.optimizer.step()
        decay = old_decay(self.step_index, self.config.ram.old_ema_decay, self.config.ram.old_ema_warmup)
        with torch.no_grad():
            for name, lagged in self._adapter(OLD).items():
                lagged.lerp_(self.parameters[name], 1 - decay)
        self.step_index += 1


def _refuse_unknown(config: Config) -> None:
    beyond = {
        "lora.rank = 0": not config.lora.rank,
        "rollout.sampler": config.rollout.sampler != "euler",
        "rollout.guidance_min_noise, guidance_max_noise": config.rollout.guidance_interval != (0.0, 1.0),
        "ram.updates_per_step": config.ram.updates_per_step != 1,
        "ram.path_cost": config.ram.path_cost,
        "ram.stratify_times": config.ram.stratify_times,
    }
    asked = [key for key, is_set in beyond.items() if is_set]
    if asked:
        raise ValueError(f"The plain loop does not do {', '.join(asked)}.")
