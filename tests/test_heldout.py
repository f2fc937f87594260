"""Held-out evaluations during training: a full GPU, failed pictures, what is kept and compared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.engine.distributed import World
from ramctl.engine.evaluation import Evaluation
from ramctl.engine.policy import Policy
from ramctl.errors import OutOfMemoryError, ScorerError
from ramctl.heldout import HeldOut
from ramctl.observer import SilentObserver
from ramctl.prompts import Prompt, read_prompts
from ramctl.report import Report, render_report
from ramctl.runfolder import RunFolder
from ramctl.settings import Settings, load_settings
from ramctl.training import make_reward


def test_a_full_gpu_halves_the_pictures_for_good_and_then_names_the_keys(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    config = tiny_settings.config
    backbone = StableDiffusion3.load(config.model, torch.device("cpu"), None)
    policy = Policy(backbone, config.lora, seed=0)
    prompts = read_prompts(config.prompts.evaluation or "")
    reward, folder = make_reward(config), RunFolder(tmp_path)
    held_out = HeldOut(config, backbone, policy, prompts, reward, World(), folder, SilentObserver())
    held_out.batch.size = 4
    roomy = held_out.evaluate("reference", 0)
    velocity, sizes = backbone.velocity, []

    def small_card(network: nn.Module, x_t: Tensor, t: Tensor, text: TextEmbeddings, room: int = 4) -> Tensor:
        sizes.append(len(x_t))
        if len(x_t) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return velocity(network, x_t, t, text)

    monkeypatch.setattr(backbone, "velocity", small_card)
    tight = held_out.evaluate("reference", 1)
    assert held_out.batch.size == 2
    assert roomy is not None and tight is not None
    np.testing.assert_allclose(tight["eval/mean"], roomy["eval/mean"], rtol=0.02)
    sizes.clear()
    held_out.evaluate("reference", 2)
    assert max(sizes) == 4  # two pictures and their unguided twins: the first attempt already has the size that fits
    monkeypatch.setattr(backbone, "velocity", lambda *arguments: small_card(*arguments, room=0))
    with pytest.raises(OutOfMemoryError, match=r"rollout\.micro_batch.*gradient_checkpointing.*text_encoders"):
        held_out.evaluate("reference", 3)


# -- what is kept of an evaluation

PROMPTS = [Prompt(f"prompt {i}", {"tag": "ab"[i // 3]}) for i in range(6)]
NAN = float("nan")


@pytest.fixture
def held(tiny_preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a HeldOut over PROMPTS whose next evaluations give the values listed; it draws nothing."""

    def make(values: list[float], *overrides: tuple[str, str], prompts: list[Prompt] = PROMPTS) -> HeldOut:
        options = [("rollout.micro_batch", "1"), ("picture_prompts", "2"), *overrides]
        config = load_settings(str(tiny_preset), overrides=options).config
        repeated = [prompt for prompt in prompts for _ in range(config.evaluation.images_per_prompt)]
        column = np.array(values, dtype=np.float32)
        failed = np.isnan(column)
        errors = ["unreadable" if bad else None for bad in failed]
        pictures = np.stack([np.full((8, 8, 3), i, np.uint8) for i in range(len(values))])
        result = Evaluation(
            column, None, {}, [{}] * len(values), failed, errors, repeated, pictures, range(len(values))
        )
        monkeypatch.setattr("ramctl.heldout.evaluate", lambda *arguments, **options: result)
        policy = SimpleNamespace(network=lambda which: None)
        folder = RunFolder(tmp_path)
        return HeldOut(config, None, policy, prompts, None, World(), folder, SilentObserver())  # type: ignore[arg-type]

    return make


def evaluated(held_out: HeldOut, step: int) -> HeldOut:
    row = held_out.evaluate("evaluation", step)
    assert row is not None
    held_out.folder.put("evaluations.jsonl", row)
    return held_out


