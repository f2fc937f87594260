"""One step of RAM on the embedded model: its loss against the formula written out, its invariances, its refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ramctl.backbones.base import TextEmbeddings
from ramctl.engine.objective import draw_bridge, path_cost, path_cost_correction
from ramctl.engine.randomness import keyed_normal, keyed_seed, keyed_uniform, prompts_of_step
from ramctl.engine.rollout import generate
from ramctl.engine.trainer import Trainer
from ramctl.errors import DivergedError, OutOfMemoryError, ScorerError
from ramctl.training import make_reward
from tests.engine.steps import (  # noqa: F401
    Build,
    Call,
    Constant,
    FromPictures,
    TwoProcesses,
    build_fixture,
    gradients,
    pristine_fixture,
    spy_fixture,
)

# -- the loss, written out --------------------------------------------------------------------------------------------


def expected_loss(trainer: Trainer, step: int) -> float:
    """The mean loss of a step from the paper's formulas and the run's keys, before its update; one item at a time."""
    config, backbone, policy = trainer.config, trainer.backbone, trainer.policy
    seed, ram, group = config.train.seed, config.ram, config.rollout.images_per_prompt
    chosen = prompts_of_step(step, config.rollout.prompts_per_step, len(trainer.prompts), seed)
    texts = [trainer.prompts[index].text for index in chosen for _ in range(group)]
    drawn = generate(
        backbone,
        policy.network("old"),
        texts,
        [keyed_seed(seed, "endpoint", step, i) for i in range(len(texts))],
        steps=config.rollout.sampling_steps,
        guidance_scale=config.rollout.guidance_scale,
    )
    reward = drawn.images.reshape(len(texts), -1).mean(axis=1).astype(np.float32) / np.float64(255)
    reward = reward.astype(np.float32).astype(np.float64)
    centred = (reward.reshape(-1, group) - reward.reshape(-1, group).mean(axis=1, keepdims=True)).ravel()
    advantage = centred / (reward.std() + ram.advantage_epsilon)
    losses = []
    for i, text in enumerate(texts):
        x0, words = drawn.latents[i : i + 1], backbone.encode([text])
        for n in range(ram.noisings_per_image):
            item = i * ram.noisings_per_image + n
            uniform = keyed_uniform([keyed_seed(seed, "time", step, item)])
            low, high = ram.min_time**2, ram.max_time**2
            t = (low + uniform * (high - low)).sqrt().float()  # the inverse distribution of p(t) ∝ t
            noise = keyed_normal([keyed_seed(seed, "noising", step, item)], x0.shape[1:], x0.device)
            x_t, y = (1 - t) * x0 + t * noise, noise - x0

            def velocity(which: str, x: Tensor, at: Tensor, words: TextEmbeddings = words) -> Tensor:
                network = policy.live if which == "policy" else policy.network(which)  # type: ignore[arg-type]
                with torch.no_grad():
                    return backbone.velocity(network, x, at, words)

            correction: Tensor | float = 0.0
            if ram.path_cost:
                start = t.clamp(max=ram.path_cost_min_time)
                share = keyed_uniform([keyed_seed(seed, "time_between", step, item)]).float()
                s = start + share * (t - start)
                noise_s = keyed_normal([keyed_seed(seed, "noising_between", step, item)], x0.shape[1:], x0.device)
                bridge = draw_bridge(path=backbone.path, x0=x0, epsilon_s=noise_s, epsilon_t=noise, s=s, t=t)
                x_t, y = bridge.x_t, bridge.y_0
                cost_s, cost_t = (
                    path_cost(v=velocity("old", x, at), v_ref=velocity("reference", x, at), path=backbone.path, t=at)
                    for x, at in ((bridge.x_s, s), (x_t, t))
                )
                correction = path_cost_correction(
                    cost_s=cost_s, cost_t=cost_t, span=t - start, y_s=bridge.y_s, v_t=velocity("old", x_t, t)
                )
            old, reference, policy_v = (velocity(which, x_t, t) for which in ("old", "reference", "policy"))
            target = reference + ram.reward_multiplier * float(advantage[i]) * (y - old) + correction
            losses.append(float((policy_v - target).square().mean()))
    return float(np.mean(losses))


@pytest.mark.parametrize("path_cost", ["false", "true"])
def test_the_loss_of_a_step_is_the_papers_formula(build: Build, path_cost: str) -> None:
    sampling = ("rollout.sampling_steps", "2"), ("rollout.guidance_scale", "1.5")
    trainer = build(("path_cost", path_cost), ("old_ema_warmup", "0.5"), *sampling)
    trainer.step()
    trainer.step()
    old, policy = (next(iter(trainer.policy.tensors(which).values())) for which in ("old", "policy"))
    assert not torch.equal(old, policy)
    expected = expected_loss(trainer, 2)
    metrics = trainer.step().metrics
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["drift"] > 0


def test_a_constant_reward_teaches_nothing_at_the_start(build: Build) -> None:
    trainer = build(("weight_decay", "0"), reward=Constant())
    before = {name: value.clone() for name, value in trainer.policy.tensors("policy").items()}
    metrics = trainer.step().metrics
    assert metrics["loss"] == 0
    assert metrics["grad_norm"] == 0
    assert metrics["drift"] == 0
    assert metrics["advantage/flat_groups"] == 1
    assert not gradients(trainer).any()
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.tensors("policy").items())


def test_a_constant_reward_teaches_nothing_at_the_start_with_path_cost(build: Build) -> None:
    metrics = build(("path_cost", "true"), reward=Constant()).step().metrics
    assert metrics["loss"] == 0
    assert metrics["grad_norm"] == 0


# -- the weight sets over steps ---------------------------------------------------------------------------------------


def test_weight_sets_over_three_steps(build: Build) -> None:
    trainer = build(("evaluation.ema_decay", "0.5"))
    policy, start = trainer.policy, {k: v.clone() for k, v in trainer.policy.tensors("policy").items()}
    probe = torch.randn(1, *trainer.backbone.latent_shape), torch.tensor([0.5]), trainer.backbone.encode(["a ring"])
    reference = trainer.backbone.velocity(policy.network("reference"), *probe)
    base = {name: value.clone() for name, value in policy.network("reference").state_dict().items()}

    trainer.step()
    first = {k: v.clone() for k, v in policy.tensors("policy").items()}
    moved = [name for name in first if not torch.equal(first[name], start[name])]
    assert any("lora_B" in name for name in moved)
    for name, value in first.items():
        assert torch.equal(policy.tensors("old")[name], value)  # decay 0: an exact copy
        torch.testing.assert_close(policy.tensors("evaluation")[name], 0.5 * start[name] + 0.5 * value)

    expected = first
    for decay in (0.01, 0.02):  # min(.01·k, .9) at k = 1, 2
        trainer.step()
        expected = {k: decay * expected[k] + (1 - decay) * v for k, v in policy.tensors("policy").items()}
        torch.testing.assert_close(policy.tensors("old"), expected)
        assert any(not torch.equal(v, policy.tensors("policy")[k]) for k, v in policy.tensors("old").items())

    assert torch.equal(trainer.backbone.velocity(policy.network("reference"), *probe), reference)
    after = policy.network("reference").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in base.items())


def test_the_next_pictures_are_drawn_with_the_old_weights(build: Build) -> None:
    trainer = build(("old_ema_warmup", "0.9"))
    trainer.step()
    result = [trainer.step(), trainer.step()][-1]
    frozen = build(("old_ema_warmup", "0.9"))
    frozen.step()
    frozen.step()
    drawn = generate(
        frozen.backbone,
        frozen.policy.network("old"),
        [prompt.text for prompt in result.prompts],
        [keyed_seed(0, "endpoint", 2, i) for i in range(4)],
        steps=1,
        guidance_scale=1.0,
    )
    assert np.array_equal(drawn.images, result.images)


# -- invariances ------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_step_and_another_seed_another(build: Build) -> None:
    def run(seed: str) -> tuple[float, float, Tensor]:
        trainer = build(("train.seed", seed))
        metrics = trainer.step().metrics
        return metrics["reward/mean"], metrics["loss"], gradients(trainer)

    first = run("1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        again, other = run("1"), run("2")
    assert first[:2] == again[:2]
    assert torch.equal(first[2], again[2])
    assert first[1] != other[1]


@pytest.mark.parametrize(
    "sizes",
    [
        [("train.micro_batch", "1")],
        [("train.micro_batch", "5"), ("sweep_micro_batch", "7")],
        [("sweep_micro_batch", "1")],
        [("path_cost", "true"), ("train.micro_batch", "5"), ("sweep_micro_batch", "2")],
    ],
)
def test_micro_batches_do_not_change_the_gradient(build: Build, sizes: list[tuple[str, str]]) -> None:
    """Float32 sums in another order: a relative difference of the gradient below 1e-5."""
    cost = [pair for pair in sizes if pair[0] == "path_cost"]
    whole, parts = build(*cost), build(*sizes)
    one, other = whole.step(), parts.step()
    assert np.array_equal(one.images, other.images)
    difference = (gradients(whole) - gradients(parts)).norm() / gradients(whole).norm()
    assert difference < 1e-5
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-5)
    assert one.metrics["target_norm"] == pytest.approx(other.metrics["target_norm"], rel=1e-5)


def test_running_out_of_gpu_memory_halves_the_passes_and_changes_nothing_else(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card with room for two items: of every phase the first pass fails midway, and the step is what it was."""
    sizes = ("rollout.micro_batch", "4"), ("sweep_micro_batch", "4"), ("train.micro_batch", "4")
    roomy, tight = build(*sizes), build(*sizes)
    velocity = tight.backbone.velocity

    def small_card(network: nn.Module, x_t: Tensor, t: Tensor, text: TextEmbeddings) -> Tensor:
        result = velocity(network, x_t, t, text)
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(tight.backbone, "velocity", small_card)
    one, other = roomy.step(), tight.step()
    assert {name: batch.size for name, batch in tight.batches.items()} == {"sample": 2, "sweep": 2, "train": 2}
    assert np.abs(one.images.astype(int) - other.images).max() <= 1
    assert (gradients(roomy) - gradients(tight)).norm() / gradients(roomy).norm() < 1e-3
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-3)


