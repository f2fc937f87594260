"""The lean layers compute what the libraries' layers compute, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.activations import GELU
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from ramctl.backbones.lean import CpuJointAttention, GpuGelu, LoraLinear


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


# -- LoRA


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).tanh())
        return result


def adapted(**changes: Any) -> Any:
    """A network with LoRA whose B is not zero."""
    from peft import inject_adapter_in_model

    values = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], **changes}
    network = inject_adapter_in_model(LoraConfig(**values), Network()).requires_grad_(False)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_()
            nn.init.normal_(parameter, std=0.3)
    return network


def adopted(network: Any) -> Any:
    lean = copy.deepcopy(network)
    LoraLinear.adopt(lean)
    return lean


def outcome(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of all LoRA weights."""
    network.zero_grad()
    output = network(x)
    output.float().square().mean().backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])


def test_a_lean_lora_layer_computes_what_pefts_does() -> None:
    network, x = adapted(), torch.randn(3, 5, 12)
    lean = adopted(network)
    assert [type(module) for module in lean.modules() if isinstance(module, Linear)] == [LoraLinear] * 2
    assert [name for name, _ in lean.named_parameters()] == [name for name, _ in network.named_parameters()]
    for one, other in zip(outcome(lean, x), outcome(network, x), strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < 1e-6


def test_under_autocast_it_is_as_near_to_float32_as_pefts() -> None:
    network, x = adapted(), torch.randn(64, 5, 12)
    exact = outcome(network, x)
    with autocast():
        ours, pefts = outcome(adopted(network), x), outcome(network, x)
    assert ours[0].dtype == torch.bfloat16
    assert ours[1].dtype == torch.float32
    for one, other, reference in zip(ours, pefts, exact, strict=True):
        assert 0 < distance(one, reference) < max(1.5 * distance(other, reference), 1e-2)


def test_base_weights_of_another_type_work_without_autocast() -> None:
    network, x = adapted(), torch.randn(3, 5, 12)
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    x = x.bfloat16()
    for one, other in zip(outcome(adopted(network), x), outcome(network, x), strict=True):
        assert one.dtype == other.dtype
        assert distance(one, other) < 2e-2


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=["dropout", "dora", "bias"]
)
def test_what_it_does_not_know_is_left_to_peft(changes: dict[str, Any]) -> None:
    network, x = adapted(**changes), torch.randn(3, 5, 12)
    results = []
    for one in (adopted(network), network):
        torch.manual_seed(1)
        results.append(outcome(one, x))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_disabled_or_merged_adapter_is_left_to_peft() -> None:
    network, x = adapted(), torch.randn(3, 5, 12)
    lean = adopted(network)
    with_lora = lean(x)
    for module in lean.modules():
        if isinstance(module, LoraLinear):
            module.enable_adapters(False)
    plain = Network()
    plain.load_state_dict(
        {n.replace("base_layer.", ""): v for n, v in network.state_dict().items() if "lora_" not in n}
    )
    assert torch.equal(lean(x), plain(x))
    for module in lean.modules():
        if isinstance(module, LoraLinear):
            module.enable_adapters(True)
            module.merge()
    assert distance(lean(x), with_lora) < 1e-5


# -- attention


def attention(*, joint: bool = True, last: bool = False, norm: bool = True, **changes: Any) -> Any:
    """One attention layer of Stable Diffusion 3: 2 heads of 8."""
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0

    values: dict[str, Any] = {"query_dim": 16, "dim_head": 8, "heads": 2, "out_dim": 16, "bias": True, "eps": 1e-6}
    if joint:
        values |= {"added_kv_proj_dim": 16, "context_pre_only": last}
    layer = Attention(**values, qk_norm="rms_norm" if norm else None, processor=JointAttnProcessor2_0(), **changes)
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


