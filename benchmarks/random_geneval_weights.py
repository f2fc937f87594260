"""Full-size random weights for ``geneval`` with its official detector, in the official files' layouts.

    RAMCTL_WEIGHTS=FOLDER python -m benchmarks.random_geneval_weights

The scorer loads them with RAMCTL_OTHER_WEIGHTS=allow set beside RAMCTL_WEIGHTS=FOLDER. What it takes of time and memory
does not depend on their values. The class head is sharpened, so that objects are found and colours asked for. Needs a
checkout: the layouts are written by the tests' own code.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from ramctl.scorers.geneval.mask2former import network_config
from ramctl.scorers.geneval.mmdet_checkpoint import ENTRY, FILE
from tests.scorers.conftest import ClipFiles, vocabulary_and_merges
from tests.scorers.geneval.conftest import mmdetection_state


def write_detector(root: Path) -> None:
    """A Mask2Former with Swin-S as MMDetection 2 saves it."""
    from transformers import Mask2FormerForUniversalSegmentation

    network = Mask2FormerForUniversalSegmentation(network_config())
    with torch.no_grad():
        network.class_predictor.weight.mul_(20)
    (root / ENTRY).mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": mmdetection_state(network.state_dict()), "meta": {}}, root / ENTRY / FILE)


def write_clip(root: Path) -> None:
    """CLIP ViT-L/14 of the hub's layout; its tokenizer knows single letters."""
    from transformers import CLIPConfig, CLIPModel

    folder = ClipFiles(root).tokenizer("clip-vit-l14")
    end = len(vocabulary_and_merges()[0]) - 1
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    shared = {"projection_dim": 768, "hidden_act": "quick_gelu"}
    tokens = {"vocab_size": 49_408, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config=text | shared | tokens,
        vision_config=vision | shared | {"patch_size": 14, "image_size": 224},
        projection_dim=768,
    )
    CLIPModel(config).save_pretrained(folder)


def main() -> None:
    """Write both into the folder that RAMCTL_WEIGHTS names."""
    if "RAMCTL_WEIGHTS" not in os.environ:
        sys.exit("Set RAMCTL_WEIGHTS to an empty folder: random weights must not lie among real ones.")
    torch.manual_seed(0)
    root = Path(os.environ["RAMCTL_WEIGHTS"])
    write_detector(root)
    write_clip(root)


if __name__ == "__main__":
    main()
