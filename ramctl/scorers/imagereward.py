"""Would people prefer this picture for this prompt? ImageReward v1.0 (arXiv 2304.05977), without its package.

The network: BLIP's ViT-L/16 sees the picture, BLIP's BERT-base encoder reads the prompt and attends to the picture,
five linear layers turn the encoder's first output into one number, which is normalised with the mean and the
standard deviation its authors measured: 0 is an average picture, most lie between -2 and 2.

The official package (image-reward 1.5) no longer imports on current libraries. Here the official ``ImageReward.pt`` is
loaded by renaming its keys into transformers' classes; ``tests/parity/imagereward_official.py`` runs the two side by
side. Pictures and prompts go in pairs: the package's own batch call scores one prompt against many pictures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ramctl.errors import ScorerError
from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, ImageScore, Scorer, SelfTest
from ramctl.scorers.clip_scorer import matching_test
from ramctl.scorers.devices import check_network_options, placed, scorer_device

if TYPE_CHECKING:
    import torch

    from ramctl.scorers.clip import Batches

RULE = "imagereward-1.0"
CHECKPOINT = ("imagereward", "ImageReward.pt")
VOCABULARY = ("bert-base-uncased", "vocab.txt")

#: Of the raw rewards over the authors' data (image-reward, ``ImageReward.__init__``).
REWARD_MEAN = 0.16717362830052426
REWARD_STD = 1.0333394966054072

#: Prompts are padded and truncated to this many tokens, [CLS] and [SEP] included.
TOKENS = 35

#: Width of one attention head in BLIP's two encoders; the checkpoint's shapes do not tell.
_HEAD_SIZE = 64

#: Tensors of the official file that play no part in the reward: BLIP's contrastive projections, and a counter.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|blip\.text_encoder\.embeddings\.position_ids$")

#: BLIP's names of the picture encoder's tensors and transformers'.
_VISION_NAMES = (
    (re.compile(r"^cls_token$"), "embeddings.class_embedding"),
    (re.compile(r"^pos_embed$"), "embeddings.position_embedding"),
    (re.compile(r"^patch_embed\.proj\."), "embeddings.patch_embedding."),
    (re.compile(r"^blocks\.(\d+)\.norm([12])\."), r"encoder.layers.\1.layer_norm\2."),
    (re.compile(r"^blocks\.(\d+)\.attn\.qkv\."), r"encoder.layers.\1.self_attn.qkv."),
    (re.compile(r"^blocks\.(\d+)\.attn\.proj\."), r"encoder.layers.\1.self_attn.projection."),
    (re.compile(r"^blocks\.(\d+)\.mlp\."), r"encoder.layers.\1.mlp."),
    (re.compile(r"^norm\."), "post_layernorm."),
)


@dataclass(frozen=True)
class Sizes:
    """Every size of the network, as the shapes in a checkpoint tell them."""

    side: int
    patch: int
    vision_width: int
    vision_hidden: int
    vision_layers: int
    text_width: int
    text_hidden: int
    text_layers: int
    vocabulary: int
    positions: int

    @classmethod
    def of(cls, state: Mapping[str, torch.Tensor]) -> Sizes:
        """The sizes of a checkpoint.

        Raises:
            KeyError: a tensor they are read from is absent.
        """
        patch_weight = state["blip.visual_encoder.patch_embed.proj.weight"]
        words = state["blip.text_encoder.embeddings.word_embeddings.weight"]
        patches = state["blip.visual_encoder.pos_embed"].shape[1] - 1
        text_layer = "blip.text_encoder.encoder.layer.0"
        return cls(
            side=round(patches**0.5) * patch_weight.shape[-1],
            patch=patch_weight.shape[-1],
            vision_width=patch_weight.shape[0],
            vision_hidden=state["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            vision_layers=_layers(state, "blip.visual_encoder.blocks."),
            text_width=words.shape[1],
            text_hidden=state[f"{text_layer}.intermediate.dense.weight"].shape[0],
            text_layers=_layers(state, "blip.text_encoder.encoder.layer."),
            vocabulary=words.shape[0],
            positions=state["blip.text_encoder.embeddings.position_embeddings.weight"].shape[0],
        )


def _layers(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))


def split_state(
    state: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    """The official state dict as (vision, text, head) in transformers' names, and the keys nobody knows."""
    vision: dict[str, torch.Tensor] = {}
    text: dict[str, torch.Tensor] = {}
    head: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for pattern, replacement in _VISION_NAMES:
                name = pattern.sub(replacement, name)
            vision[name] = tensor
        elif _UNUSED.match(key):
            continue
        elif key.startswith("blip.text_encoder."):
            text[key.removeprefix("blip.text_encoder.")] = tensor
        elif key.startswith("mlp.layers."):
            head[key.removeprefix("mlp.layers.")] = tensor
        else:
            unknown.append(key)
    return vision, text, head, unknown


