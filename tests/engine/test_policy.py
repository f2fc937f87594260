"""The weight sets: merged copies equal the live network, the reference never moves, only the LoRA is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.engine.policy import Policy, evaluation_decay, old_decay
from ramctl.settings import load_settings

Build = Callable[..., tuple[StableDiffusion3, Policy]]


@pytest.fixture
def build(tiny_preset: Path) -> Build:
    torch.set_num_threads(1)

    def make(*overrides: tuple[str, str], seed: int = 0) -> tuple[StableDiffusion3, Policy]:
        config = load_settings(str(tiny_preset), overrides=overrides).config
        backbone = StableDiffusion3.load(config.model, torch.device("cpu"), None)
        return backbone, Policy(backbone, config.lora, seed=seed)

    return make


def probe(backbone: StableDiffusion3) -> tuple[Tensor, Tensor, TextEmbeddings]:
    """Two noisy latents, their times and prompts."""
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(2, *backbone.latent_shape, generator=generator)
    return x_t, torch.tensor([0.2, 0.9]), backbone.encode(["a red ring", "two squares"])


def velocity(backbone: StableDiffusion3, network: nn.Module) -> Tensor:
    with torch.no_grad():
        return backbone.velocity(network, *probe(backbone))


def disturb(policy: Policy, size: float = 0.05, seed: int = 1) -> None:
    """Move the trained weights as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_the_decay_of_the_old_weights_follows_the_paper() -> None:
    assert [old_decay(k, 0.9, 0.01) for k in (0, 1, 50, 90, 200)] == pytest.approx([0, 0.01, 0.5, 0.9, 0.9])
    assert old_decay(0, 0.9, 0.01) == 0


def test_the_decay_of_the_evaluation_weights() -> None:
    assert {evaluation_decay(k, 0.9, warmup=False) for k in (0, 5, 500)} == {0.9}
    warm = [evaluation_decay(k, 0.9, warmup=True) for k in (0, 8, 79, 500)]
    assert warm == pytest.approx([0.1, 0.5, 80 / 89, 0.9])


@pytest.mark.parametrize("which", ["old", "evaluation"])
def test_the_merged_network_equals_the_live_one_with_adapters(build: Build, which: str) -> None:
    """To float32 rounding: W x + s·B(A x) against (W + s·B A) x, 1e-4 of the velocity's size."""
    backbone, policy = build(("lora.rank", "8"), ("lora.alpha", "24"))
    base = velocity(backbone, policy.network("reference"))
    disturb(policy)
    live = velocity(backbone, policy.live)
    assert (live - base).abs().max() > 0.05 * base.abs().max()
    policy.follow(which, 0.0)  # type: ignore[arg-type]
    merged = velocity(backbone, policy.network(which))  # type: ignore[arg-type]
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-4 * float(live.abs().max()))


def test_the_reference_is_the_base_model_whatever_is_trained_and_merged(build: Build, tiny_preset: Path) -> None:
    backbone, policy = build()
    spec = load_settings(str(tiny_preset)).config.model
    untouched = StableDiffusion3.load(spec, torch.device("cpu"), None)
    expected = velocity(untouched, untouched.transformer)
    assert torch.equal(velocity(backbone, policy.network("reference")), expected)
    assert torch.equal(velocity(backbone, policy.live), expected)  # an untrained LoRA changes nothing
    disturb(policy)
    policy.follow("old", 0.0)
    policy.follow("evaluation", 0.5)
    for which in ("old", "reference", "evaluation", "reference"):
        network = policy.network(which)
        assert network is policy.frozen
        assert torch.equal(velocity(backbone, network), expected) == (which == "reference")


def test_the_loaded_network_follows_its_weight_set(build: Build) -> None:
    backbone, policy = build()
    stale = velocity(backbone, policy.network("old"))
    disturb(policy)
    policy.follow("old", 0.0)
    fresh = velocity(backbone, policy.network("old"))
    assert not torch.equal(fresh, stale)
    saved = {name: value.clone() for name, value in policy.tensors("old").items()}
    disturb(policy)
    policy.follow("old", 0.0)
    policy.network("old")
    policy.load({"old": saved})
    assert torch.equal(velocity(backbone, policy.network("old")), fresh)


