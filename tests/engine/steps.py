"""Small trainers of the embedded model, for the tests of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.engine.distributed import World
from ramctl.engine.policy import Policy
from ramctl.engine.reward import RewardFunction
from ramctl.engine.trainer import Trainer
from ramctl.prompts import Prompt, read_prompts
from ramctl.scorers.base import Images, ImageScore, Scores
from ramctl.settings import Settings, load_settings

Build = Callable[..., Trainer]


class FromPictures:
    """The mean brightness of a picture; optionally no number for the pictures with these places in the batch."""

    def __init__(self, failing: Sequence[int] = ()) -> None:
        self.failing = failing

    def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return Scores.collect(
            [
                "the file is broken" if i in self.failing else ImageScore(float(image.mean()) / 255)
                for i, image in enumerate(images)
            ]
        )


class Constant:
    """The same reward for every picture."""

    def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        return Scores.collect([ImageScore(0.3)] * len(images))


@pytest.fixture(name="pristine", scope="module")
def pristine_fixture(tiny_settings: Settings) -> tuple[StableDiffusion3, Policy]:
    """The embedded model with its untrained LoRA; to be copied."""
    torch.set_num_threads(1)
    config = tiny_settings.config
    backbone = StableDiffusion3.load(config.model, torch.device("cpu"), None)
    return backbone, Policy(backbone, config.lora, seed=config.train.seed)


@pytest.fixture(name="build")
def build_fixture(tiny_preset: Path, pristine: tuple[StableDiffusion3, Policy]) -> Build:
    """A trainer of the embedded model with 2 prompts × 2 pictures × 2 noisings, further keys laid over.

    One sampling step without guidance gives blurred pictures, which is all these tests need, in half the time.
    """
    basis = [("noisings_per_image", "2"), ("rollout.sampling_steps", "1"), ("rollout.guidance_scale", "1")]

    def make(*overrides: tuple[str, str], reward: RewardFunction | None = None) -> Trainer:
        config = load_settings(str(tiny_preset), overrides=[*basis, *overrides]).config
        pipeline = pristine[0]._pipeline  # nobody changes it; its tokenizers take long to copy
        backbone, policy = copy.deepcopy(pristine, {id(pipeline): pipeline})
        return Trainer(config, backbone, policy, read_prompts(config.prompts.train), reward or FromPictures())

    return make


class TwoProcesses(World):
    """The second of two processes; the first one's rows are given."""

    def __init__(self, first: object) -> None:
        super().__init__(rank=1, size=2)
        self.first = first

    def gather(self, rows: object) -> list[object]:
        return [self.first, rows]


def gradients(trainer: Trainer) -> Tensor:
    """The gradient the last update used, flat."""
    grads = [p.grad for p in trainer.policy.parameters.values()]
    return torch.cat([g.flatten() for g in grads if g is not None])


@dataclass(frozen=True)
class Call:
    """One call of the backbone's velocity."""

    network: nn.Module
    t: tuple[float, ...]
    with_gradient: bool


@pytest.fixture(name="spy")
def spy_fixture(monkeypatch: pytest.MonkeyPatch) -> Callable[[Trainer], list[Call]]:
    """Notes the calls of ``velocity`` made outside the sampler, which run as ever."""

    def install(trainer: Trainer) -> list[Call]:
        calls: list[Call] = []
        velocity, sample = trainer.backbone.velocity, trainer.backbone.sample

        def noted(network: nn.Module, x_t: Tensor, t: Tensor, text: TextEmbeddings) -> Tensor:
            calls.append(Call(network, tuple(t.tolist()), torch.is_grad_enabled()))
            return velocity(network, x_t, t, text)

        def unnoted(*args: object, **options: object) -> Tensor:
            before = len(calls)
            x0 = sample(*args, **options)  # type: ignore[arg-type]
            del calls[before:]
            return x0

        monkeypatch.setattr(trainer.backbone, "velocity", noted)
        monkeypatch.setattr(trainer.backbone, "sample", unnoted)
        return calls

    return install
