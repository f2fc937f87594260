"""The CLIP scorers beside the official code on the same full-size random weights.

Not collected by pytest: it needs open_clip, torchvision and hpsv2x, in an environment of its own, 12 GB of memory and
a quarter of an hour on two cores:

    nox -s parity_clip [-- tokens l14 pickscore hpsv2]

Official weights are not needed: weights are drawn at random, written in the official files' layout, and read by both.
What is compared with what:

- tokens: hpsv2x's own tokenizer and open_clip's, on odd texts and a thousand random ones.
- l14: open_clip's ViT-L-14-quickgelu with open_clip's preparation of pictures, and the aesthetic head as published
  (linear layers over numpy-normalised vectors); CLIPScore with torchvision's tensor resize.
- pickscore: transformers' CLIPModel, tokenizer and Pillow image processor, by the recipe of PickScore's model card; the
  network beside open_clip's ViT-H-14.
- hpsv2: ``hpsv2.img_score.score`` of hpsv2x itself, picture by picture.

Prints one line per comparison and exits with 1 if one is larger than its bound.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import torch
from PIL import Image

Pictures = list[Any]

PROMPTS = [
    "a photo of a red circle on a white background",
    "A “curly” sign that says &amp;quot;OPEN&amp;quot;, don’t walk",
    "🔴 E=mc² ＲＥＤ ｃａｆé 12345 " + "and a very long tail of words " * 30,
    "",
    "naïve cafe\u0301 <b>bold</b> #hash @ 50% -- ok?",
]
SHAPES = [(512, 512), (300, 477), (64, 64), (448, 222), (31, 17)]

_failures: list[str] = []


def report(what: str, official: Any, ours: Any, bound: float) -> None:
    """Print the largest difference, beside how much the official numbers themselves vary."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (official, ours))
    difference = float(np.abs(a - b).max())
    good = a.shape == b.shape and difference <= bound
    spread = float(a.max() - a.min())
    print(f"{'ok  ' if good else 'FAIL'} {what}: {difference:.1e} of values {a.min():.4f} to {a.max():.4f}", end="")
    print(f" (spread {spread:.1e}, bound {bound:.0e}, {a.size} numbers)", flush=True)
    if not good:
        _failures.append(what)


def pictures() -> Pictures:
    """Blurred noise uint8 [H, W, 3], one per shape and prompt."""
    rng = np.random.default_rng(0)
    found = []
    for index, (height, width) in enumerate(SHAPES):
        coarse = rng.integers(0, 256, (3 + 5 * index, 4 + 5 * index, 3), dtype=np.uint8)
        found.append(np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)))
    return found


def import_torchvision() -> None:
    """Let torchvision's published build import beside a CPU build of torch: two operators must have a schema."""
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_library"] = library  # its definitions go when it goes
    import torchvision  # noqa: F401


