"""Small weights in the official files' own layouts, and the network they belong to written out a second time.

``clip_files`` writes them anywhere; ``clip_store`` is one folder with all of them, named by RAMCTL_WEIGHTS.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

#: Words that are one token each; any other word is cut into its letters.
WORDS = ("photo", "red", "blue", "circle", "square", "cat", "don", "'t", "&", "amp", "quot")
SIZE = 224


@pytest.fixture(scope="module", autouse=True)
def _other_weights() -> Iterator[None]:
    """The weights here are small and random, and lie where the official ones would; tests of the refusal unset it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAMCTL_OTHER_WEIGHTS", "allow")
        yield


class Block(nn.Module):
    """A pre-norm transformer block with open_clip's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None, quick: bool) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y) if quick else nn.functional.gelu(y))


class Blocks(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None, quick: bool) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask, quick)
        return x


class Visual(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, patch: int, dimensions: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((SIZE // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Blocks(width, heads, layers)
        self.proj = nn.Parameter(torch.zeros(width, dimensions))

    def forward(self, pixels: Tensor, quick: bool) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x, None, quick)[:, 0]) @ self.proj


class ReferenceClip(nn.Module):
    """CLIP as its papers describe it, with open_clip's names of tensors; random weights that tell inputs apart."""

    def __init__(self, seed: int, vision: tuple[int, int], text: tuple[int, int], vocabulary: int) -> None:
        """``vision`` and ``text``: width and heads."""
        super().__init__()
        dimensions, context = 32, 77
        self.quick = False
        self.visual = Visual(*vision, layers=2, patch=28, dimensions=dimensions)
        self.transformer = Blocks(*text, layers=3)
        self.token_embedding = nn.Embedding(vocabulary, text[0])
        self.positional_embedding = nn.Parameter(torch.zeros(context, text[0]))
        self.ln_final = nn.LayerNorm(text[0])
        self.text_projection = nn.Parameter(torch.zeros(text[0], dimensions))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name != "logit_scale":
                    noise = torch.randn(parameter.shape, generator=generator)
                    fan = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and "embedding" not in name else 0.3
                    parameter.copy_(noise * 1.5 * fan + (1.0 if "ln_" in name and name.endswith("weight") else 0.0))
        self.requires_grad_(False).eval()

    def image(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.visual(pixels, self.quick), dim=-1)

    def text(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask, self.quick))
        return nn.functional.normalize(x[torch.arange(len(ids)), ids.argmax(dim=1)] @ self.text_projection, dim=-1)


def vocabulary_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte vocabulary as CLIP's, with WORDS merged, start and end last."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        left = parts[0]
        for right in parts[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


@dataclass
class ClipFiles:
    """Writes entries of the weights store under ``root``; the networks they hold are kept in ``reference``."""

    root: Path
    reference: dict[str, ReferenceClip] = field(default_factory=dict)

    def tokenizer(self, name: str) -> Path:
        from transformers import CLIPTokenizer

        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary, merges = vocabulary_and_merges()
        CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
        (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}', encoding="utf-8")
        return folder

    def clip_vit_l14(self) -> Path:
        """Quick GELU, the end token by its id; the position counters of older files included."""
        self.tokenizer("clip-vit-l14")
        return self._hub_clip("clip-vit-l14", seed=1, activation="quick_gelu", end=len(vocabulary_and_merges()[0]) - 1)

    def pickscore(self) -> Path:
        """Plain GELU, and the wrong end token 2 of older configurations."""
        self.tokenizer("clip-vit-h14-tokenizer")
        return self._hub_clip("pickscore", seed=2, activation="gelu", end=2)

    def hpsv2(self) -> Path:
        """open_clip's layout in half precision, head widths 80 and 64."""
        if not (self.root / "clip-vit-h14-tokenizer" / "vocab.json").exists():
            self.tokenizer("clip-vit-h14-tokenizer")
        model = ReferenceClip(3, (160, 2), (128, 2), len(vocabulary_and_merges()[0])).half().float()
        self.reference["hpsv2.1"] = model
        file = self.root / "hpsv2.1" / "HPS_v2.1_compressed.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {key: value.half() for key, value in model.state_dict().items()}}, file)
        return file

    def aesthetic(self) -> Path:
        generator = torch.Generator().manual_seed(4)
        sizes = [32, 24, 16, 8, 4, 1]
        state = {}
        for number, (before, after) in zip((0, 2, 4, 6, 7), itertools.pairwise(sizes), strict=True):
            state[f"layers.{number}.weight"] = torch.randn(after, before, generator=generator) * before**-0.5
            state[f"layers.{number}.bias"] = torch.randn(after, generator=generator)
        file = self.root / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)
        return file

    def all(self) -> ClipFiles:
        for write in (self.clip_vit_l14, self.pickscore, self.hpsv2, self.aesthetic):
            write()
        return self

    def _hub_clip(self, name: str, seed: int, activation: str, end: int) -> Path:
        from safetensors.torch import save_file

        from ramctl.scorers.clip_checkpoints import convert_open_clip

        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = len(vocabulary_and_merges()[0])
        model = ReferenceClip(seed, (64, 2), (48, 3), vocabulary)
        model.quick = activation == "quick_gelu"
        self.reference[name] = model
        tower = {"hidden_act": activation, "projection_dim": 32}
        config: dict[str, Any] = {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "projection_dim": 32,
            "text_config": {**tower, "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3}
            | {"num_attention_heads": 3, "vocab_size": vocabulary, "eos_token_id": end, "bos_token_id": 0},
            "vision_config": {**tower, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
            | {"num_attention_heads": 2, "image_size": SIZE, "patch_size": 28},
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        state = {key: value.contiguous() for key, value in convert_open_clip(model.state_dict()).items()}
        for tower_name, count in (("text", 77), ("vision", (SIZE // 28) ** 2 + 1)):
            state[f"{tower_name}_model.embeddings.position_ids"] = torch.arange(count).unsqueeze(0)
        save_file({key: value.clone() for key, value in state.items()}, folder / "model.safetensors")
        return folder


@pytest.fixture(scope="session")
def _clip_files_once(tmp_path_factory: pytest.TempPathFactory) -> ClipFiles:
    return ClipFiles(tmp_path_factory.mktemp("clip-weights")).all()


@pytest.fixture(scope="module")
def clip_store(_clip_files_once: ClipFiles) -> Iterator[ClipFiles]:
    """A store with small weights for every CLIP scorer; RAMCTL_WEIGHTS names it. Do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAMCTL_WEIGHTS", str(_clip_files_once.root))
        yield _clip_files_once


@pytest.fixture
def clip_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClipFiles:
    """An empty store of one's own, to fill and to damage; RAMCTL_WEIGHTS names it."""
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path / "weights"))
    return ClipFiles(tmp_path / "weights")
