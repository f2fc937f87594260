"""Stable Diffusion 3 and 3.5, and the embedded model, which has the same format."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ramctl.backbones.base import Backbone, TextEmbeddings
from ramctl.backbones.float8 import float8_products
from ramctl.backbones.parking import ParkedNetwork
from ramctl.backbones.read_sd3 import quiet, read_pipeline
from ramctl.config import LoraSection, ModelSection
from ramctl.engine.micro_batch import MicroBatch
from ramctl.engine.path import LinearPath, evenly_shifted_sigmas, shifted_sigmas
from ramctl.engine.samplers import Sampler, integrate
from ramctl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

_PREFIX = "transformer."
_PROMPTS_AT_ONCE = 64  # a T5 takes gigabytes for more
_TEXT_REMEDY = "Set model.text_encoders = parked, or lower model.max_sequence_length."
#: Pixels decoded at once: eight pictures of 512x512 take some 3 GB and already fill a GPU.
_PIXELS_AT_ONCE = 8 * 512**2
#: A card with less memory has its text encoders parked (T5 takes 9.5 GB in bfloat16).
_ROOMY_CARD = 60e9


def parks_encoders(spec: ModelSection, device: torch.device, card: int | None = None) -> bool:
    """Whether the text encoders are kept in main memory (``model.text_encoders``).

    ``card`` is the memory in bytes of a GPU that is planned for; None: that of the ``device`` itself.
    """
    if device.type != "cuda" or spec.text_encoders == "resident":
        return False
    if spec.text_encoders == "parked":
        return True
    if card is None and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(device).total_memory
    return card is not None and card < _ROOMY_CARD


class StableDiffusion3(Backbone):
    """A ``StableDiffusion3Pipeline`` taken apart: its encoders, transformer, autoencoder and time grid."""

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        spec: ModelSection,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.path = LinearPath()
        self.device = device
        self.spec = spec
        self._autocast_dtype = autocast
        self._pipeline = pipeline
        encoders = [
            part.requires_grad_(False).eval()
            for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
            if part is not None
        ]
        parked = parks_encoders(spec, device)
        for encoder in encoders:
            if parked:
                ParkedNetwork(encoder, device)
            else:
                encoder.to(device)
        pipeline.vae.requires_grad_(False).eval().to(device)
        self.transformer = pipeline.transformer.requires_grad_(False).eval().to(device)
        shape: Any = pipeline.transformer.config
        self.choose_layers(self.transformer, device)
        pipeline.vae.to(memory_format=torch.channels_last)
        side, remainder = divmod(spec.resolution, pipeline.vae_scale_factor)
        patch = shape.patch_size
        limit = shape.pos_embed_max_size * patch
        if remainder or side % patch or side > limit:
            raise ConfigError(
                f"model.resolution {spec.resolution} does not fit {spec.path!r}: it must be a multiple of "
                f"{pipeline.vae_scale_factor * patch} and at most {limit * pipeline.vae_scale_factor}."
            )
        self.latent_shape = (shape.in_channels, side, side)
        self._shift = float(pipeline.scheduler.config.shift)
        self._empty: TextEmbeddings | None = None
        self._compiled_decoder = False
        self._prompts_at_once = MicroBatch(_PROMPTS_AT_ONCE, "embedding prompts,", _TEXT_REMEDY)

    @classmethod
    def load(cls, spec: ModelSection, device: torch.device, autocast: torch.dtype | None) -> StableDiffusion3:
        """Load a diffusers folder or a hub id; see :meth:`Backbone.load`."""
        return cls(read_pipeline(spec), spec, device, autocast)

    @staticmethod
    def choose_layers(network: nn.Module, device: torch.device) -> None:
        """Leaner layers that suit the device, where there are such; else diffusers' own stay."""
        from ramctl.backbones.lean import CpuJointAttention, GpuGelu

        shape: Any = network.config
        if device.type == "cpu" and shape.qk_norm in (None, "rms_norm"):
            network.set_attn_processor(CpuJointAttention())  # type: ignore[operator]
        if device.type == "cuda":
            GpuGelu.adopt(network)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._autocast_dtype)

    def encode(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Embeddings as the pipeline computes them; without a T5, no zero tokens are appended in its place."""

        def embed(size: int) -> TextEmbeddings:
            parts = [self._encode(prompts[start : start + size]) for start in range(0, len(prompts), size)]
            return functools.reduce(TextEmbeddings.joined, parts)

        return self._prompts_at_once.run(embed)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> TextEmbeddings:
        with self._autocast(), quiet():
            tokens, _, pooled, _ = self._pipeline.encode_prompt(
                prompt=list(prompts),
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.spec.max_sequence_length if self.spec.use_t5 else 0,
            )
        return TextEmbeddings(tokens, pooled)

    @property
    def velocity_dtype(self) -> torch.dtype:
        """That of the transformer's last layer, which autocast narrows."""
        weights: torch.dtype = self.transformer.proj_out.weight.dtype  # type: ignore[union-attr,assignment]
        return self._autocast_dtype or weights

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, text: TextEmbeddings) -> Tensor:
        """v(x_t, t | text), float32; the network reads t·1000."""
        with self._autocast():
            (velocity,) = network(
                hidden_states=x_t.to(text.tokens.dtype),
                encoder_hidden_states=text.tokens,
                pooled_projections=text.pooled,
                timestep=1000 * t.to(x_t.device, torch.float32),
                return_dict=False,
            )
        result: Tensor = velocity.float()
        return result

    def sigmas(self, steps: int, sampler: Sampler = "euler") -> Tensor:
        """``euler`` has the scheduler's own shifted grid; ``dpm2m`` even times, shifted."""
        grid = shifted_sigmas if sampler == "euler" else evenly_shifted_sigmas
        return grid(steps, self._shift).float()

    def guided_steps(
        self, steps: int, guidance_scale: float, sampler: Sampler, interval: tuple[float, float]
    ) -> list[bool]:
        """For each step of :meth:`sample` whether it is guided, which takes two passes instead of one."""
        low, high = interval
        return [guidance_scale != 1.0 and low <= sigma <= high for sigma in self.sigmas(steps, sampler).tolist()[:-1]]

    @torch.no_grad()
    def sample(
        self,
        network: nn.Module,
        text: TextEmbeddings,
        x1: Tensor,
        *,
        steps: int,
        guidance_scale: float,
        negative: TextEmbeddings | None = None,
        sampler: Sampler = "euler",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """``euler`` is flow matching on the scheduler's shifted grid, as the diffusers pipeline computes it."""
        sigmas = self.sigmas(steps, sampler)
        guided = self.guided_steps(steps, guidance_scale, sampler, guidance_interval)
        turns = iter(guided)  # a solver takes one velocity a step, in order; to ask the device for σ would stop it
        if any(guided):
            if negative is None:
                self._empty = self._empty or self.encode([""])
                negative = self._empty
            both = negative.select(torch.zeros(len(text), dtype=torch.long, device=x1.device)).joined(text)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            t = sigma.expand(len(x))
            if not next(turns):
                return self.velocity(network, x, t, text)
            unconditional, conditional = self.velocity(network, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            return unconditional + guidance_scale * (conditional - unconditional)

        return integrate(velocity, x1, sigmas.to(x1.device), sampler)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """VAE decoding, clamping, and one rounding to uint8 [N, H, W, 3] on the CPU; a few pictures at a time."""
        at_once = max(1, _PIXELS_AT_ONCE // self.spec.resolution**2)
        parts = []
        for part in torch.split(latents, at_once):
            # A smaller last part is not worth the half minute that compiling for its size takes.
            as_it_is = self._compiled_decoder and len(part) < at_once
            with torch.compiler.set_stance("force_eager") if as_it_is else contextlib.nullcontext():
                parts.append(self._decode(part))
        return torch.cat(parts).cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self._pipeline.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with self._autocast():
            pictures = vae.decode(scaled.to(memory_format=torch.channels_last), return_dict=False)[0]
        unit = (pictures.float() / 2 + 0.5).clamp(0, 1)
        rounded: Tensor = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return rounded.contiguous()

    def enable_gradient_checkpointing(self, network: nn.Module) -> None:
        """As diffusers models do it: every block is recomputed in the backward pass."""
        network.enable_gradient_checkpointing()  # type: ignore[operator]

    def compile(self, network: nn.Module) -> None:
        """Block by block, and the autoencoder's decoder whole: the three kinds of block are compiled once each, not all
        twenty-four.

        A trained network gets code for each batch size, of which it sees one or two. Of a frozen one the first size
        gets its own; where a second one comes, code for any size is made.
        """
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # diffusers' own calls
        # One entry for each kind of block, batch size, and with or without gradient; the default of eight would send
        # the rest back to eager mode without a word.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        # It warns of each candidate that it does not try.
        logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.ERROR)
        for block in network.transformer_blocks:  # type: ignore[union-attr]
            # Said for the trained one: the sizes that the frozen one saw would make its code general, too.
            block.compile(dynamic=False if any(p.requires_grad for p in block.parameters()) else None)
        if not self._compiled_decoder:
            self._compiled_decoder = True
            self._pipeline.vae.decoder.compile(dynamic=False)

    def float8(self, network: nn.Module) -> contextlib.AbstractContextManager[None]:
        """The blocks' attention and feed-forward layers."""
        return float8_products(network)

    def add_lora(self, network: nn.Module, lora: LoraSection) -> None:
        """One peft adapter named ``default``; its weights are float32 and the only trainable ones."""
        from peft import LoraConfig

        from ramctl.backbones.lean import LoraLinear

        if not lora.target_modules:
            raise ConfigError("lora.target_modules names no layer. Name some, or train all weights with lora.rank = 0.")
        for target in lora.target_modules:
            named = {n: m for n, m in network.named_modules() if n == target or n.endswith("." + target)}
            others = [name for name, module in named.items() if not isinstance(module, nn.Linear)]
            if len(others) == len(named):
                raise ConfigError(f"lora.target_modules: no linear layer of {self.spec.path!r} is named …{target!r}.")
            if others:
                raise ConfigError(
                    f"lora.target_modules: {target!r} also names {others[0]}, which is no linear layer. Name the "
                    "layers more fully, e.g. attn.to_q."
                )
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(lora.target_modules),
            init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        )
        network.add_adapter(config)  # type: ignore[operator]
        LoraLinear.adopt(network)
        for name, parameter in network.named_parameters():
            trainable = "lora_" in name
            parameter.requires_grad_(trainable)
            if trainable:
                parameter.data = parameter.data.float()

    def save_set(self, folder: Path, file_name: str, tensors: Mapping[str, Tensor], lora: LoraSection) -> None:
        """LoRA: a file for ``load_lora_weights`` (alpha in its metadata). All weights: plain safetensors by name."""
        on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        if not lora.rank:
            from safetensors.torch import save_file

            save_file(on_cpu, folder / file_name, metadata={"format": "pt"})
            return
        from diffusers import StableDiffusion3Pipeline

        metadata = {
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": sorted(lora.target_modules),
        }
        StableDiffusion3Pipeline.save_lora_weights(
            folder,
            transformer_lora_layers={name.replace(".default.", "."): value for name, value in on_cpu.items()},
            weight_name=file_name,
            transformer_lora_adapter_metadata=metadata,
        )

    def read_set(self, path: Path, lora: LoraSection) -> dict[str, Tensor]:
        """The tensors of :meth:`save_set` by parameter name."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        if not lora.rank:
            return tensors
        return {
            name.removeprefix(_PREFIX)
            .replace(".lora_A.weight", ".lora_A.default.weight")
            .replace(".lora_B.weight", ".lora_B.default.weight"): value
            for name, value in tensors.items()
        }
