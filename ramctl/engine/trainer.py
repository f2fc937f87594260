"""One step of RAM: rollout → score → advantages → regress → update → lag.

Everything here runs on each process' share of the step's pictures; rewards are gathered (advantages need all of them)
and gradients are summed once per update. No call order or rank enters any random draw.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ramctl.backbones.base import Backbone
from ramctl.config import Config, OptimizerSection
from ramctl.engine.advantage import group_advantages
from ramctl.engine.distributed import World
from ramctl.engine.metrics import reward_metrics
from ramctl.engine.micro_batch import MicroBatch, auto_micro_batch
from ramctl.engine.objective import draw_bridge, path_cost, path_cost_correction, ram_target, regression_loss
from ramctl.engine.path import grid_times, power_law_times
from ramctl.engine.policy import FrozenSet, Policy, evaluation_decay, old_decay
from ramctl.engine.randomness import keyed_normal, keyed_seed, keyed_uniform, prompts_of_step
from ramctl.engine.reward import GatheredScores, RewardFunction, Scoring, gather_scores
from ramctl.engine.rollout import Endpoints, generate
from ramctl.engine.transfer import upload, upload_indices
from ramctl.errors import ConfigError, DivergedError, ScorerError
from ramctl.prompts import Prompt

#: phase name, items done, items of the phase (this process' share).
PhaseProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StepResult:
    """What one step leaves behind: ``metrics`` (the same on every process) and this process' pictures."""

    metrics: dict[str, float]
    images: NDArray[np.uint8]
    prompts: list[Prompt]


@dataclass(frozen=True)
class _Items:
    """Regression items regenerated from their keys: x_t and Y [n, C, h, w], t [n]; the last two with path cost only."""

    x_t: Tensor
    y: Tensor
    t: Tensor
    x_s: Tensor | None = None
    y_s: Tensor | None = None
    s: Tensor | None = None


@dataclass(frozen=True)
class _Sweep:
    """No-gradient velocities of all items of this process, in item order, and the path costs where asked for.

    They are kept in the dtype that the network computed them in: a bfloat16 network's values are exact in bfloat16.
    """

    v_ref: Tensor
    v_old: Tensor
    cost_s: Tensor | None
    cost_t: Tensor | None


#: The largest float32 below 1.
_LAST_BEFORE_NOISE = 1 - 2.0**-24

#: Times on which flow-matching models of this family are pretrained, before their shift.
_TRAINING_TIMES = 1000

_PHASES = {
    "sample": ("drawing pictures,", "rollout.micro_batch"),
    "sweep": ("computing the reference's velocities,", "train.sweep_micro_batch"),
    "train": ("training on items,", "train.micro_batch"),
}


def phase_batch(config: Config, backbone: Backbone, phase: str) -> MicroBatch:
    """The passes of ``sample``, ``sweep`` or ``train``, as many at once as the config says or else suit the device."""
    doing, key = _PHASES[phase]
    section, name = key.split(".")
    given = int(getattr(getattr(config, section), name))
    size = given or auto_micro_batch(backbone.latent_shape, backbone.device, training=phase == "train")
    remedy = f"Lower {key}, set train.gradient_checkpointing = true, or set model.text_encoders = parked."
    return MicroBatch(size, doing, remedy)


def _time_grid(config: Config, backbone: Backbone) -> Tensor | None:
    """The noise times that ``ram.time_grid`` allows, None for all of [0, 1]."""
    ram, rollout = config.ram, config.rollout
    if ram.time_grid == "continuous":
        return None
    if ram.time_grid == "sampler":
        grid = backbone.sigmas(rollout.sampling_steps, rollout.sampler)
    else:
        grid = backbone.sigmas(_TRAINING_TIMES, "dpm2m")  # even times, shifted once
    if not ((grid >= ram.min_time) & (grid <= ram.max_time)).any():
        raise ConfigError(
            f"ram.time_grid = {ram.time_grid}: none of its times lies between ram.min_time ({ram.min_time}) and "
            f"ram.max_time ({ram.max_time}). Widen them, or set ram.time_grid = continuous."
        )
    return grid


