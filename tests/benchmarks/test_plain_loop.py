"""The plain loop that ramctl is measured against computes ramctl's step; only then do their times compare anything."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from benchmarks import ram_step, step_pair
from benchmarks.plain_loop import PlainLoop
from benchmarks.step_figures import Record, count_flops
from benchmarks.step_pair import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Agreement,
    MeasuredStep,
    Pair,
    StandInReward,
    make_pair,
)
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.settings import load_settings

SMALL = {
    "rollout.prompts_per_step": "2",
    "rollout.images_per_prompt": "3",
    "rollout.sampling_steps": "2",
    "rollout.micro_batch": "3",
    "ram.noisings_per_image": "2",
    "runtime.precision": "float32",
    "runtime.device": "cpu",
}


@pytest.fixture
def pair() -> Pair:
    """Both loops on the embedded model in float32, with three different weight sets."""
    torch.set_num_threads(1)
    config = load_settings("geneval-tiny", overrides=list(SMALL.items())).config
    backbone = StableDiffusion3.load(config.model, torch.device("cpu"), None)
    made = make_pair(config, backbone, StandInReward(0.0, config.images_per_step), plain_micro_batch=4)
    step_pair.spread_weights(made.policy)
    return made


def both(pair: Pair) -> tuple[MeasuredStep, MeasuredStep]:
    plain = step_pair.plain_step(pair)
    with step_pair.instrumented(pair.trainer) as clock:
        return step_pair.ram_step(pair, clock), plain


def test_the_two_loops_compute_the_same_loss_and_gradient(pair: Pair) -> None:
    ours, plain = both(pair)
    same = Agreement.of(ours, plain)
    assert plain.loss > 0.1
    assert same.loss <= LOSS_TOLERANCE
    assert same.gradient <= GRADIENT_TOLERANCE
    assert same.within_tolerance


def test_the_comparison_sees_old_and_trained_weights_exchanged(pair: Pair) -> None:
    tensors = pair.policy.tensors("policy"), pair.policy.tensors("old")
    plain_loop = pair.plain
    plain_loop.load(tensors[1], tensors[0])
    result = plain_loop.step()
    plain = MeasuredStep(result.loss, result.gradients, 0.0, result.seconds, None)
    with step_pair.instrumented(pair.trainer) as clock:
        same = Agreement.of(step_pair.ram_step(pair, clock), plain)
    assert same.gradient > 100 * GRADIENT_TOLERANCE
    assert not same.within_tolerance


def test_the_plain_loop_lags_its_old_weights_as_ramctl_does(pair: Pair) -> None:
    pair.trainer.step_index = 50  # a decay of one half
    both(pair)
    old, lagged = pair.plain._adapter("old"), pair.policy.sets["old"]
    moved = pair.plain.parameters
    for name in lagged:
        torch.testing.assert_close(old[name].detach(), lagged[name], rtol=0, atol=2e-3)
        assert not torch.equal(old[name], moved[name])
    assert pair.plain.step_index == pair.trainer.step_index == 51


def test_each_phase_is_timed_and_they_make_up_the_step(pair: Pair) -> None:
    ours, plain = both(pair)
    for step in (ours, plain):
        named = [step.seconds[phase] for phase in ram_step.PHASES]
        assert all(seconds >= 0 for seconds in named)
        assert 0.8 * step.seconds["total"] <= sum(named) <= step.seconds["total"]


def test_a_preset_that_the_plain_loop_cannot_follow_is_refused() -> None:
    overrides = [*SMALL.items(), ("ram.path_cost", "true"), ("ram.updates_per_step", "2")]
    config = load_settings("geneval-tiny", overrides=overrides).config
    backbone = StableDiffusion3.load(config.model, torch.device("cpu"), None)
    with pytest.raises(ValueError, match=r"does not do ram\.updates_per_step, ram\.path_cost"):
        PlainLoop(config, backbone, [], StandInReward(0.0, 1), micro_batch=1)


def test_flops_of_a_step_follow_from_the_passes(pair: Pair) -> None:
    flops = count_flops(pair.backbone, pair.policy)
    # No weight gradients but LoRA's, so the backward pass costs more than one forward pass and less than two.
    assert 2 * flops.forward < flops.forward_backward < 3 * flops.forward
    by_phase = flops.of_step(pair.config)
    assert by_phase["sample"] == 6 * 2 * 2 * flops.forward
    assert by_phase["sweep old"] == by_phase["sweep ref"] == 12 * flops.forward
    assert by_phase["train"] == 12 * flops.forward_backward
    assert all(parameter.grad is None for parameter in pair.policy.parameters.values())


def test_flops_of_a_linear_layer_are_two_per_weight_and_token(pair: Pair) -> None:
    """The counter's convention, and that attention is counted: the blocks' linear layers alone are less."""
    flops = count_flops(pair.backbone, pair.policy)
    tokens, text_tokens = 16, pair.backbone.encode([""]).tokens.shape[1]
    linear = 0
    for name, module in pair.policy.frozen.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks.0."):
            count = text_tokens if "context" in name or "add_" in name else tokens
            count = 1 if name.endswith("norm1.linear") or name.endswith("norm1_context.linear") else count
            linear += 2 * module.weight.numel() * count
    assert 6 * 0.8 * linear < flops.forward < 6 * 1.2 * linear


@pytest.mark.parametrize("fraction", ["1/5", "1/16"])
def test_a_fraction_that_leaves_no_whole_number_of_prompts_is_refused(fraction: str) -> None:
    with pytest.raises(ValueError, match="no whole number"):
        step_pair.resolve("geneval-tiny", fraction=Fraction(fraction))


def test_a_fraction_is_exact() -> None:
    assert step_pair.resolve("geneval", fraction=Fraction(1, 24)).rollout.prompts_per_step == 2


def test_figures_are_in_the_file_as_soon_as_they_are_known(tmp_path: Path) -> None:
    record = Record(tmp_path / "step.json")
    record.add("first", 1.5, "first")
    assert json.loads((tmp_path / "step.json").read_text()) == {"first": 1.5}
    record.add("second", [2], "second")
    assert json.loads((tmp_path / "step.json").read_text()) == {"first": 1.5, "second": [2]}


@pytest.mark.slow
def test_the_command_measures_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tinyworld", "--fraction", "1/12", "--repeats", "1", "--json", str(tmp_path / "step.json")]
    arguments += ["--set", "rollout.images_per_prompt", "2", "--set", "rollout.sampling_steps", "2"]
    arguments += ["--scorer", "stand-in", "--scorer-seconds", "0"]  # of two real rewards both may be equal
    assert ram_step.main(arguments) == 0
    figures = json.loads((tmp_path / "step.json").read_text())
    assert figures["agreement_float32"]["gradient"] <= GRADIENT_TOLERANCE
    seconds = figures["pair/1"]
    assert figures["ratio"]["median"] == pytest.approx(seconds["plain"]["total"] / seconds["ramctl"]["total"])
    assert "RESULT ratio=" in capsys.readouterr().out