class _Network:
    """The two encoders and the head, on one device."""

    def __init__(self, state: Mapping[str, torch.Tensor], file: Path, device: torch.device, dtype: torch.dtype) -> None:
        import torch
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        try:
            self.sizes = sizes = Sizes.of(state)
        except (KeyError, ValueError, IndexError) as error:
            raise _unusable(file, f"it lacks {error}") from None
        vision, text, head, unknown = split_state(state)
        # Everything is overwritten by the checkpoint: on "meta" the 300 million weights are not drawn first.
        with torch.device("meta"):
            self._vision = BlipVisionModel(
                BlipVisionConfig(
                    hidden_size=sizes.vision_width,
                    intermediate_size=sizes.vision_hidden,
                    num_hidden_layers=sizes.vision_layers,
                    num_attention_heads=sizes.vision_width // _HEAD_SIZE,
                    image_size=sizes.side,
                    patch_size=sizes.patch,
                    layer_norm_eps=1e-6,
                )
            )
            self._head = _linear_chain(head, file)
        text_config = BlipTextConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.text_width,
            encoder_hidden_size=sizes.vision_width,
            intermediate_size=sizes.text_hidden,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_width // _HEAD_SIZE,
            max_position_embeddings=sizes.positions,
            layer_norm_eps=1e-12,
            is_decoder=True,  # creates the attention to the picture; the text still attends both ways
        )
        # Has a buffer that no checkpoint holds, so it is built in memory; a run's own draws must not notice.
        with torch.random.fork_rng(devices=[]):
            self._text = BlipTextModel(text_config, add_pooling_layer=False)
        for module, tensors in ((self._vision, vision), (self._text, text), (self._head, head)):
            unknown += _load_exactly(module, tensors, file)
            module.eval().requires_grad_(False)
        if unknown:
            raise _unusable(file, f"it holds {len(unknown)} unknown tensors ({_some(unknown)})")
        for module, precision in ((self._vision, dtype), (self._text, dtype), (self._head, torch.float32)):
            placed(module, device, precision, "ImageReward")
        self._device = device
        self._dtype = dtype

    def rewards(self, pixels: torch.Tensor, token_ids: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """Normalised rewards of N pairs, float32 [N] on the CPU.

        Args:
            pixels: float32 [N, 3, side, side].
            token_ids: int64 [N, TOKENS]; token_mask: the same, 0 where padded.
        """
        import torch

        # A caller may be under autocast: the precision here is the one the version names.
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            patches = self._vision(pixel_values=pixels.to(self._device, self._dtype)).last_hidden_state
            # The first token stays [CLS]: unlike BLIP's matching head, ImageReward does not put [ENC] there.
            hidden = self._text(
                input_ids=token_ids.to(self._device),
                attention_mask=token_mask.to(self._device),
                encoder_hidden_states=patches,
                encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=self._device),
            ).last_hidden_state
            raw: torch.Tensor = self._head(hidden[:, 0].float())[:, 0]
            return ((raw - REWARD_MEAN) / REWARD_STD).cpu()


def _linear_chain(head: Mapping[str, torch.Tensor], file: Path) -> torch.nn.Module:
    """The head's linear layers under their official numbers; the numbers between are dropouts, idle when scoring.

    Raises:
        ScorerError: the tensors are not those of numbered linear layers.
    """
    import torch

    chain = torch.nn.Sequential()
    try:
        for number in sorted(int(key.split(".")[0]) for key in head if key.endswith(".weight")):
            rows, columns = head[f"{number}.weight"].shape
            chain.add_module(str(number), torch.nn.Linear(columns, rows))
    except (ValueError, KeyError):
        raise _unusable(file, f"its head is none of linear layers ({_some(list(head))})") from None
    return chain


def _load_exactly(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], file: Path) -> list[str]:
    """Put the tensors into the module; returns those it has no place for.

    Raises:
        ScorerError: a tensor is missing or has another shape.
    """
    try:
        result = module.load_state_dict(dict(tensors), strict=False, assign=True)
    except RuntimeError as error:  # shapes; the first line names only the class
        raise _unusable(file, str(error).splitlines()[-1].strip()) from None
    if result.missing_keys:
        raise _unusable(file, f"it lacks {len(result.missing_keys)} tensors ({_some(result.missing_keys)})")
    return list(result.unexpected_keys)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")