def attended(layer: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """All outputs in one, and the gradient of all weights and inputs in one."""
    layer.zero_grad()
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = layer(leaves[0], encoder_hidden_states=leaves[1] if len(leaves) > 1 else None)
    flat = torch.cat([o.float().flatten() for o in (outputs if isinstance(outputs, tuple) else (outputs,))])
    flat.square().mean().backward()
    grads = [*(p.grad for p in layer.parameters()), *(x.grad for x in leaves)]
    return flat.detach(), torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("norm", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("last", [True, False], ids=["last", "inner"])
@pytest.mark.parametrize("tokens", [6, 200], ids=["few", "many"])
def test_joint_attention_computes_what_diffusers_does(tokens: int, last: bool, norm: bool) -> None:
    layer = attention(last=last, norm=norm)
    inputs = torch.randn(3, tokens, 16), torch.randn(3, 5, 16)
    theirs = attended(layer, *inputs)
    layer.set_processor(CpuJointAttention())
    for one, other in zip(attended(layer, *inputs), theirs, strict=True):
        assert one.shape == other.shape
        assert distance(one, other) < 1e-5


def test_a_layer_without_text_computes_what_diffusers_does() -> None:
    layer, x = attention(joint=False), torch.randn(3, 6, 16)
    theirs = attended(layer, x)
    layer.set_processor(CpuJointAttention())
    for one, other in zip(attended(layer, x), theirs, strict=True):
        assert distance(one, other) < 1e-5


def test_many_tokens_do_not_keep_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = CpuJointAttention()
    x = torch.randn(1, 1, processor.plain_tokens + 1, 8)
    monkeypatch.setattr(torch, "softmax", None)
    assert processor._attend(x, x, x).shape == x.shape
    with pytest.raises(TypeError):
        processor._attend(x[:, :, 1:], x[:, :, 1:], x[:, :, 1:])


def test_under_autocast_attention_is_as_near_to_float32_as_diffusers() -> None:
    layer = attention()
    inputs = torch.randn(64, 6, 16), torch.randn(64, 5, 16)
    exact = attended(layer, *inputs)
    with autocast():
        theirs = attended(layer, *inputs)
        layer.set_processor(CpuJointAttention())
        ours = attended(layer, *inputs)
    for one, other, reference in zip(ours, theirs, exact, strict=True):
        assert 0 < distance(one, reference) < 1.5 * distance(other, reference)


# -- gelu


def gelu(approximate: str = "tanh") -> Any:
    layer = GELU(48, 96, approximate=approximate)
    network = nn.Sequential(layer)
    GpuGelu.adopt(network)
    return layer


def test_gelu_in_one_call_is_the_layer() -> None:
    """On a CPU torch takes the exact gelu, which is at most 5e-4 from the tanh approximation that a GPU takes."""
    layer, x = gelu(), 3 * torch.randn(2, 5, 48)
    with torch.no_grad():
        one, plain = layer.in_one(x), GELU.forward(layer, x)
    assert type(layer) is GpuGelu
    assert one.shape == plain.shape == (2, 5, 96)
    assert (one - plain).abs().max() < 1e-3
    assert torch.allclose(one, torch.nn.functional.gelu(layer.proj(x)), atol=1e-5)


def test_gelu_in_one_call_computes_in_the_inputs_dtype() -> None:
    layer, x = gelu(), torch.randn(2, 5, 48)
    with torch.no_grad():
        assert layer.in_one(x.bfloat16()).dtype == torch.bfloat16
        assert distance(layer.in_one(x.bfloat16()), GELU.forward(layer, x)) < 0.01


def test_the_exact_gelu_is_left_alone() -> None:
    assert type(gelu("none")) is GELU


def test_one_call_stands_for_a_plain_layer_on_a_gpu_in_16_bits_without_gradient() -> None:
    layer = gelu()
    with torch.no_grad():
        assert layer.fits("cuda", torch.bfloat16) and layer.fits("cuda", torch.float16)
        assert not layer.fits("cpu", torch.bfloat16) and not layer.fits("cuda", torch.float32)
    assert not layer.fits("cuda", torch.bfloat16)
    layer.proj = nn.Sequential(layer.proj)  # as a LoRA or an 8-bit layer stands in its place
    with torch.no_grad():
        assert not layer.fits("cuda", torch.bfloat16)


def test_where_one_call_does_not_fit_it_is_the_librarys_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = gelu(), torch.randn(2, 48)
    monkeypatch.setattr(layer, "in_one", None)
    with autocast():
        layer(x).sum().backward()
        with torch.no_grad():
            assert torch.equal(layer(x), GELU.forward(layer, x))
    assert layer.proj.weight.grad is not None