class Trainer:
    """The state of a run and its step.

    ``step_index`` counts finished steps. ``config`` gives the constants; the trainer knows no scorer and no file.
    """

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        policy: Policy,
        prompts: Sequence[Prompt],
        reward: RewardFunction,
        world: World | None = None,
        progress: PhaseProgress | None = None,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.policy = policy
        self.prompts = list(prompts)
        self.reward = reward
        self.world = world or World()
        self.progress = progress or (lambda phase, done, total: None)
        self.step_index = 0
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            policy.parameters.values(),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )
        self.time_grid = _time_grid(config, backbone)
        self.batches = {phase: phase_batch(config, backbone, phase) for phase in _PHASES}

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self) -> StepResult:
        """Run one step and count it.

        Raises:
            ScorerError: more pictures than ``reward.max_failed_share`` could not be scored.
            DivergedError: the loss or the gradient is not finite; that update is not made.
        """
        clock = _Clock(self.backbone.device)
        config, world = self.config, self.world
        group = config.rollout.images_per_prompt
        share = world.share(config.images_per_step)
        chosen = prompts_of_step(self.step_index, config.rollout.prompts_per_step, len(self.prompts), config.train.seed)
        prompts = [self.prompts[chosen[i // group]] for i in share]

        if self.backbone.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.backbone.device)
        with Scoring(self.reward, prompts, self.backbone.device) as scoring:
            endpoints = self._rollout(prompts, share, scoring)
            clock.lap("sample")
            # Neither velocity needs the reward: they are computed while the scorer works on what it has not done yet.
            sweep = self._sweep(endpoints, share)
            clock.lap("sweep")
            scores, seconds_of_reward = scoring.result()
        clock.lap("score")

        gathered = gather_scores(world, scores, prompts)
        self._refuse_failures(gathered)
        advantages = group_advantages(
            torch.from_numpy(gathered.value),
            torch.arange(config.images_per_step) // group,
            failed=torch.from_numpy(gathered.failed),
            epsilon=config.ram.advantage_epsilon,
            scale=config.ram.advantage_scale,
            clip=config.ram.advantage_clip,
        )
        figures = self._regress(endpoints, share, sweep, advantages.value[share.start : share.stop])
        clock.lap("train")
        self._lag()
        self.step_index += 1
        metrics = {
            "step": float(self.step_index),
            **reward_metrics(gathered),
            "advantage/abs_mean": float(advantages.value.abs().mean()),
            "advantage/flat_groups": advantages.flat_groups,
            **figures,
            **clock.metrics(),
            "seconds/reward": seconds_of_reward,
            **self._memory(),
            "images_per_second": config.images_per_step / clock.total(),
        }
        return StepResult(metrics, endpoints.images, prompts)

    def _rollout(self, prompts: list[Prompt], share: range, scoring: Scoring) -> Endpoints:
        """This process' pictures; each batch goes to the scorer while the next one is drawn."""
        config = self.config

        def drawn(images: NDArray[np.uint8]) -> None:
            scoring.add(images)
            self.progress("sample", scoring.pictures, len(share))

        network = self.policy.network("old")
        with self.backbone.float8(network) if config.rollout.float8 else nullcontext():
            return generate(
                self.backbone,
                network,
                [prompt.text for prompt in prompts],
                [keyed_seed(config.train.seed, "endpoint", self.step_index, i) for i in share],
                steps=config.rollout.sampling_steps,
                guidance_scale=config.rollout.guidance_scale,
                sampler=config.rollout.sampler,
                guidance_interval=config.rollout.guidance_interval,
                micro_batch=self.batches["sample"],
                drawn=drawn,
            )

    def _memory(self) -> dict[str, float]:
        """The most this process' tensors took of its GPU in the step, in GB."""
        if self.backbone.device.type != "cuda":
            return {}
        return {"memory/peak_gb": torch.cuda.max_memory_allocated(self.backbone.device) / 1e9}

    def _refuse_failures(self, scores: GatheredScores) -> None:
        failed = np.flatnonzero(scores.failed)
        if len(failed) > self.config.reward.max_failed_share * len(scores.failed) or len(failed) == len(scores.failed):
            first = int(failed[0])
            raise ScorerError(
                f"Step {self.step_index + 1}: {len(failed)} of {len(scores.failed)} pictures could not be scored "
                f"(numbers {', '.join(map(str, failed[:8]))}{' …' if len(failed) > 8 else ''}); the first one, for "
                f"{scores.prompts[first].text!r}: {scores.errors[first]}"
            )

    # -- regression items -------------------------------------------------------------------------------------------

    def _noise(self, latents: Tensor, images: Sequence[int], noisings: Sequence[int]) -> _Items:
        """The items (global picture, noising) for these rows of latents, from their keys."""
        config, device = self.config, latents.device
        ram, seed, k = config.ram, config.train.seed, self.step_index
        ids = [i * ram.noisings_per_image + n for i, n in zip(images, noisings, strict=True)]
        uniform = keyed_uniform([keyed_seed(seed, "time", k, i) for i in ids])
        if ram.stratify_times:
            uniform = (uniform + torch.tensor(noisings, dtype=torch.float64)) / ram.noisings_per_image
        t64 = self._times(uniform)
        t = upload(t64.float(), device)
        epsilon = keyed_normal([keyed_seed(seed, "noising", k, i) for i in ids], latents.shape[1:], device)
        path = self.backbone.path
        if not ram.path_cost:
            return _Items(path.noising(latents, epsilon, t), path.velocity_target(latents, epsilon, t), t)
        between = keyed_uniform([keyed_seed(seed, "time_between", k, i) for i in ids])
        low = t64.clamp(max=ram.path_cost_min_time)  # an item below the smallest time has an empty span
        # Below 1 after rounding to float32, too: nothing of the picture is left at pure noise, and t may lie there.
        s = upload((low + between * (t64 - low)).float().clamp(max=_LAST_BEFORE_NOISE), device)
        epsilon_s = keyed_normal([keyed_seed(seed, "noising_between", k, i) for i in ids], latents.shape[1:], device)
        bridge = draw_bridge(path=path, x0=latents, epsilon_s=epsilon_s, epsilon_t=epsilon, s=s, t=t)
        return _Items(bridge.x_t, bridge.y_0, t, bridge.x_s, bridge.y_s, s)

    def _times(self, uniform: Tensor) -> Tensor:
        """Noise times float64 [n] from uniform numbers [n]."""
        ram = self.config.ram
        bounds = ram.min_time, ram.max_time
        if self.time_grid is None:
            return power_law_times(uniform, ram.time_power, *bounds)
        return grid_times(uniform, self.time_grid, ram.time_power, *bounds)

    def _batches(
        self, share: range, size: int, noisings: Sequence[int]
    ) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Micro-batches over the local pictures times ``noisings``: (local rows, global pictures, noisings)."""
        pairs = [(row, n) for row in range(len(share)) for n in noisings]
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            rows = [row for row, _ in part]
            yield rows, [share[row] for row in rows], [n for _, n in part]

    @torch.no_grad()
    def _sweep(self, endpoints: Endpoints, share: range) -> _Sweep:
        """v_ref and v_old of every item: the old network first (it is the one loaded), then the reference."""
        items = len(share) * self.config.ram.noisings_per_image
        shape = (items, *endpoints.latents.shape[1:])
        wanted = ("old", "reference", "old_s") if self.config.ram.path_cost else ("old", "reference")
        kept = {name: endpoints.latents.new_empty(shape, dtype=self.backbone.velocity_dtype) for name in wanted}
        if self.config.ram.path_cost:
            for name in ("cost_s", "cost_t"):
                kept[name] = endpoints.latents.new_empty(items, dtype=torch.float64)
        order: tuple[FrozenSet, ...] = ("old", "reference")
        for passes_before, which in enumerate(order):
            network = self.policy.network(which)
            self.batches["sweep"].run(
                lambda size, network=network, which=which, before=passes_before * items: self._sweep_pass(  # type: ignore[misc]
                    endpoints, share, size, network, which, kept, before
                ),
                items,
            )
        return _Sweep(kept["reference"], kept["old"], kept.get("cost_s"), kept.get("cost_t"))

    def _sweep_pass(
        self,
        endpoints: Endpoints,
        share: range,
        size: int,
        network: nn.Module,
        which: str,
        kept: dict[str, Tensor],
        before: int,
    ) -> None:
        """One network's velocities of every item, into ``kept``; with the reference's come the path costs."""
        count, path = self.config.ram.noisings_per_image, self.backbone.path
        done = 0
        for rows, images, noisings in self._batches(share, size, range(count)):
            place = slice(done, done + len(rows))
            local = upload_indices(rows, endpoints.latents.device)
            items = self._noise(endpoints.latents[local], images, noisings)
            text = endpoints.text.select(endpoints.text_row[local])
            velocity = self.backbone.velocity(network, items.x_t, items.t, text)
            kept[which][place] = velocity
            if items.x_s is not None and items.s is not None:
                velocity_s = self.backbone.velocity(network, items.x_s, items.s, text)
                if which == "old":
                    kept["old_s"][place] = velocity_s
                else:
                    kept["cost_s"][place] = path_cost(v=kept["old_s"][place], v_ref=velocity_s, path=path, t=items.s)
                    kept["cost_t"][place] = path_cost(v=kept["old"][place], v_ref=velocity, path=path, t=items.t)
            done += len(rows)
            self.progress("sweep", before + done, 2 * len(share) * count)

    def _target(self, items: _Items, sweep: _Sweep, chosen: Tensor, advantage: Tensor) -> Tensor:
        v_old = sweep.v_old[chosen]
        scaled = upload(self.config.ram.reward_multiplier * advantage, v_old.device)
        target = ram_target(v_ref=sweep.v_ref[chosen], v_old=v_old, y=items.y, scaled_advantage=scaled)
        if items.y_s is None or sweep.cost_s is None or sweep.cost_t is None:
            return target
        low = items.t.clamp(max=self.config.ram.path_cost_min_time)
        return target + path_cost_correction(
            cost_s=sweep.cost_s[chosen],
            cost_t=sweep.cost_t[chosen],
            span=items.t - low,
            y_s=items.y_s,
            v_t=v_old,
        )

    # -- update -----------------------------------------------------------------------------------------------------

    def _regress(self, endpoints: Endpoints, share: range, sweep: _Sweep, advantages: Tensor) -> dict[str, float]:
        """Accumulate the gradient of all items and update; ``updates_per_step`` times, each on its own noisings."""
        count, updates = self.config.ram.noisings_per_image, self.config.ram.updates_per_step
        sums = torch.zeros(3, dtype=torch.float64)  # loss, target², drift, summed over items
        norms = []
        for update in range(updates):
            noisings = range(update, count, updates)  # of every stratum where times are stratified
            part, bad = self.batches["train"].run(
                lambda size, noisings=noisings: self._accumulate(  # type: ignore[misc]
                    endpoints, share, sweep, advantages, noisings, size
                ),
                len(share) * len(noisings),
            )
            sums += part
            self._refuse_nonfinite(bad)
            norms.append(self._update())
        self.world.sum_([sums])
        loss, target_square, drift_mean = (sums / self.config.items_per_step).tolist()
        return {
            "loss": loss,
            "target_norm": math.sqrt(target_square),
            "drift": drift_mean,
            "grad_norm": sum(norms) / len(norms),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def _accumulate(
        self,
        endpoints: Endpoints,
        share: range,
        sweep: _Sweep,
        advantages: Tensor,
        chosen_noisings: range,
        size: int,
    ) -> tuple[Tensor, set[int]]:
        """The gradient of one update, from zero: sums of (loss, target², drift), and pictures with non-finite loss."""
        count, device = self.config.ram.noisings_per_image, endpoints.latents.device
        total = self.config.images_per_step * len(chosen_noisings)
        # Figures stay on the device until the last pass has been queued: reading one makes a GPU wait for the host.
        figures: list[Tensor] = []
        finite: list[Tensor] = []
        trained: list[int] = []
        earlier = (len(range(update, count, chosen_noisings.step)) for update in range(chosen_noisings.start))
        done = len(share) * sum(earlier)
        self.optimizer.zero_grad(set_to_none=True)
        for rows, images, noisings in self._batches(share, size, chosen_noisings):
            local = upload_indices(rows, device)
            items = self._noise(endpoints.latents[local], images, noisings)
            text = endpoints.text.select(endpoints.text_row[local])
            chosen = upload_indices([row * count + n for row, n in zip(rows, noisings, strict=True)], device)
            target = self._target(items, sweep, chosen, advantages[rows])
            prediction = self.backbone.velocity(self.policy.live, items.x_t, items.t, text)
            losses = regression_loss(prediction, target)
            (losses.sum() / total).backward()  # type: ignore[no-untyped-call]
            losses = losses.detach()
            drift = regression_loss(prediction.detach(), sweep.v_ref[chosen])
            norm = target.square().flatten(1).mean(1)
            figures.append(torch.stack([losses.sum(), norm.sum(), drift.sum()]))
            finite.append(torch.isfinite(losses))
            trained += images
            done += len(rows)
            self.progress("train", done, len(share) * count)
        if not trained:  # a process with an empty share
            return torch.zeros(3, dtype=torch.float64), set()
        is_finite = torch.cat(finite).tolist()
        bad = {image for image, ok in zip(trained, is_finite, strict=True) if not ok}
        return torch.stack(figures).cpu().double().sum(0), bad

    def _refuse_nonfinite(self, mine: set[int]) -> None:
        # Gathered, so that every process stops with the same words; else the others would wait for this one's gradient.
        bad = sorted(image for part in self.world.gather(mine) for image in part)
        if bad:
            shown = f"{', '.join(map(str, bad[:8]))}{' …' if len(bad) > 8 else ''}"
            raise DivergedError(
                f"Step {self.step_index + 1}: the loss of {len(bad)} of {self.config.images_per_step} pictures is not "
                f"finite (numbers {shown}). Lower optimizer.lr or ram.reward_multiplier, or set ram.advantage_clip."
            )

    def _update(self) -> float:
        """Sum gradients over processes, clip, step; the gradient's norm before clipping."""
        parameters = list(self.policy.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # a process with an empty share takes part in the sum all the same
                parameter.grad = torch.zeros_like(parameter)
        self.world.sum_([p.grad for p in parameters if p.grad is not None])
        limit = self.config.optimizer.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))
        if not math.isfinite(norm):
            raise DivergedError(
                f"Step {self.step_index + 1}: the gradient is not finite. Lower optimizer.lr or ram.reward_multiplier."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, self.step_index)
        self.optimizer.step()
        return norm

    def _lag(self) -> None:
        """The two moving averages: the old weights that sample next, the weights that are evaluated."""
        ram, evaluation, k = self.config.ram, self.config.evaluation, self.step_index
        self.policy.follow("old", old_decay(k + ram.old_ema_offset, ram.old_ema_decay, ram.old_ema_warmup))
        self.policy.follow("evaluation", evaluation_decay(k, evaluation.ema_decay, warmup=evaluation.ema_warmup))


def learning_rate(optimizer: OptimizerSection, step: int) -> float:
    """The learning rate after ``step`` finished steps: linear warm-up, then constant or halving."""
    warm = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    half_life = optimizer.lr_half_life
    return optimizer.lr * warm * (1.0 if half_life is None else 0.5 ** (step / half_life))


class _Clock:
    """Seconds per phase.

    A GPU is waited for at the end of each, so a phase pays for its own work (and for a scorer's beside it on that GPU).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._start

    def metrics(self) -> dict[str, float]:
        return {
            **{f"seconds/{name}": value for name, value in self._laps.items()},
            "seconds/total": self.total(),
        }
