"""How much memory a run's networks and passes take, without reading a weight.

The networks are built from the model folder's configurations on torch's meta device. The training code itself then runs
on tensors that have shapes and dtypes but no data, while the bytes alive at any moment are counted. What is counted is
therefore what that code allocates: autocast copies, LoRA branches, what autograd keeps, guidance's doubled batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ramctl.backbones.base import TextEmbeddings
from ramctl.backbones.read_sd3 import DTYPES, quiet, quiet_import
from ramctl.backbones.sd3 import StableDiffusion3
from ramctl.config import Config, ModelSection
from ramctl.engine.objective import regression_loss
from ramctl.engine.policy import Policy

#: What compiled blocks keep of a pass, of what the same blocks keep that are not: measured on Stable Diffusion 3.5
#: Medium (``benchmarks/README.md``), with gradient and without.
_COMPILED_TRAINING, _COMPILED_FORWARD = 0.64, 0.69
#: Tokens of a CLIP tokenizer that does not say how many.
_CLIP_TOKENS = 77


@dataclass(frozen=True)
class TextShape:
    """What the transformer reads of one prompt: ``tokens`` vectors of ``width`` and one of ``pooled``."""

    tokens: int
    width: int
    pooled: int

    def empty(self, prompts: int, dtype: torch.dtype, device: torch.device) -> TextEmbeddings:
        """Embeddings of that shape: tokens [N, T, D], pooled [N, P]."""
        return TextEmbeddings(
            torch.zeros(prompts, self.tokens, self.width, dtype=dtype, device=device),
            torch.zeros(prompts, self.pooled, dtype=dtype, device=device),
        )


@dataclass(frozen=True)
class Skeleton:
    """A run's networks and weight sets without data, on the meta device."""

    backbone: StableDiffusion3
    policy: Policy
    text: TextShape
    encoders: tuple[nn.Module, ...]
    vae: nn.Module


@dataclass(frozen=True)
class PassBytes:
    """Most bytes alive during one pass of each phase, at its micro-batch, beyond what is resident."""

    sampling: int
    decoding: int
    sweep: int
    training: int


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build_skeleton(folder: Path, config: Config, tokens: int | None) -> Skeleton:
    """The networks of a Stable Diffusion 3 folder and the run's weight sets, on the meta device.

    Args:
        folder: a diffusers folder; only its JSON files are read.
        config: the run's configuration.
        tokens: tokens of the CLIP tokenizers, None where they do not say.

    Raises:
        ConfigError: the resolution does not fit the model, or a LoRA target names no layer.
        OSError, ValueError, KeyError, TypeError: a configuration file is absent or no such model's.
    """
    with quiet_import():
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
        from diffusers import StableDiffusion3Pipeline as Pipeline
        from transformers import CLIPTextModelWithProjection as Clip
        from transformers import T5EncoderModel as T5

    dtype = DTYPES[config.model.dtype]

    def diffusers_part(kind: Any, name: str) -> nn.Module:
        part: nn.Module = kind.from_config(kind.load_config(folder / name))
        return nn.Module.to(part, dtype)

    def transformers_part(kind: Any, name: str) -> nn.Module:
        part: nn.Module = kind(kind.config_class.from_pretrained(folder / name))
        return nn.Module.to(part, dtype)

    with quiet(), torch.device("meta"):
        encoders = [transformers_part(Clip, "text_encoder"), transformers_part(Clip, "text_encoder_2")]
        if config.model.use_t5:
            encoders.append(transformers_part(T5, "text_encoder_3"))
        vae = diffusers_part(AutoencoderKL, "vae")
        transformer = diffusers_part(SD3Transformer2DModel, "transformer")
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        pipeline = Pipeline(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=encoders[0],
            tokenizer=None,
            text_encoder_2=encoders[1],
            tokenizer_2=None,
            text_encoder_3=encoders[2] if config.model.use_t5 else None,
            tokenizer_3=None,
        )
        text = _text_shape(transformer, config.model, tokens)
        autocast = torch.bfloat16 if config.runtime.precision == "bfloat16" else None
        backbone = StableDiffusion3(pipeline, config.model, torch.device("meta"), autocast)
        policy = Policy(backbone, config.lora, seed=0)
    return Skeleton(backbone, policy, text, tuple(encoders), vae)


