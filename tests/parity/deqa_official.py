"""mPLUG-Owl2's published code and our runner on the same tiny random weights: prints the largest difference.

DeQA-Score's code on the model hub is that of Q-Align, which PyPI's pyiqa carries. So, where the hub is out of reach:

    python -m ramctl.scorers.deqa.environment DEQA
    pip download --no-deps pyiqa==0.1.15
    python tests/parity/deqa_official.py DEQA/bin/python pyiqa-0.1.15-py3-none-any.whl

In place of the wheel, the folder of ``ramctl download-weights deqa`` (its ``*.py`` files) serves too. The official side
builds a small network of the full structure (448 pixels, 1025 patches, 64 queries, two-way layers), draws its weights,
saves a folder of the hub's layout and calls the model's own ``score``; ours loads that folder through the scorer. The
tokenizer is made up from the pieces that the fixed prompt and the five level words consist of, at LLaMA-2's ids.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

#: The official code takes pictures with one or three rows for channels-first ones, and fails.
SHAPES = [(448, 448), (512, 512), (64, 64), (301, 517), (500, 40), (2, 2)]

#: Pieces of LLaMA-2's tokenizer, at its ids.
PIECES = {
    3148: "▁US", 1001: "ER", 29901: ":", 1128: "▁How", 723: "▁would", 366: "▁you", 6554: "▁rate", 278: "▁the",
    11029: "▁quality", 310: "▁of", 445: "▁this", 1967: "▁image", 29973: "?", 29871: "▁", 22933: "ASS", 9047: "IST",
    13566: "ANT", 450: "▁The", 338: "▁is", 15129: "▁excellent", 1781: "▁good", 6534: "▁fair", 6460: "▁poor",
    4319: "▁bad",
}  # fmt: skip

VISION = {
    "hidden_size": 64, "intermediate_size": 128, "projection_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_channels": 3, "image_size": 448, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0, "use_flash_attn": False, "model_type": "mplug_owl_vision_model",
}  # fmt: skip
ABSTRACTOR = {
    "hidden_size": 64, "num_learnable_queries": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-6, "encoder_hidden_size": 64,
    "grid_size": 32, "model_type": "mplug_owl_visual_abstract",
}  # fmt: skip


def pictures() -> list[np.ndarray]:
    """Two noisy pictures uint8 [2, H, W, 3] of each shape."""
    rng = np.random.default_rng(0)
    found = []
    for height, width in SHAPES:
        coarse = rng.integers(0, 256, (2, max(1, height // 32), max(1, width // 32), 3), dtype=np.uint8)
        rows = np.arange(height) * coarse.shape[1] // height
        columns = np.arange(width) * coarse.shape[2] // width
        found.append(coarse[:, rows][:, :, columns])
    return found


def save_tokenizer(folder: Path) -> None:
    """``tokenizer.model`` and its configuration: a unigram model whose pieces have LLaMA-2's ids."""
    os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
    from transformers.utils import sentencepiece_model_pb2_new as pb

    model = pb.ModelProto()
    for number in range(32000):
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = f"<unused{number}>", -1000.0, 5
        if number < 3:
            piece.piece, piece.type = ("<unk>", "<s>", "</s>")[number], (2, 3, 3)[number]
        elif number < 259:
            piece.piece, piece.type = f"<0x{number - 3:02X}>", 6
        elif number in PIECES:
            piece.piece, piece.score, piece.type = PIECES[number], -1.0, 1
    model.trainer_spec.model_type = 1
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def official(folder: Path) -> None:
    """Build, save and score with the published code; runs in DeQA's environment."""
    import importlib
    import types

    import torch
    import transformers
    from PIL import Image

    save_tokenizer(folder)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 448},
        crop_size={"height": 448, "width": 448},
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    processor.save_pretrained(folder)

    def local(original):  # type: ignore[no-untyped-def]
        return classmethod(lambda cls, name, *rest, **options: original.__func__(cls, str(folder), *rest, **options))

    for kind in (transformers.AutoTokenizer, transformers.LlamaTokenizer, transformers.CLIPImageProcessor):
        kind.from_pretrained = local(kind.from_pretrained)

    package = types.ModuleType("published")
    package.__path__ = [str(folder)]
    sys.modules["published"] = package
    module = importlib.import_module("published." + model_module(folder))
    config = importlib.import_module("published.configuration_mplug_owl2").MPLUGOwl2Config(
        vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, visual_config={"visual_model": VISION, "visual_abstractor": ABSTRACTOR},
    )  # fmt: skip
    config._attn_implementation = "eager"
    config._name_or_path = str(folder)
    network = module.MPLUGOwl2LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1 and "pos_embed" not in name:
                tensor.copy_(noise * (1.0 if "embed" in name else 1.5 * tensor[0].numel() ** -0.5))
            elif tensor.ndim == 1:
                tensor.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
    network = network.half().eval()
    network.config.auto_map = {
        "AutoConfig": "configuration_mplug_owl2.MPLUGOwl2Config",
        "AutoModelForCausalLM": f"{model_module(folder)}.MPLUGOwl2LlamaForCausalLM",
    }
    network.save_pretrained(folder, safe_serialization=True)

    scores, exact = [], []
    for number in range(len(SHAPES)):
        images = [Image.open(folder / f"{number}-{n}.png") for n in range(2)]
        scores += network.score(images).tolist()
        exact += expectations(module, network, images)
    (folder / "official.json").write_text(json.dumps({"score": scores, "exact": exact}))