def test_a_card_too_small_for_half_a_pass_ends_the_step_before_the_update(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(("train.micro_batch", "4"))
    velocity = trainer.backbone.velocity

    def no_room_to_train(network: nn.Module, x_t: Tensor, t: Tensor, text: TextEmbeddings) -> Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return velocity(network, x_t, t, text)

    monkeypatch.setattr(trainer.backbone, "velocity", no_room_to_train)
    before = copy.deepcopy(trainer.policy.tensors("policy"))
    with pytest.raises(OutOfMemoryError, match=r"train\.micro_batch.*gradient_checkpointing.*text_encoders"):
        trainer.step()
    assert trainer.step_index == 0
    assert all(torch.equal(before[name], value) for name, value in trainer.policy.tensors("policy").items())


def test_the_old_weights_may_count_their_steps_from_another_start(build: Build) -> None:
    trainer = build(("old_ema_offset", "1"), ("old_ema_warmup", "0.25"))
    before = {name: value.clone() for name, value in trainer.policy.tensors("old").items()}
    trainer.step()
    policy = trainer.policy.tensors("policy")
    for name, value in trainer.policy.tensors("old").items():
        torch.testing.assert_close(value, 0.25 * before[name] + 0.75 * policy[name])
    assert any(not torch.equal(before[name], value) for name, value in policy.items())


@pytest.mark.parametrize(("noisings", "updates"), [("2", 2), ("5", 2), ("3", 3)])
def test_each_noising_is_trained_on_once_whatever_the_updates(
    build: Build, spy: Callable[[Trainer], list[Call]], noisings: str, updates: int
) -> None:
    trainer = build(("noisings_per_image", noisings), ("updates_per_step", str(updates)), ("train.micro_batch", "4"))
    calls = spy(trainer)
    trainer.step()
    swept = [call for call in calls if not call.with_gradient]
    trained = [call for call in calls if call.with_gradient]
    assert all(call.network is trainer.policy.live for call in trained)
    assert all(call.network is trainer.policy.frozen for call in swept)
    all_times = sorted(t for call in trained for t in call.t)
    assert len(set(all_times)) == trainer.config.items_per_step
    assert sorted(t for call in swept for t in call.t) == sorted(2 * all_times)  # once old, once reference
    (made,) = {float(state["step"]) for state in trainer.optimizer.state.values()}
    assert made == updates


def test_an_update_takes_the_mean_over_its_own_items(build: Build) -> None:
    """With one item set split over two updates the gradient of each must be a mean, not half of one."""
    trainer = build(("updates_per_step", "2"), ("optimizer.lr", "1e-12"))
    halves: list[Tensor] = []
    update = trainer._update

    def noted() -> float:
        norm = update()
        halves.append(gradients(trainer).clone())
        return norm

    trainer._update = noted  # type: ignore[method-assign]
    trainer.step()
    whole = build(("optimizer.lr", "1e-12"))
    whole.step()
    torch.testing.assert_close(sum(halves) / 2, gradients(whole), rtol=1e-3, atol=1e-5)


# -- optimizer settings -----------------------------------------------------------------------------------------------


def test_learning_rate_warm_up(build: Build) -> None:
    trainer = build(("warmup_steps", "2"), ("optimizer.lr", "1e-3"))
    assert [trainer.step().metrics["lr"] for _ in range(3)] == pytest.approx([5e-4, 1e-3, 1e-3])


def test_clipping_bounds_the_gradient_and_reports_what_it_was(build: Build) -> None:
    trainer = build(("max_grad_norm", "0.01"))
    metrics = trainer.step().metrics
    assert metrics["grad_norm"] > 0.02
    assert float(gradients(trainer).norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_advantage_clip_bounds_the_target(build: Build) -> None:
    free, clipped = (
        build(("reward_multiplier", "1000")),
        build(("reward_multiplier", "1000"), ("advantage_clip", "0.1")),
    )
    assert clipped.step().metrics["target_norm"] < 0.5 * free.step().metrics["target_norm"]


def test_progress_reaches_the_end_of_every_phase(build: Build) -> None:
    trainer = build(("updates_per_step", "2"), ("train.micro_batch", "2"), ("rollout.micro_batch", "3"))
    seen: list[tuple[str, int, int]] = []
    trainer.progress = lambda *event: seen.append(event)
    trainer.step()
    for phase, total in (("sample", 4), ("sweep", 16), ("train", 8)):
        events = [(done, of) for name, done, of in seen if name == phase]
        assert events[-1] == (total, total)
        assert all(a[0] < b[0] for a, b in pairwise(events))


def test_step_metrics_hold_what_the_readers_need(build: Build) -> None:
    trainer = build()
    result = trainer.step()
    assert result.images.shape == (4, 64, 64, 3)
    assert [prompt.text for prompt in result.prompts[:2]] == 2 * [result.prompts[0].text]
    assert result.metrics["step"] == 1 == trainer.step_index
    assert {"reward/mean", "reward/std", "reward/failed", "loss", "drift", "grad_norm", "lr"} <= set(result.metrics)
    timed = [result.metrics[f"seconds/{name}"] for name in ("sample", "sweep", "score", "train")]
    assert sum(timed) <= result.metrics["seconds/total"]
    assert result.metrics["images_per_second"] == pytest.approx(4 / result.metrics["seconds/total"], rel=0.05)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_failed_picture_is_left_out_and_gets_the_reference_as_target(build: Build) -> None:
    trainer = build(("max_failed_share", "0.5"), reward=FromPictures(failing=[1]))
    metrics = trainer.step().metrics
    assert metrics["reward/failed"] == pytest.approx(1 / 4)
    assert np.isfinite(metrics["reward/mean"])
    assert np.isfinite(metrics["loss"])
    assert metrics["loss"] > 0


def test_too_many_failures_stop_the_step_and_change_nothing(build: Build) -> None:
    trainer = build(("max_failed_share", "0.2"), reward=FromPictures(failing=[1, 3]))
    before = {name: value.clone() for name, value in trainer.policy.tensors("policy").items()}
    text = trainer.prompts[prompts_of_step(0, 2, len(trainer.prompts), 0)[0]].text
    with pytest.raises(ScorerError) as caught:
        trainer.step()
    message = str(caught.value)
    assert message.startswith("Step 1: 2 of 4 pictures could not be scored (numbers 1, 3)")
    assert repr(text) in message
    assert message.endswith("the file is broken")
    assert trainer.step_index == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.tensors("policy").items())


def test_all_failed_stops_whatever_share_is_allowed(build: Build) -> None:
    trainer = build(("max_failed_share", "1"), reward=FromPictures(failing=range(4)))
    with pytest.raises(ScorerError, match="4 of 4"):
        trainer.step()


def test_a_non_finite_loss_is_refused_before_the_update(build: Build) -> None:
    trainer = build(("reward_multiplier", "1e39"))
    before = {name: value.clone() for name, value in trainer.policy.tensors("policy").items()}
    with pytest.raises(DivergedError) as caught:
        trainer.step()
    message = str(caught.value)
    assert message.startswith("Step 1: the loss of 4 of 4 pictures is not finite (numbers 0, 1, 2, 3)")
    assert "reward_multiplier" in message
    assert trainer.step_index == 0
    for which in ("policy", "old", "evaluation"):
        tensors = trainer.policy.tensors(which)
        assert all(torch.equal(value, before[name]) for name, value in tensors.items())


def test_a_non_finite_gradient_is_refused_before_the_update(build: Build) -> None:
    trainer = build()
    trainer.step_index = 4
    before = {name: value.clone() for name, value in trainer.policy.tensors("policy").items()}
    parameter = trainer.policy.parameters["transformer_blocks.0.attn.to_q.lora_B.default.weight"]
    parameter.register_hook(lambda grad: grad * float("inf"))  # type: ignore[no-untyped-call]
    with pytest.raises(DivergedError, match="Step 5: the gradient is not finite"):
        trainer.step()
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.tensors("policy").items())


# -- several processes ------------------------------------------------------------------------------------------------


def test_every_process_hears_of_a_non_finite_loss(build: Build) -> None:
    trainer = build()
    trainer.world = TwoProcesses({1})
    with pytest.raises(DivergedError, match=r"the loss of 1 of 4 pictures is not finite \(numbers 1\)"):
        trainer._refuse_nonfinite(set())


def test_rewards_come_from_the_real_scorer(build: Build) -> None:
    trainer = build()
    trainer.reward = make_reward(trainer.config)
    metrics = trainer.step().metrics
    assert metrics["reward/mean"] == pytest.approx(-metrics["score/kilobytes"])
    assert 0.5 < metrics["score/kilobytes"] < 10
