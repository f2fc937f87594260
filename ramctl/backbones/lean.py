"""The layers of a transformer that cost more in the libraries than they need, computed with fewer passes.

Each computes what the library's layer computes. In float32 they agree to rounding; under bfloat16 autocast both are
equally far from float32 (``benchmarks/README.md`` has the figures).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from ramctl.backbones.base import product_dtype


class LoraLinear(Linear):  # type: ignore[misc]
    """peft's LoRA layer, y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ, for the one adapter of a training run.

    peft casts the input to the adapter's float32, which autocast takes back at once, and adds the adapter's part in
    passes of its own. Here the input stays as it is and the scaled part is added by its own matrix product. Whatever
    else peft's layer can do (several adapters, merging, dropout, variants) is left to it.
    """

    @classmethod
    def adopt(cls, network: nn.Module) -> None:
        """Let every plain LoRA layer of the network be one of these; parameters and their names stay."""
        for module in network.modules():
            if type(module) is Linear:
                module.__class__ = cls

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y [..., out] in the dtype of the base layer's output, from x [..., in]."""
        adapter = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_plain(adapter):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base: Tensor = self.base_layer(x)
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)
        inner = linear(x, a).flatten(0, -2).to(base.dtype)
        scaled = (self.scaling[adapter] * b).to(base.dtype)
        return torch.addmm(base.flatten(0, -2), inner, scaled.t()).view(base.shape)

    def _is_plain(self, adapter: str) -> bool:
        return (
            adapter in self.lora_A
            and adapter not in self.lora_variant
            and isinstance(self.lora_dropout[adapter], nn.Identity)
            and self.lora_A[adapter].bias is None
            and self.lora_B[adapter].bias is None
        )


class GpuGelu(GELU):  # type: ignore[misc]
    """diffusers' gelu(x·Wᵀ + b): on a GPU and without gradient, bias and gelu are part of the matrix product.

    A kernel of its own for them reads and writes the widest activation of a block once more. cuBLAS' gelu is the tanh
    approximation, so layers with the exact one are left alone. It is applied before the product is rounded.
    """

    @classmethod
    def adopt(cls, network: nn.Module) -> None:
        """Let every tanh-gelu layer of the network be one of these; parameters and their names stay."""
        for module in network.modules():
            if type(module) is GELU and module.approximate == "tanh":
                module.__class__ = cls

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        dtype = product_dtype(hidden_states)
        if self.fits(hidden_states.device.type, dtype):
            return self.in_one(hidden_states.to(dtype))
        result: Tensor = super().forward(hidden_states)
        return result

    def fits(self, device: str, dtype: torch.dtype) -> bool:
        """Whether one call can stand for the layer; torch has no derivative of it."""
        plain = type(self.proj) is nn.Linear and not torch.is_grad_enabled()
        return plain and device == "cuda" and dtype in (torch.bfloat16, torch.float16)

    def in_one(self, x: Tensor) -> Tensor:
        """The layer in the input's dtype by one call (on a CPU torch takes the exact gelu there)."""
        weight, bias = self.proj.weight.to(x.dtype), self.proj.bias.to(x.dtype)
        result: Tensor = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
        return result.view(*x.shape[:-1], -1)


class CpuJointAttention:
    """Stable Diffusion 3's attention over picture and text tokens together, for a CPU; a processor of diffusers.

    With few tokens, plain matrix products and a softmax beat the fused attention there, most of all in the backward
    pass, and beat ``sdpa_kernel(MATH)``, which computes in float32 and looks for masked rows (there are none). Each
    norm is one call. Parts of the joint sequence are made contiguous before their projections: otherwise the linear
    layers of more than two dimensions copy their weight once for each picture.
    """

    #: More tokens than this go to the fused attention, which does not keep their products.
    plain_tokens = 128

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **unused: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attended picture tokens [N, T, D] and, where text tokens [N, S, D] are given, attended text tokens."""
        picture, text = hidden_states, encoder_hidden_states
        query = _heads(attn.to_q(picture), attn.heads, attn.norm_q)
        key = _heads(attn.to_k(picture), attn.heads, attn.norm_k)
        value = _heads(attn.to_v(picture), attn.heads)
        if text is not None:
            query = torch.cat([query, _heads(attn.add_q_proj(text), attn.heads, attn.norm_added_q)], dim=2)
            key = torch.cat([key, _heads(attn.add_k_proj(text), attn.heads, attn.norm_added_k)], dim=2)
            value = torch.cat([value, _heads(attn.add_v_proj(text), attn.heads)], dim=2)
        joint = self._attend(query, key, value).transpose(1, 2).flatten(2)
        if text is None:
            alone: Tensor = attn.to_out[1](attn.to_out[0](joint))
            return alone
        length = picture.shape[1]
        attended = attn.to_out[1](attn.to_out[0](joint[:, :length].contiguous()))
        rest = joint[:, length:].contiguous()
        return attended, rest if attn.context_pre_only else attn.to_add_out(rest)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(Q·Kᵀ/√d)·V, all [N, heads, tokens, d]."""
        if query.shape[2] > self.plain_tokens:
            return scaled_dot_product_attention(query, key, value)
        return torch.softmax((query * query.shape[-1] ** -0.5) @ key.mT, dim=-1) @ value


def _heads(x: Tensor, heads: int, norm: Any = None) -> Tensor:
    """[N, T, D] to [N, heads, T, D/heads], each head divided by its root mean square where a norm is given."""
    x = x.reshape(*x.shape[:-1], heads, -1)
    if norm is not None:
        x = rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)
    return x.transpose(1, 2)