def _unusable(file: Path, why: str) -> ScorerError:
    return ScorerError(
        f"{file} is not ImageReward v1.0: {why}. Check it or get it again: "
        f"ramctl download-weights {CHECKPOINT[0]} --verify"
    )


def _read_state(file: Path) -> dict[str, torch.Tensor]:
    import torch

    from ramctl.scorers.clip_checkpoints import read_tensors

    state = read_tensors(file, CHECKPOINT[0])
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise _unusable(file, "it holds something other than named tensors")
    return state


def _text_problem(text: object) -> str:
    """Why a prompt cannot be encoded (half of a surrogate pair, no text at all), or ""."""
    try:
        str.encode(text)  # type: ignore[arg-type]
    except (TypeError, UnicodeError):
        return f"DataError: the text {text!r} is not valid Unicode"
    return ""


def _read_tokenizer(file: Path) -> Any:
    """BERT's uncased tokenizer with the two tokens BLIP adds after its vocabulary."""
    from transformers import BertTokenizer

    words = file.read_text(encoding="utf-8").split("\n")
    if words and not words[-1]:
        words.pop()
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    return tokenizer


class ImageRewardScorer(Scorer):
    """ImageReward v1.0: ``value`` is the normalised reward (mean 0, deviation 1 over its authors' data).

    Args:
        device: ``auto`` (this process's GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: precision of the two encoders: ``float32`` (as published), ``bfloat16`` or ``float16``; the head always
            runs in float32. The version names it.
        batch_size: pairs a time.

    Raises:
        UsageError: an option out of its range.
    """

    name = "imagereward"
    value_range = (float("-inf"), float("inf"))

    def __init__(self, device: str = "auto", dtype: str = "float32", batch_size: int = 32) -> None:
        super().__init__()
        check_network_options(self.name, dtype, batch_size)
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self._engine: tuple[_Network, Any, Batches] | None = None

    @property
    def version(self) -> str:
        """Rule, weights, vocabulary and precision.

        Raises:
            MissingDependencyError: a file is not there yet.
        """
        from ramctl.weights import fingerprint

        return (
            f"{self.name}/{RULE}/ImageReward-{fingerprint(*CHECKPOINT)}/vocab-{fingerprint(*VOCABULARY)}/{self.dtype}"
        )

    def load(self) -> None:
        """Read checkpoint and vocabulary.

        Raises:
            MissingDependencyError: one of them is not there (the command that gets it is named).
            ScorerError: the checkpoint is damaged or another model's.
            UsageError: the device is not there.
        """
        from ramctl.scorers.clip import Batches, scorer_dtype
        from ramctl.weights import weight_file

        file, vocabulary = weight_file(*CHECKPOINT), weight_file(*VOCABULARY)
        device = scorer_device(self.device)
        tokenizer = _read_tokenizer(vocabulary)
        network = _Network(_read_state(file), file, device, scorer_dtype(self.dtype))
        if len(tokenizer) != network.sizes.vocabulary:
            raise ScorerError(
                f"{vocabulary} makes {len(tokenizer)} tokens, but {file} was trained with {network.sizes.vocabulary}: "
                f"ramctl download-weights {VOCABULARY[0]} --verify"
            )
        self._engine = network, tokenizer, Batches(self.batch_size, self.name)

    def score_batch(self, images: Images, prompts: Sequence[Prompt]) -> list[ImageScore | str]:
        """Score pairs of picture and prompt; one whose prompt cannot be encoded fails alone.

        Raises:
            OutOfMemoryError: the GPU's memory does not hold half a batch either.
        """
        import torch

        from ramctl.scorers.clip import preprocess

        if self._engine is None:
            raise RuntimeError("score_batch was called before load")
        network, tokenizer, batches = self._engine
        problems = {index: reason for index, prompt in enumerate(prompts) if (reason := _text_problem(prompt.text))}
        good = [index for index in range(len(prompts)) if index not in problems]

        def rewards(part: slice) -> torch.Tensor:
            tokens = tokenizer(
                [prompts[index].text for index in good[part]],
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )
            # The crop as torchvision places it, which the official code uses.
            pixels = torch.stack([preprocess(image, network.sizes.side, crop="round") for image in images[good[part]]])
            return network.rewards(pixels, tokens["input_ids"], tokens["attention_mask"])

        values = dict(zip(good, batches.run(len(good), rewards).tolist(), strict=True)) if good else {}
        return [problems.get(index) or ImageScore(value=values[index]) for index in range(len(prompts))]

    def self_test(self) -> SelfTest:
        """Of three drawn pictures, each caption scores its own highest."""
        return matching_test(self)