def test_too_many_failed_pictures_stop_the_evaluation_and_nothing_is_kept(held: Any, tmp_path: Path) -> None:
    some = held([1, NAN, 1, 1, NAN, 1], ("max_failed_share", "0.3"))
    with pytest.raises(ScorerError, match=r"evaluation at step 4: 2 of 6 pictures .*'prompt 1': unreadable"):
        some.evaluate("evaluation", 4)
    assert not (tmp_path / "samples").exists()
    evaluated(held([1, NAN, 1, 1, NAN, 1], ("max_failed_share", "0.4")), 4)


def test_a_comparison_without_a_complete_pair_is_left_out(held: Any) -> None:
    everything = ("max_failed_share", "1")
    evaluated(held([1] * 6, everything), 0)
    last = evaluated(held([NAN] * 6, everything), 2)
    assert last.comparisons(2) == []
    evaluated(held([NAN, 1, 2, NAN, NAN, NAN], everything), 0)
    last = evaluated(held([5, 2, 4, NAN, NAN, NAN], everything), 2)
    (comparison,) = last.comparisons(2)
    assert (comparison.before, comparison.after, comparison.count) == (1.5, 3, 2)


def test_a_prompt_counts_with_the_pictures_that_could_be_scored(held: Any) -> None:
    options = ("evaluation.images_per_prompt", "2"), ("max_failed_share", "1")
    evaluated(held([1, NAN, 3, 5], *options, prompts=PROMPTS[:2]), 0)
    last = evaluated(held([2, 4, NAN, 6], *options, prompts=PROMPTS[:2]), 2)
    (comparison,) = last.comparisons(2)
    assert (comparison.before, comparison.after, comparison.count) == (2.5, 4.5, 2)


@pytest.mark.parametrize("old", [False, True], ids=["with-texts", "files-of-before"])
def test_pictures_keep_their_prompts_when_another_number_is_shown(held: Any, tmp_path: Path, old: bool) -> None:
    evaluated(held([0.1, 0, 0, 0.4, 0, 0]), 0)
    if old:
        path = tmp_path / "samples" / "step-000000.npz"
        with np.load(path) as kept:
            columns = {name: kept[name] for name in ("pictures", "shown_value", "value")}
        np.savez_compressed(path, **columns)
    last = evaluated(held([0.5] * 6, ("picture_prompts", "3")), 2)
    before, after = last.grids(2)
    assert list(before.prompts) == ["prompt 0", "prompt 3"]
    assert [int(picture[0, 0, 0]) for picture in before.images] == [0, 3]
    assert list(after.prompts) == ["prompt 0", "prompt 1", "prompt 3"]
    assert "prompt 1" in render_report(Report(title="run", grids=[before, after]))


def test_pictures_of_another_selection_are_shown_under_their_own_prompts(held: Any) -> None:
    evaluated(held([0] * 6), 0)
    # The same number of pictures; the tags, by which prompts are chosen, are others.
    retagged = [Prompt(prompt.text, {"tag": "b" if i < 2 else "a"}) for i, prompt in enumerate(PROMPTS)]
    last = evaluated(held([0] * 6, prompts=retagged), 2)
    before, after = last.grids(2)
    assert list(before.prompts) == ["prompt 0", "prompt 3"]
    assert list(after.prompts) == ["prompt 0", "prompt 2"]


def test_an_evaluation_is_done_when_its_row_and_whole_file_are_there(held: Any, tmp_path: Path) -> None:
    held_out = held([1] * 6)
    assert not held_out.done_at(2)
    assert held_out.mean_at(2) is None
    evaluated(held_out, 2)
    assert held_out.done_at(2)
    assert held_out.mean_at(2) == 1
    assert not held_out.done_at(0)
    assert [path.name for path in (tmp_path / "samples").iterdir() if "tmp" in path.name] == []
    path = tmp_path / "samples" / "step-000002.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert not held_out.done_at(2)


def test_an_evaluation_of_other_prompts_is_not_this_runs(held: Any) -> None:
    evaluated(held([1] * 6), 0)
    edited = [*PROMPTS[:5], Prompt("another", {"tag": "b"})]
    assert not held([1] * 6, prompts=edited).done_at(0)
    assert held([1] * 6).done_at(0)
