"""Products in 8 bits: close to the others, lent for a while, seen by compiled code, and gone afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.float8 import Float8Linear, float8_layers, float8_products, has_float8_products, quantized
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.config import ModelSection
from ramctl.tinyworld.model import build_pipeline

CPU = torch.device("cpu")


def relative(one: Tensor, other: Tensor) -> float:
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def backbone() -> StableDiffusion3:
    torch.manual_seed(0)
    spec = ModelSection(path="random", resolution=64, dtype="float32", use_t5=False)
    return StableDiffusion3(build_pipeline(width=32, layers=2), spec, CPU, torch.bfloat16)


@pytest.fixture
def network(backbone: StableDiffusion3) -> nn.Module:
    return copy.deepcopy(backbone.transformer)


@torch.no_grad()
def velocity(backbone: StableDiffusion3, network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *backbone.latent_shape, generator=generator)
    tokens, pooled = torch.randn(2, 16, 256, generator=generator), torch.randn(2, 256, generator=generator)
    return backbone.velocity(network, x, torch.tensor([0.3, 0.9]), TextEmbeddings(tokens, pooled))


def test_a_row_keeps_its_largest_magnitude_and_three_bits_of_the_rest() -> None:
    rows = torch.cat([torch.randn(7, 64) * 10.0 ** torch.arange(-3, 4)[:, None], torch.zeros(1, 64)])
    numbers, scale = quantized(rows)
    back = numbers.float() * scale
    assert numbers.dtype == torch.float8_e4m3fn and scale.shape == (8, 1)
    largest = rows[:7].abs().argmax(1)
    assert torch.allclose(back[range(7), largest], rows[range(7), largest], rtol=1e-6)
    # Half a step of a mantissa of three bits; below the smallest normal number the step no longer shrinks.
    assert ((back - rows).abs() <= rows.abs() / 16 + scale * 2.0**-10).all()
    assert (back[7] == 0).all()


def test_the_largest_number_does_not_overflow_in_bfloat16_either() -> None:
    rows = (torch.rand(4096, 16) * 3 + 1e-3).bfloat16()
    numbers, _ = quantized(rows)
    assert torch.isfinite(numbers.float()).all()
    assert (numbers.float().amax(1) == 448).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_close_to_the_one_in_float32(bias: bool) -> None:
    torch.manual_seed(0)
    block = nn.Module()
    block.ff = nn.Linear(64, 32, bias=bias)
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList([block])
    x = torch.randn(3, 5, 64)
    exact = block.ff(x)
    with float8_products(network), torch.autocast("cpu", torch.bfloat16):
        assert isinstance(block.ff, Float8Linear)
        close = block.ff(x)
    assert close.shape == exact.shape and close.dtype == torch.bfloat16
    assert 1e-3 < relative(close, exact) < 0.06


def test_the_network_is_as_before_afterwards(backbone: StableDiffusion3, network: nn.Module) -> None:
    before = velocity(backbone, network)
    names = {name for name, _ in network.named_buffers()}
    with float8_products(network):
        inside = velocity(backbone, network)
    assert 0 < relative(inside, before) < 0.1
    assert torch.equal(velocity(backbone, network), before)
    assert {name for name, _ in network.named_buffers()} == names
    assert not any(isinstance(module, Float8Linear) for module in network.modules())


def test_it_ends_with_an_error_too(network: nn.Module) -> None:
    with pytest.raises(KeyboardInterrupt), float8_products(network):
        raise KeyboardInterrupt
    assert not any(isinstance(module, Float8Linear) for module in network.modules())


def test_weights_are_read_anew_each_time(backbone: StableDiffusion3, network: nn.Module) -> None:
    with float8_products(network):
        first = velocity(backbone, network)
    with torch.no_grad():
        for layer in float8_layers(network):
            layer.weight.mul_(1.5)
    with float8_products(network):
        second = velocity(backbone, network)
    assert relative(second, velocity(backbone, network)) < relative(second, first)


def test_blocks_are_changed_and_the_layers_around_them_are_not(network: nn.Module) -> None:
    inside = {id(layer) for layer in float8_layers(network)}
    named = {name: id(module) in inside for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert named["transformer_blocks.0.attn.to_q"] and named["transformer_blocks.0.ff.net.2"]
    assert not named["transformer_blocks.0.norm1.linear"] and not named["proj_out"] and not named["context_embedder"]


def test_compiled_blocks_go_with_it_to_and_fro(backbone: StableDiffusion3, network: nn.Module) -> None:
    """Each way is traced once: the second time round nothing is.

    After some passes, torch 2.11 on Python 3.12 looks at a module only when one of its attributes has been set.
    """
    torch._dynamo.reset()
    for block in network.transformer_blocks:  # type: ignore[union-attr]
        block.compile(backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]

    def both() -> tuple[Tensor, Tensor, int]:
        plain = [velocity(backbone, network) for _ in range(20)][-1]
        with float8_products(network):
            return plain, velocity(backbone, network), graphs["unique_graphs"]

    plain, eight_bits, traced = both()
    assert 1e-4 < relative(eight_bits, plain) < 0.1
    again, eight_again, traced_again = both()
    assert torch.equal(plain, again) and torch.equal(eight_bits, eight_again)
    assert traced == traced_again


def test_a_cpu_has_no_such_products() -> None:
    assert not has_float8_products(CPU)