def write_tokenizer(folder: Path) -> None:
    """CLIP's real vocabulary, from open_clip's file, in the hub's layout."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    official = SimpleTokenizer()
    vocabulary = dict(official.encoder)
    vocabulary["<|startoftext|>"] = vocabulary.pop("<start_of_text>")
    vocabulary["<|endoftext|>"] = vocabulary.pop("<end_of_text>")
    merges = [pair for pair, _ in sorted(official.bpe_ranks.items(), key=lambda item: item[1]) if len(pair) == 2]
    folder.mkdir(parents=True, exist_ok=True)
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text("{}", encoding="utf-8")


def ours(name: str, images: Pictures, prompts: Sequence[str], **options: Any) -> tuple[Any, Any]:
    """Values and details of our scorer, one picture at a time since their sizes differ."""
    from ramctl.prompts import Prompt
    from ramctl.scorers.registry import create

    scorer = create(name, {"device": "cpu", **options})
    found = [scorer.score(image[None], [Prompt(text)]) for image, text in zip(images, prompts, strict=True)]
    assert not any(scores.failed.any() for scores in found), [scores.errors for scores in found]
    details = {key: [float(scores.details[key][0]) for scores in found] for key in found[0].details}
    return [float(scores.value[0]) for scores in found], details


def rows(find: Callable[[Any], torch.Tensor], items: Sequence[Any]) -> torch.Tensor:
    """``find`` on each item, its rows [1, D] made unit vectors and stacked."""
    with torch.no_grad():
        return torch.nn.functional.normalize(torch.cat([find(item) for item in items]).float(), dim=-1)


def compare_tokens(root: Path) -> None:
    """Ids of odd and random texts."""
    from hpsv2.src.open_clip import get_tokenizer
    from open_clip.tokenizer import SimpleTokenizer

    from ramctl.scorers.clip_tokens import CONTEXT, open_clip_tokenizer

    generator = random.Random(0)
    blocks = [
        (32, 127),
        (160, 384),
        (0x370, 0x530),
        (0x2000, 0x2100),
        (0x3040, 0x30FF),
        (0x4E00, 0x4F00),
        (0xFF01, 0xFF5F),
    ]
    blocks += [(0x300, 0x370), (0x1F300, 0x1F700), (0x900, 0x980), (0x600, 0x700), (0x2070, 0x20A0)]
    words = ["don't", "I'LL", "&lt;", "&#39;", "cat", " ", "\n", "'s", "2024", "<end_of_text>", "…", "”", "it’s"]

    def word() -> str:
        if generator.random() < 0.4:
            return generator.choice(words)
        low, high = generator.choice(blocks)
        letters = (chr(generator.randrange(low, high)) for _ in range(generator.randrange(1, 7)))
        # Letters newer than Python's tables are letters to some regex engines only; and the mark U+0345 is one to the
        # official pattern, which ignores case.
        return "".join(letter for letter in letters if category(letter) != "Cn" and letter != "\u0345")

    texts = [*PROMPTS, *(" ".join(word() for _ in range(generator.randrange(1, 25))) for _ in range(1000))]
    tokenise = open_clip_tokenizer("clip-vit-l14")
    found = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in enumerate(texts):
        ids = tokenise(text)
        found[row, : len(ids)] = torch.tensor(ids)
    for source, official in (("hpsv2x", get_tokenizer("ViT-H-14")), ("open_clip", SimpleTokenizer())):
        expected = official(texts)
        wrong = [index for index in range(len(texts)) if not torch.equal(expected[index], found[index])]
        for index in wrong[:5]:
            print(f"     {texts[index]!r}")
        report(f"tokens beside {source}, texts that differ", [0.0], [float(len(wrong))], 0)


def compare_l14(root: Path) -> None:
    """CLIP ViT-L/14 and what stands on it."""
    from ramctl.scorers.clip import clip_vit_l14, preprocess

    images = pictures()
    # The hub's tokenizer does not mend text as open_clip's does: here the texts need no mending.
    prompts = [
        "a photo of a red circle on a white background",
        "a sign that says OPEN, don't walk",
        "🔴 E=mc² " + "and a very long tail of words " * 30,
        "",
        "naïve <b>bold</b> #hash @ 50% -- ok?",
    ]
    official = official_l14(root, images, prompts)
    gc.collect()
    encoder = clip_vit_l14("cpu")
    pixels = [preprocess(image, crop="round")[None] for image in images]
    vectors, texts = official["picture vectors"], official["text vectors"]
    report("ViT-L/14 picture vectors", vectors, rows(encoder.image_features, pixels), 2e-6)
    report("ViT-L/14 text vectors", texts, encoder.text_features(prompts), 2e-6)
    report("aesthetic", official["ratings"], ours("aesthetic", images, prompts)[0], 2e-5)
    cosines = (official["squeezed"] * texts).sum(1)
    report("clipscore, flow_grpo", cosines, ours("clipscore", images, prompts)[0], 2e-6)
    cosines = (vectors * texts).sum(1)
    weighed = 2.5 * cosines.clamp(min=0)
    report("clipscore, hessel", weighed, ours("clipscore", images, prompts, variant="hessel")[0], 5e-6)
    off = float((official["plain GELU"] - vectors).abs().max())
    print(f"     (the trap: with plain GELU the picture vectors are {off:.1e} off)")


def official_l14(root: Path, images: Pictures, prompts: Sequence[str]) -> dict[str, Any]:
    """Write ``clip-vit-l14`` and ``aesthetic``; what the official code makes of pictures and prompts."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer
    from torchvision.transforms import Compose, Normalize, Resize, ToTensor

    torch.manual_seed(1)
    model, _, prepare = open_clip.create_model_and_transforms("ViT-L-14-quickgelu", pretrained=None)
    model.eval()
    write_hub_clip(root / "clip-vit-l14", model.state_dict(), "quick_gelu", heads=(12, 16))
    mean, std = prepare.transforms[-1].mean, prepare.transforms[-1].std
    squeeze = Compose([ToTensor(), Resize((224, 224)), Normalize(mean, std)])
    tokens = SimpleTokenizer()

    def vectors(network: Any, transform: Any) -> torch.Tensor:
        return rows(lambda image: network.encode_image(transform(Image.fromarray(image))[None]), images)

    found: dict[str, Any] = {
        "picture vectors": vectors(model, prepare),
        "squeezed": vectors(model, squeeze),
        "text vectors": rows(lambda text: model.encode_text(tokens([text])), prompts),
    }
    head = write_aesthetic(root / "aesthetic")
    unit = found["picture vectors"].numpy()
    unit = unit / np.linalg.norm(unit, ord=2, axis=-1, keepdims=True)
    found["ratings"] = head(torch.from_numpy(unit))[:, 0].detach().numpy()
    # open_clip's model of the same name without the suffix, with the same weights.
    wrong, _, _ = open_clip.create_model_and_transforms("ViT-L-14", pretrained=None)
    wrong.load_state_dict(model.state_dict())
    found["plain GELU"] = vectors(wrong.eval(), prepare)
    return found


