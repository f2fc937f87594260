"""Whether pictures drawn with 8-bit products are as good: python -m benchmarks.float8_endpoints [--preset ocr-tiny]

Draws the held-out prompts of an embedded preset with its base model, from the same noise in 16 and in 8 bits, under the
preset's evaluation protocol, and prints both scores, their paired difference with its 95 % interval over prompts, and
how far the pictures are apart. On a CPU the 8-bit numbers are multiplied in float32: the same rounding, not the speed.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from ramctl.backbones.float8 import float8_products
from ramctl.backbones.registry import load_backbone
from ramctl.engine.evaluation import evaluate
from ramctl.engine.metrics import paired_interval
from ramctl.prompts import read_prompts
from ramctl.resources import find_resource
from ramctl.settings import load_settings
from ramctl.training import make_reward


def main() -> None:
    """Draw, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="geneval-tiny")
    parser.add_argument("-n", "--images-per-prompt", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    config = load_settings(asked.preset).config
    backbone = load_backbone(config, torch.device(asked.device))
    prompts = read_prompts(find_resource(config.prompts.evaluation or ""))
    reward = make_reward(config)
    settings = config.evaluation.model_copy(update={"images_per_prompt": asked.images_per_prompt})
    sixteen = evaluate(backbone, backbone.transformer, prompts, reward, settings)
    with float8_products(backbone.transformer):
        eight = evaluate(backbone, backbone.transformer, prompts, reward, settings)
    apart = np.abs(eight.images.astype(int) - sixteen.images).mean()
    print(f"{asked.preset}: {len(sixteen.value)} pictures, {apart:.2f} of 255 apart on average")
    for name, before, after in (
        ("reward", sixteen.value, eight.value),
        ("strict", sixteen.strict, eight.strict),
    ):
        if before is None or after is None:
            continue
        one, other = (column.reshape(len(prompts), -1).mean(1) for column in (before, after))
        middle, low, high = paired_interval(one, other)
        print(f"{name}: 16 bits {one.mean():.4f}, 8 bits {other.mean():.4f}, {middle:+.4f} ({low:+.4f} to {high:+.4f})")


if __name__ == "__main__":
    main()
