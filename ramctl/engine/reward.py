"""A step's pictures on their way to the reward: scored on a thread beside the networks, then gathered from everywhere.

In: batches of pictures uint8 [n, H, W, 3] with their prompts, in order, as they are drawn. Out: the :class:`Scores` of
them all, first this process', then all processes'.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ramctl.engine.distributed import World
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, Scores
from ramctl.watched_threads import WatchedThreads


class RewardFunction(Protocol):
    """What the engine needs of a reward."""

    def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        """Scores of N images uint8 [N, H, W, 3]."""
        ...


@functools.cache
def reward_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The GPU's queue for scorers, one for the whole run; None on a CPU.

    In the networks' own queue a scorer that waits for one result would wait for every pass queued before it. Theirs
    goes first: what it takes is little beside a pass, and the step waits for scores, not the other way round.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


class Scoring:
    """One thread that scores batches one after the other while pictures are drawn and networks computed.

    Used as a context: on leaving it, batches not begun are dropped and a scorer at work is not waited for. Nor does the
    end of the process wait for it (:mod:`ramctl.watched_threads`), so that an interrupt ends a run at once.

    Args:
        prompts: of all pictures that will come, in their order.
    """

    def __init__(self, reward: RewardFunction, prompts: Sequence[Prompt], device: torch.device) -> None:
        self._reward, self._prompts, self._device = reward, prompts, device
        self._stream = reward_stream(device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the scorers' weights came that way
        self._threads = WatchedThreads(1, math.inf, "reward")
        self._batches: list[Future[tuple[Scores, float]]] = []
        #: Pictures that have come.
        self.pictures = 0

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self._batches:
            batch.cancel()
        self._threads.close()

    def add(self, images: Images) -> None:
        """Score the next pictures, uint8 [n, H, W, 3], after the ones before.

        Raises:
            RamctlError: an earlier batch ended with it; nothing more need be drawn.
        """
        for batch in self._batches:
            if batch.done():
                batch.result()
        prompts = self._prompts[self.pictures : self.pictures + len(images)]
        self._batches.append(self._threads.submit(functools.partial(self._score, images, prompts)))
        self.pictures += len(images)

    def result(self) -> tuple[Scores, float]:
        """The scores of all batches in order, waited for, and the seconds that scoring took, passes beside it included.

        Raises:
            RamctlError: the first one with which a batch ended.
        """
        done = [batch.result() for batch in self._batches]
        return Scores.joined([scores for scores, _ in done]), sum(seconds for _, seconds in done)

    def _score(self, images: Images, prompts: Sequence[Prompt]) -> tuple[Scores, float]:
        start = time.perf_counter()
        with self._place():
            scores = self._reward.score(images, prompts)
        return scores, time.perf_counter() - start

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """This process' GPU and the scorers' queue there.

        A thread begins on the first GPU: to come back there from another one's queue would take memory of it.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield


@dataclass(frozen=True)
class GatheredScores(Scores):
    """Scores of all pictures with their prompts, in global order, on every process; their records are empty."""

    prompts: Sequence[Prompt]


def gather_scores(world: World, scores: Scores, prompts: Sequence[Prompt]) -> GatheredScores:
    """All processes' scores in rank order, which is the global order of contiguous shares; records stay at home."""
    parts = world.gather((replace(scores, records=[{}] * len(scores)), prompts))
    every = Scores.joined([part for part, _ in parts])
    return GatheredScores(**vars(every), prompts=[prompt for _, part in parts for prompt in part])
