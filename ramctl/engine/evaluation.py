"""Held-out evaluation: pictures for fixed prompts and seeds, scored. Training and ``ramctl evaluate`` use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ramctl.backbones.base import Backbone
from ramctl.config import EvaluationSection
from ramctl.engine.distributed import World
from ramctl.engine.micro_batch import MicroBatch
from ramctl.engine.randomness import keyed_seed
from ramctl.engine.reward import GatheredScores, RewardFunction, Scoring, gather_scores
from ramctl.engine.rollout import generate
from ramctl.prompts import Prompt


@dataclass(frozen=True)
class Evaluation(GatheredScores):
    """Scores of all pictures on every process, in order: picture j of prompt i is row i·images_per_prompt + j.

    ``images`` are this process' pictures only, uint8 [n, H, W, 3], the rows ``share`` of the whole.
    """

    images: NDArray[np.uint8]
    share: range


def evaluate(
    backbone: Backbone,
    network: nn.Module,
    prompts: Sequence[Prompt],
    reward: RewardFunction,
    settings: EvaluationSection,
    world: World | None = None,
    *,
    micro_batch: int | MicroBatch = 0,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Draw and score ``images_per_prompt`` pictures for each prompt.

    The noise of picture j of prompt i is keyed by (evaluation seed, i·images_per_prompt + j), so two sets of weights
    are compared on the same noise. Each batch is scored while the next one is drawn.

    Args:
        progress: called with the number of pictures just drawn.
    """
    world = world or World()
    repeated = [prompt for prompt in prompts for _ in range(settings.images_per_prompt)]
    share = world.share(len(repeated))
    mine = [repeated[i] for i in share]
    seeds = [keyed_seed(settings.seed, "evaluation", 0, i) for i in share]
    images = np.zeros((0, 1, 1, 3), dtype=np.uint8)
    with Scoring(reward, mine, backbone.device) as scoring:

        def drawn(pictures: NDArray[np.uint8]) -> None:
            scoring.add(pictures)
            if progress is not None:
                progress(len(pictures))

        if mine:
            images = generate(
                backbone,
                network,
                [prompt.text for prompt in mine],
                seeds,
                steps=settings.sampling_steps,
                guidance_scale=settings.guidance_scale,
                negative_prompt=settings.negative_prompt,
                sampler=settings.sampler,
                micro_batch=micro_batch,
                drawn=drawn,
            ).images
        scores, _ = scoring.result()
    return Evaluation(**vars(gather_scores(world, scores, mine)), images=images, share=share)
