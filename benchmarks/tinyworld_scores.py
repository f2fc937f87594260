"""Scores of the embedded model by prompt kind and guidance scale: python benchmarks/tinyworld_scores.py

Prints the Markdown tables of models/tinyworld/README.md: the held-out prompts of the two presets, one picture each,
under each preset's evaluation protocol but for the guidance scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ramctl.backbones.registry import load_backbone
from ramctl.engine.evaluation import evaluate
from ramctl.engine.metrics import interval, mean_by_tag
from ramctl.prompts import read_prompts
from ramctl.resources import find_resource
from ramctl.settings import load_settings
from ramctl.training import make_reward


def table(preset: str, scales: Sequence[float]) -> list[str]:
    """Markdown rows for one preset: a column per guidance scale."""
    config = load_settings(preset).config
    backbone = load_backbone(config, torch.device("cpu"))
    prompts = read_prompts(find_resource(config.prompts.evaluation or ""))
    reward = make_reward(config)
    columns: list[dict[str, str]] = []
    for scale in scales:
        settings = config.evaluation.model_copy(update={"guidance_scale": scale})
        result = evaluate(backbone, backbone.transformer, prompts, reward, settings)
        mean, low, high = interval(result.value)
        column = {"reward": f"{mean:.3f} [{low:.3f}, {high:.3f}]"}
        if result.strict is not None:
            mean, low, high = interval(result.strict)
            column["strict"] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
            if len({prompt.tag for prompt in result.prompts}) > 1:
                by_tag = mean_by_tag(result.strict, result.prompts)
                column.update({f"strict, {tag}": f"{value:.2f}" for tag, value in by_tag.items()})
        if "official" in result.details:
            column["official"] = f"{result.details['official'].mean():.3f}"
        columns.append(column)
    rows = [f"| {preset} | " + " | ".join(f"guidance {scale:g}" for scale in scales) + " |"]
    rows.append("|---|" + "---|" * len(scales))
    rows += [f"| {name} | " + " | ".join(column[name] for column in columns) + " |" for name in columns[0]]
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Scores of the embedded model.")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.5])
    for preset in ("geneval-tiny", "ocr-tiny"):
        print("\n".join(table(preset, parser.parse_args().scales)), end="\n\n")


if __name__ == "__main__":
    main()
