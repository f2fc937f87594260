"""Matrix products of a frozen transformer in 8 bits, for drawing pictures that are then judged as they are.

Weights are scaled by output row and activations by token, so that the largest magnitude of each is float8's largest;
products are summed in float32. Velocities that enter a target are never computed this way: their errors would be
multiplied by the reward multiplier and the advantage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ramctl.backbones.base import product_dtype

#: e4m3: four bits of exponent, three of mantissa. A quotient that rounding leaves a hair above it still rounds down.
_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
#: The product wants sizes in whole blocks.
_BLOCK = 16
#: Compute capability of the first GPUs with such products (Ada; then Hopper, Blackwell).
_CAPABILITY = (8, 9)


def has_float8_products(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit numbers faster than 16-bit ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


@contextlib.contextmanager
def float8_products(network: nn.Module) -> Iterator[None]:
    """Inside, the attention and feed-forward layers of the network's blocks multiply in 8 bits.

    The 8-bit copies of the weights (half the size of the blocks in bfloat16) are made on entry, from the weights as
    they are then, and thrown away on exit. The modulation layers and all outside the blocks stay as they are.

    Args:
        network: a transformer of diffusers with ``transformer_blocks``, used without gradient inside.
    """
    lent: list[nn.Linear] = []
    try:
        for layer in float8_layers(network):
            weight, scale = quantized(layer.weight.detach())
            layer.register_buffer("weight_float8", weight, persistent=False)
            layer.register_buffer("weight_scale", scale.t().contiguous(), persistent=False)
            turn_into(layer, Float8Linear)
            lent.append(layer)
        yield
    finally:
        for layer in lent:
            turn_into(layer, nn.Linear)
            del layer.weight_float8, layer.weight_scale


def turn_into(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of a layer where compiled code notices it.

    After some passes, compiled code looks at a module only when one of its attributes has been set (torch 2.11 on
    Python 3.12: with the class alone changed, it went on as the other class and said nothing).
    """
    layer.__class__ = kind
    layer.kind = kind.__name__  # type: ignore[assignment]


def float8_layers(network: nn.Module) -> list[nn.Linear]:
    """The layers that :func:`float8_products` changes."""
    named = network.transformer_blocks.named_modules()  # type: ignore[union-attr]
    return [m for name, m in named if type(m) is nn.Linear and ("attn" in name or "ff" in name) and _fits(m)]


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % _BLOCK == 0 and layer.out_features % _BLOCK == 0


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float8 [n, k] and float32 scales [n, 1] with rows ≈ float8 · scale; a row of zeros gets a harmless scale."""
    largest = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-12)
    return (rows.float() * (_LARGEST / largest)).to(_FLOAT8), largest / _LARGEST


class Float8Linear(nn.Linear):
    """y = x·Wᵀ + b from 8-bit x and W, while :func:`float8_products` lends them."""

    weight_float8: Tensor
    weight_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., out] in autocast's dtype (else the input's) from [..., in]."""
        dtype = product_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        rows, scale = quantized(x.flatten(0, -2))
        product = _product(rows, scale, self.weight_float8, self.weight_scale, bias, dtype)
        return product.view(*x.shape[:-1], -1)


def _product(
    rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(rows · scale) · (weight · weight_scaleᵀ)ᵀ + bias, [n, out]; off a GPU the same numbers multiply in float32."""
    if rows.is_cuda:
        return torch._scaled_mm(
            rows, weight.t(), scale_a=scale, scale_b=weight_scale, bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    with torch.autocast(rows.device.type, enabled=False):
        wide = (rows.float() @ weight.float().t()) * scale * weight_scale
    return (wide if bias is None else wide + bias.float()).to(dtype)
