"""ImageReward's own package and ours on the same full-size random weights: prints the largest difference.

The package (image-reward 1.5) needs old libraries, so it runs in an interpreter of its own:

    python -m venv OFFICIAL
    OFFICIAL/bin/pip install torch torchvision "transformers==4.30.2" "timm==0.6.13" "fairscale==0.4.13" \
        "setuptools<81" "numpy<2" "huggingface-hub<0.26" pillow
    OFFICIAL/bin/pip install --no-deps image-reward==1.5
    python tests/parity/imagereward_official.py OFFICIAL/bin/python

The official side builds its network, draws every weight anew, saves ``ImageReward.pt`` and scores; our side loads that
file through the scorer. The vocabulary is made up (the real one is a download), of the same size and with the special
tokens in their places. Takes about 6 GB of memory and two minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

#: Size of the published file: the same tensors at the same precision come out within a few kB of it.
PUBLISHED_BYTES = 1_786_880_927
TOLERANCE = 1e-5

MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}

PROMPTS = [
    "a red circle on a white background",
    "",
    "   \n ",
    "A cat\tand\na DOG, don't they?",
    "naïve café: “curly” quotes – ½ E=mc² ﬁn",
    "日本語 and 中文 mixed",
    "emoji 💡🔆 &amp; entities",
    "[CLS] [SEP] [MASK] [DEC] [ENC] [PAD]",
    "very " * 80 + "long",
    "İstanbul ǅ ß Å \u0301 zero\u200bwidth \ufffd control\x07",
]
SHAPES = [(224, 224), (512, 512), (299, 224), (301, 517), (64, 64), (1, 1), (40, 500), (1024, 768)]


def vocabulary() -> list[str]:
    """30,522 entries: BERT's special tokens where BERT has them, letters, pieces, some words, the rest unused."""
    words = ["[PAD]"] + [f"[unused{n}]" for n in range(99)] + ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789!&'(),-./:;=?_")
    words += letters + [f"##{letter}" for letter in letters]
    words += [
        "“",
        "”",
        "–",
        "½",
        "²",
        "ß",
        "日",
        "本",
        "中",
        "文",
        "语",
        "cat",
        "dog",
        "red",
        "circle",
        "white",
        "back",
        "##ground",
    ]
    words += [
        "very",
        "long",
        "on",
        "and",
        "the",
        "ca",
        "##fe",
        "nai",
        "##ve",
        "ist",
        "##an",
        "##bul",
        "zero",
        "##width",
    ]
    return words + [f"[unused{n}]" for n in range(99, 99 + 30522 - len(words))]


def pairs(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of several shapes, saved as PNG, each with every second prompt or so: 40 pairs."""
    from PIL import Image

    rng = np.random.default_rng(0)
    found = []
    for number, (height, width) in enumerate(SHAPES):
        coarse = rng.integers(0, 256, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
        noise = rng.integers(-30, 31, (height, width, 3))
        file = folder / f"{number}.png"
        Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)).save(file)
        found += [(file, PROMPTS[(number + 2 * step) % len(PROMPTS)]) for step in range(5)]
    return found


def official(folder: Path) -> None:
    """Build the package's network, save its weights, score; runs in the interpreter with the old libraries."""
    import importlib
    import types

    import torch
    from PIL import Image

    # A CPU build of torch beside PyPI's torchvision lacks these two operators, which nothing here calls.
    library = torch.library.Library("torchvision", "DEF")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou) -> Tensor",
    ):
        try:
            library.define(schema)
        except RuntimeError:
            break
    # The package's __init__ imports its training code, and its models OpenAI's clip: neither is part of the reward.
    for name in ("clip", "ImageReward"):
        sys.modules[name] = types.ModuleType(name)
    found = next(
        Path(entry) / "ImageReward" for entry in sys.path if (Path(entry) / "ImageReward" / "utils.py").is_file()
    )
    sys.modules["ImageReward"].__path__ = [str(found)]  # type: ignore[attr-defined]

    os.chdir(folder)  # the package asks for the tokenizer "bert-base-uncased", which is now a folder here
    package = importlib.import_module("ImageReward.ImageReward")
    network = package.ImageReward(med_config="med_config.json")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise * (0.02 if "embed" in name else tensor[0].numel() ** -0.5))
            else:
                tensor.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
    torch.save(network.state_dict(), "imagereward/ImageReward.pt")
    del network
    network = importlib.import_module("ImageReward.utils").load(
        str(folder / "imagereward" / "ImageReward.pt"), device="cpu", med_config="med_config.json"
    )
    jobs = json.loads(Path("pairs.json").read_text())
    with torch.no_grad():
        values = [network.score(prompt, Image.open(file)) for file, prompt in jobs]
    Path("official.json").write_text(json.dumps(values))


def ours(jobs: list[tuple[Path, str]], batch_size: int) -> list[float]:
    """The scorer's values, pictures of one shape in one call."""
    from PIL import Image

    from ramctl.prompts import Prompt
    from ramctl.scorers.imagereward import ImageRewardScorer

    scorer = ImageRewardScorer(device="cpu", batch_size=batch_size)
    values = []
    for start in range(0, len(jobs), 5):
        group = jobs[start : start + 5]
        images = np.stack([np.asarray(Image.open(file)) for file, _ in group])
        values += scorer.score(images, [Prompt(prompt) for _, prompt in group]).value.tolist()
    return values


def main(python: str) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("imagereward", "bert-base-uncased"):
            (folder / part).mkdir()
        (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
        (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
        jobs = pairs(folder)
        (folder / "pairs.json").write_text(json.dumps([[str(file), prompt] for file, prompt in jobs]))
        subprocess.run([python, __file__, "--official", name], check=True)
        expected = np.array(json.loads((folder / "official.json").read_text()))
        size = (folder / "imagereward" / "ImageReward.pt").stat().st_size
        os.environ["RAMCTL_WEIGHTS"] = name
        os.environ["RAMCTL_OTHER_WEIGHTS"] = "allow"  # random ones
        singly, batched = np.array(ours(jobs, 1)), np.array(ours(jobs, 5))
    print(f"RESULT pairs={len(jobs)}")
    print(f"RESULT official_spread={expected.std():.4f}")
    print(f"RESULT max_difference_batch_1={np.abs(singly - expected).max():.3g}")
    print(f"RESULT max_difference_batch_5={np.abs(batched - expected).max():.3g}")
    print(f"RESULT checkpoint_bytes={size} (published {PUBLISHED_BYTES}, {size - PUBLISHED_BYTES:+d})")
    worst = int(np.abs(singly - expected).argmax())
    print(f"worst: {jobs[worst][0].name} {jobs[worst][1]!r}: {expected[worst]} and {singly[worst]}", file=sys.stderr)
    return 0 if max(np.abs(singly - expected).max(), np.abs(batched - expected).max()) < TOLERANCE else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--official"]:
        official(Path(sys.argv[2]))
    elif len(sys.argv) == 2:
        sys.exit(main(sys.argv[1]))
    else:
        sys.exit(f"usage: {sys.argv[0]} PYTHON-WITH-IMAGE-REWARD")