def _text_shape(transformer: nn.Module, spec: ModelSection, tokens: int | None) -> TextShape:
    config: Any = transformer.config
    clip = tokens or _CLIP_TOKENS
    total = clip + (spec.max_sequence_length if spec.use_t5 else 0)
    return TextShape(total, config.joint_attention_dim, config.pooled_projection_dim)


def trace_passes(skeleton: Skeleton, config: Config, device: torch.device, batches: Mapping[str, int]) -> PassBytes:
    """Run one pass of each phase without data and count the bytes it keeps alive at most.

    Args:
        skeleton: the networks; they are given data-less tensors of ``device`` in place of meta ones.
        config: the run's configuration.
        device: whose kernels and autocast rules are followed; the CPU's where there is no such device. Code compiled
            for a GPU is not traced; a measured share stands for what it saves.
        batches: micro-batch of ``sampling``, ``sweep`` and ``training``.
    """
    backbone, policy = skeleton.backbone, skeleton.policy
    for network in (policy.live, policy.frozen):
        backbone.choose_layers(network, device)
    compiled = config.runtime.compile and device.type == "cuda"
    forward, training = (_COMPILED_FORWARD, _COMPILED_TRAINING) if compiled else (1.0, 1.0)
    rules: AbstractContextManager[None] = nullcontext()
    if device.type == "cuda" and not torch.cuda.is_available():
        device, rules = torch.device("cpu"), _norms_in_float32()
    dtype = DTYPES[config.model.dtype]
    if config.train.gradient_checkpointing:
        policy.live.enable_gradient_checkpointing()  # type: ignore[operator]
    backbone.device = device
    with FakeTensorMode(allow_non_fake_inputs=True), rules:
        for network in (policy.live, policy.frozen, skeleton.vae):
            _replace_tensors(network, device)

        def inputs(count: int) -> tuple[Tensor, Tensor, TextEmbeddings]:
            latents = torch.zeros(count, *backbone.latent_shape, device=device)
            return latents, torch.zeros(count, device=device), skeleton.text.empty(count, dtype, device)

        def predict(count: int) -> int:
            arguments = inputs(count)
            with torch.no_grad():
                return peak_bytes(lambda: backbone.velocity(policy.frozen, *arguments))

        def regress(count: int) -> None:
            latents, _, _ = arguments = inputs(count)
            velocity = backbone.velocity(policy.live, *arguments)
            regression_loss(velocity, torch.zeros_like(latents)).sum().backward()  # type: ignore[no-untyped-call]

        def decode(count: int) -> int:
            latents, _, _ = inputs(count)
            return peak_bytes(lambda: backbone.decode(latents))

        guided = 2 if config.rollout.guidance_scale != 1.0 else 1
        return PassBytes(
            sampling=round(forward * predict(guided * batches["sampling"])),
            decoding=decode(batches["sampling"]),
            sweep=round(forward * predict(batches["sweep"])),
            training=round(training * peak_bytes(lambda: regress(batches["training"]))),
        )


@contextmanager
def _norms_in_float32() -> Iterator[None]:
    """Layer norms as autocast has them on a GPU, in float32 whatever goes in; on a CPU it leaves them alone.

    Where autocast is off, so is this.
    """
    layer_norm = functional.layer_norm

    def widened(x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        wide = x.float() if torch.is_autocast_enabled(x.device.type) else x
        return layer_norm(wide, *arguments, **keywords)

    functional.layer_norm = widened  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.layer_norm = layer_norm


def _replace_tensors(network: nn.Module, device: torch.device) -> None:
    """Tensors of the surrounding fake mode in place of a network's meta ones, with gradients for the trained ones.

    ``Module.to_empty`` cannot do this: torch refuses to swap a parameter for a fake one.
    """
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                replaced = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                if replaced.requires_grad:
                    # Gradients live from one micro-batch to the next, so they count as resident.
                    replaced.grad = torch.zeros_like(empty)
                module._parameters[name] = replaced
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of new tensors alive at one moment while ``work`` runs; what existed before is not counted."""
    live = _LiveBytes()
    with live:
        work()
    return live.peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make, until they die."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs), new=False)
        result = func(*args, **kwargs)
        self._see(result, new=True)
        return result

    def _see(self, tree: Any, *, new: bool) -> None:
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            # An argument never seen before existed before the work began.
            size = storage.nbytes() if new else 0
            self._known.add(key)
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size