def write_hub_clip(folder: Path, state: dict[str, torch.Tensor], activation: str, heads: tuple[int, int]) -> None:
    """open_clip's tensors in the hub's layout; ``heads`` of the text and the image tower."""
    from safetensors.torch import save_file

    from ramctl.scorers.clip_checkpoints import convert_open_clip

    converted = convert_open_clip({key: value for key, value in state.items() if key != "attn_mask"})
    blocks = {
        part: len({k.split(".")[3] for k in converted if k.startswith(f"{part}_model.encoder")})
        for part in ("text", "vision")
    }
    dimensions, text_width = converted["text_projection.weight"].shape
    vision_width = converted["visual_projection.weight"].shape[1]
    shared = {"hidden_act": activation, "projection_dim": dimensions}
    config = {
        "model_type": "clip",
        "projection_dim": dimensions,
        "text_config": {**shared, "hidden_size": text_width, "intermediate_size": 4 * text_width, "eos_token_id": 2}
        | {"num_hidden_layers": blocks["text"], "num_attention_heads": heads[0]},
        "vision_config": {**shared, "hidden_size": vision_width, "intermediate_size": 4 * vision_width}
        | {"num_hidden_layers": blocks["vision"], "num_attention_heads": heads[1], "patch_size": 14},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({key: value.clone().contiguous() for key, value in converted.items()}, folder / "model.safetensors")


def write_aesthetic(folder: Path) -> Any:
    """The published head's layers, saved with its names."""
    from torch import nn

    torch.manual_seed(2)
    head = nn.Module()
    head.layers = nn.Sequential(
        *(nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
        *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter *= 3  # as far apart as the official head puts pictures
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return head.eval().layers


def compare_pickscore(root: Path) -> None:
    """By the recipe of the model card, on transformers; the network beside open_clip's, too."""
    images = pictures()
    official = official_pickscore(root, images)
    gc.collect()
    values, details = ours("pickscore", images, PROMPTS)
    report("pickscore, raw", official["raw"], details["raw"], 2e-4)
    report("pickscore, value", official["raw"] / 26, values, 1e-5)
    from ramctl.scorers.clip import preprocess
    from ramctl.scorers.registry import create

    scorer = create("pickscore", {"device": "cpu"})
    scorer.ensure_loaded()
    encoder = scorer.engine[0]  # type: ignore[attr-defined]
    vectors = rows(lambda image: encoder.image_features(preprocess(image)[None]), images)
    report("ViT-H/14 picture vectors, beside open_clip", official["open_clip"], vectors, 2e-6)


def official_pickscore(root: Path, images: Pictures) -> dict[str, Any]:
    """Write ``pickscore``; its raw scores by the model card's recipe, and open_clip's picture vectors."""
    import open_clip
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil()
    pixels = [
        processor(images=[image], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        for image in images
    ]
    torch.manual_seed(3)
    made = open_clip.create_model("ViT-H-14", pretrained=None).eval()
    write_hub_clip(root / "pickscore", made.state_dict(), "gelu", heads=(16, 16))
    found: dict[str, Any] = {"open_clip": rows(made.encode_image, pixels)}
    made = None
    gc.collect()
    model = CLIPModel.from_pretrained(root / "pickscore").eval()
    tokenizer = CLIPTokenizer.from_pretrained(root / "clip-vit-h14-tokenizer")
    vectors = rows(lambda one: model.get_image_features(pixel_values=one).pooler_output, pixels)
    inputs = tokenizer(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        texts = torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
        found["raw"] = (model.logit_scale.exp() * texts @ vectors.T).diagonal()
    return found


def compare_hpsv2(root: Path) -> None:
    """hpsv2x's own scoring function."""
    images = pictures()
    official = official_hpsv2(root, images)
    gc.collect()
    report("hpsv2", official, ours("hpsv2", images, PROMPTS)[0], 1e-6)


def official_hpsv2(root: Path, images: Pictures) -> list[float]:
    """Write ``hpsv2.1`` and score with the package, which loads that file itself."""
    from hpsv2 import img_score

    create = img_score.create_model_and_transforms
    # With its own options, but without the base model it would download.
    img_score.create_model_and_transforms = lambda name, base, **options: create(name, None, **options)
    torch.manual_seed(4)
    img_score.initialize_model()
    model = img_score.model_dict["model"]
    file = root / "hpsv2.1" / "HPS_v2.1_compressed.pt"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": {key: value.half() for key, value in model.state_dict().items()}}, file)
    try:
        return [
            float(img_score.score(Image.fromarray(image), text, cp=str(file), hps_version="v2.1")[0])
            for image, text in zip(images, PROMPTS, strict=True)
        ]
    finally:
        img_score.model_dict.clear()


COMPARISONS = {"tokens": compare_tokens, "l14": compare_l14, "pickscore": compare_pickscore, "hpsv2": compare_hpsv2}


def main(names: Sequence[str]) -> int:
    """Run the named comparisons, or all."""
    warnings.filterwarnings("ignore")
    import_torchvision()
    for name in names or COMPARISONS:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["RAMCTL_WEIGHTS"] = folder
            os.environ["RAMCTL_OTHER_WEIGHTS"] = "allow"  # random ones
            for entry in ("clip-vit-l14", "clip-vit-h14-tokenizer"):
                write_tokenizer(Path(folder) / entry)
            COMPARISONS[name](Path(folder))
        gc.collect()
    print(f"{len(_failures)} beyond their bounds" if _failures else "all within their bounds")
    return 1 if _failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
