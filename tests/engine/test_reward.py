"""Scoring beside the networks, and what all processes make of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from ramctl.engine.evaluation import evaluate
from ramctl.engine.reward import RewardFunction, Scoring, gather_scores, reward_stream
from ramctl.engine.trainer import Trainer
from ramctl.errors import ScorerError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scores
from tests.engine.steps import (  # noqa: F401
    Build,
    FromPictures,
    TwoProcesses,
    build_fixture,
    pristine_fixture,
)

CPU = torch.device("cpu")
PROMPTS = [Prompt(text) for text in ("a", "b", "c", "d", "e")]


def pictures(*grey: int) -> Images:
    return np.stack([np.full((2, 2, 3), value, dtype=np.uint8) for value in grey])


def test_batches_are_scored_in_order_with_their_prompts() -> None:
    calls: list[tuple[list[int], list[str]]] = []

    class Noting(FromPictures):
        def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
            calls.append((images[:, 0, 0, 0].tolist(), [prompt.text for prompt in prompts]))
            return super().score(images, prompts)

    with Scoring(Noting(), PROMPTS, CPU) as scoring:
        scoring.add(pictures(0, 51))
        scoring.add(pictures(102))
        scoring.add(pictures(153, 255))
        scores, seconds = scoring.result()
    assert calls == [([0, 51], ["a", "b"]), ([102], ["c"]), ([153, 255], ["d", "e"])]
    np.testing.assert_allclose(scores.value, [0, 0.2, 0.4, 0.6, 1.0], rtol=1e-6)
    assert 0 < seconds < 60


def test_no_pictures_have_no_scores() -> None:
    with Scoring(FromPictures(), PROMPTS, CPU) as scoring:
        scores, seconds = scoring.result()
    assert len(scores) == 0
    assert seconds == 0


def test_a_batch_that_failed_is_heard_of_at_the_next_one() -> None:
    class Broken:
        def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
            raise ScorerError("the engine hangs")

    with Scoring(Broken(), PROMPTS, CPU) as scoring:
        scoring.add(pictures(0))
        while not scoring._batches[0].done():
            time.sleep(0.01)
        with pytest.raises(ScorerError, match="the engine hangs"):
            scoring.add(pictures(1))
        with pytest.raises(ScorerError, match="the engine hangs"):
            scoring.result()


def test_leaving_early_drops_what_was_not_begun() -> None:
    begun: list[str] = []
    first, released = threading.Event(), threading.Event()

    class Slow(FromPictures):
        def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
            begun.append(prompts[0].text)
            first.set()
            released.wait(60)
            return super().score(images, prompts)

    with pytest.raises(KeyboardInterrupt), Scoring(Slow(), PROMPTS, CPU) as scoring:
        scoring.add(pictures(0))
        scoring.add(pictures(1))
        assert first.wait(60)
        raise KeyboardInterrupt
    released.set()
    scoring._batches[0].result()
    assert scoring._batches[1].cancelled()
    assert begun == ["a"]


def test_the_end_of_the_process_does_not_wait_for_a_scorer() -> None:
    code = """
import time
import torch
from ramctl.engine.reward import Scoring

class Slow:
    def score(self, images, prompts):
        time.sleep(60)

with Scoring(Slow(), [], torch.device("cpu")) as scoring:
    scoring.add([])
    time.sleep(0.2)
    raise KeyboardInterrupt
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr
    assert time.monotonic() - start < 40


def test_only_a_gpu_has_a_queue_for_scorers() -> None:
    assert reward_stream(CPU) is None


# -- in a step and in an evaluation -----------------------------------------------------------------------------------


class BesideTheDrawing(FromPictures):
    """A scorer that ends only when a second batch is being drawn, which is drawn only when the first is scored."""

    def __init__(self) -> None:
        super().__init__()
        self.drawings = 0
        self.second_begun, self.scoring = threading.Event(), threading.Event()
        self.sizes: list[int] = []

    def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
        self.scoring.set()
        assert self.second_begun.wait(20), "the second batch was not begun while the first one was scored"
        self.sizes.append(len(images))
        return super().score(images, prompts)

    def watch(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        sample = trainer.backbone.sample

        def noted(*arguments: object, **options: object) -> Tensor:
            self.drawings += 1
            if self.drawings == 2:
                self.second_begun.set()
                assert self.scoring.wait(20), "the first batch was not scored while the second one was drawn"
            return sample(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(trainer.backbone, "sample", noted)


def test_a_step_scores_a_batch_while_it_draws_the_next(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = BesideTheDrawing()
    trainer = build(("rollout.micro_batch", "2"), reward=reward)
    reward.watch(trainer, monkeypatch)
    metrics = trainer.step().metrics
    assert reward.sizes == [2, 2]
    monkeypatch.undo()
    together = build(("rollout.micro_batch", "4")).step().metrics
    assert metrics["reward/mean"] == pytest.approx(together["reward/mean"], abs=1e-6)
    assert metrics["loss"] == pytest.approx(together["loss"], rel=1e-3)


def test_an_evaluation_scores_a_batch_while_it_draws_the_next(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = BesideTheDrawing()
    trainer = build()
    reward.watch(trainer, monkeypatch)
    counts: list[int] = []

    def held_out(reward: RewardFunction, micro_batch: int, progress: Callable[[int], None] | None = None):
        settings = trainer.config.evaluation.model_copy(update={"images_per_prompt": 1, "sampling_steps": 1})
        return evaluate(
            trainer.backbone,
            trainer.policy.network("old"),
            trainer.prompts[:3],
            reward,
            settings,
            micro_batch=micro_batch,
            progress=progress,
        )

    found = held_out(reward, 1, counts.append)
    assert reward.sizes == counts == [1, 1, 1]
    together = held_out(FromPictures(), 3)
    np.testing.assert_allclose(found.value, together.value, atol=1e-3)
    assert [p.text for p in found.prompts] == [p.text for p in trainer.prompts[:3]]


def test_an_interrupt_does_not_wait_for_a_slow_scorer(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    class Slow(FromPictures):
        def score(self, images: Images, prompts: Sequence[Prompt]) -> Scores:
            released.wait(60)
            return super().score(images, prompts)

    trainer = build(reward=Slow())

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_sweep", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    released.set()
    assert time.monotonic() - start < 30


# -- several processes ------------------------------------------------------------------------------------------------


def test_scores_are_gathered_in_order_with_columns_that_one_process_lacks() -> None:
    first = Scores.collect(["unreadable", "unreadable"])
    second = Scores.collect([ImageScore(1.0, strict=1.0, details={"objects": 2.0})])
    rows = (dataclasses.replace(first, records=[{}, {}]), [Prompt("a")] * 2)
    gathered = gather_scores(TwoProcesses(rows), second, [Prompt("b")])
    np.testing.assert_array_equal(gathered.value, [np.nan, np.nan, 1.0])
    assert gathered.strict is not None
    np.testing.assert_array_equal(gathered.strict, [np.nan, np.nan, 1.0])
    np.testing.assert_array_equal(gathered.details["objects"], [np.nan, np.nan, 2.0])
    assert gathered.failed.tolist() == [True, True, False]
    assert gathered.errors == ["unreadable", "unreadable", None]
    assert [prompt.text for prompt in gathered.prompts] == ["a", "a", "b"]