def test_follow_is_a_moving_average_and_an_exact_copy_at_decay_zero(build: Build) -> None:
    _, policy = build()
    start = {name: value.clone() for name, value in policy.tensors("old").items()}
    disturb(policy)
    policy.follow("evaluation", 0.75)
    for name, value in policy.tensors("policy").items():
        torch.testing.assert_close(policy.tensors("evaluation")[name], 0.75 * start[name] + 0.25 * value)
        assert torch.equal(policy.tensors("old")[name], start[name])
    policy.follow("old", 0.0)
    assert all(torch.equal(policy.tensors("old")[name], value) for name, value in policy.tensors("policy").items())
    disturb(policy)
    assert not any(torch.equal(policy.tensors("old")[name], value) for name, value in policy.tensors("policy").items())


def test_only_the_lora_gets_gradients(build: Build) -> None:
    backbone, policy = build()
    disturb(policy)
    backbone.velocity(policy.live, *probe(backbone)).square().mean().backward()  # type: ignore[no-untyped-call]
    with_gradient = {name for name, p in policy.live.named_parameters() if p.grad is not None}
    assert with_gradient == set(policy.parameters)
    assert all("lora_" in name for name in with_gradient)
    # Eight projections in each joint block; the last block has no output projection of the text.
    blocks = len(list(backbone.transformer.get_submodule("transformer_blocks").children()))
    assert len(policy.parameters) == 2 * (8 * blocks - 1)
    assert all(p.grad is None and not p.requires_grad for p in policy.frozen.parameters())


def test_the_networks_stay_in_evaluation_mode(build: Build) -> None:
    _, policy = build()
    assert not any(module.training for net in (policy.live, policy.frozen) for module in net.modules())


def test_the_seed_alone_decides_the_lora(build: Build) -> None:
    state = torch.random.get_rng_state()
    _, first = build(seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)  # other draws are not disturbed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        _, again = build(seed=5)
    _, other = build(seed=6)
    for name, value in first.tensors("policy").items():
        assert torch.equal(again.tensors("policy")[name], value)
        if "lora_B" in name:
            assert not value.any()
        else:
            assert not torch.equal(other.tensors("policy")[name], value)


@pytest.mark.parametrize("rank", ["4", "0"])
def test_trained_weights_are_float32_over_a_bfloat16_base(build: Build, rank: str) -> None:
    backbone, policy = build(("model.dtype", "bfloat16"), ("lora.rank", rank), ("precision", "bfloat16"))
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    assert {t.dtype for t in policy.tensors("old").values()} == {torch.float32}
    assert next(policy.frozen.parameters()).dtype == torch.bfloat16
    if rank != "0":
        assert velocity(backbone, policy.network("old")).isfinite().all()


def test_rank_zero_trains_every_weight(build: Build) -> None:
    backbone, policy = build(("lora.rank", "0"))
    assert set(policy.parameters) == {name for name, _ in policy.live.named_parameters()}
    base = velocity(backbone, policy.network("reference"))
    disturb(policy, size=1e-3)
    policy.follow("old", 0.0)
    live = velocity(backbone, policy.live)
    assert torch.equal(velocity(backbone, policy.network("old")), live)
    assert not torch.equal(live, base)
    assert torch.equal(velocity(backbone, policy.network("reference")), base)


def test_loading_refuses_what_does_not_fit_and_changes_nothing(build: Build) -> None:
    _, policy = build()
    name, value = next(iter(policy.tensors("policy").items()))
    before = {key: tensor.clone() for key, tensor in policy.tensors("policy").items()}
    with pytest.raises(KeyError, match="1 tensors do not match"):
        policy.load({"policy": {key: t for key, t in before.items() if key != name}})
    with pytest.raises(KeyError, match="nonsense"):
        policy.load({"policy": {**before, "nonsense": value}})
    # A LoRA of rank 1 would broadcast into any other rank.
    with pytest.raises(KeyError, match="has the shape"):
        policy.load({"policy": {key: t[:1] if "lora_A" in key else t[:, :1] for key, t in before.items()}})
    assert all(torch.equal(tensor, before[key]) for key, tensor in policy.tensors("policy").items())