def expectations(module, network, images) -> list[float]:  # type: ignore[no-untyped-def]
    """``score``'s own steps, the last one (softmax and mean of five numbers) in float32 in place of float16."""
    import torch

    prompt = "USER: How would you rate the quality of this image?\n<|image|>\nASSISTANT: The quality of the image is"
    colour = tuple(int(mean * 255) for mean in network.image_processor.image_mean)
    squares = [module.expand2square(image, colour) for image in images]
    pixels = network.image_processor.preprocess(squares, return_tensors="pt")["pixel_values"].half()
    ids = module.tokenizer_image_token(prompt, network.tokenizer, -200, return_tensors="pt")
    with torch.inference_mode():
        logits = network(input_ids=ids[None].repeat(len(images), 1), images=pixels)["logits"]
    levels = torch.softmax(logits[:, -1, network.preferential_ids_].float(), -1).double()
    return (levels @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)).tolist()


def model_module(folder: Path) -> str:
    """The module with the model class: the hub's repository names it otherwise than the package."""
    hub = "modeling_mplug_owl2_huggingface"
    return hub if (folder / f"{hub}.py").is_file() else "modeling_mplug_owl2"


def ours(python: str, batch_size: int) -> list[float]:
    """The scorer's scores on the folder the official side has saved."""
    from ramctl.prompts import Prompt
    from ramctl.scorers.deqa.scorer import DeqaScorer

    scorer = DeqaScorer(python=python, device="cpu", batch_size=batch_size)
    try:
        found = [scorer.score(images, [Prompt("")] * len(images)) for images in pictures()]
    finally:
        scorer.close()
    for scores in found:
        assert not scores.failed.any(), scores.errors
    return [float(score) for scores in found for score in scores.details["score"]]


def main(python: str, code: str) -> int:
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "deqa"
        folder.mkdir()
        if code.endswith(".whl"):
            with zipfile.ZipFile(code) as wheel:
                for member in wheel.namelist():
                    if member.startswith("pyiqa/archs/q_align/") and member.endswith(".py"):
                        (folder / Path(member).name).write_bytes(wheel.read(member))
        else:
            for file in Path(code).glob("*.py"):
                shutil.copy(file, folder)
        for number, batch in enumerate(pictures()):
            for n, picture in enumerate(batch):
                Image.fromarray(picture).save(folder / f"{number}-{n}.png")
        subprocess.run([python, __file__, "--official", str(folder)], check=True)
        official_values = json.loads((folder / "official.json").read_text())
        os.environ["RAMCTL_WEIGHTS"] = name
        singly, pairs = np.array(ours(python, 1)), np.array(ours(python, 2))
    score, exact = np.array(official_values["score"]), np.array(official_values["exact"])
    print(f"RESULT pictures={len(score)}")
    print(f"RESULT official_spread={exact.std():.4f}")
    print(f"RESULT max_difference_from_score={np.abs(pairs - score).max():.3g} (score rounds to float16)")
    print(f"RESULT max_difference_unrounded_batch_2={np.abs(pairs - exact).max():.3g}")
    print(f"RESULT max_difference_unrounded_batch_1={np.abs(singly - exact).max():.3g}")
    return 0 if np.abs(pairs - exact).max() < 1e-6 and np.abs(pairs - score).max() < 5e-3 else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--official"]:
        official(Path(sys.argv[2]))
    elif len(sys.argv) == 3:
        sys.exit(main(*sys.argv[1:]))
    else:
        sys.exit(f"usage: {sys.argv[0]} DEQA-PYTHON CODE-FOLDER-OR-PYIQA-WHEEL")
