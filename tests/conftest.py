"""What several test files share: a small run on the embedded model, and a real checkpoint of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ramctl.prompts import Prompt, write_prompts
from ramctl.settings import Settings, load_settings, settings_toml
from ramctl.tinyworld.grammar import KINDS, all_scenes, scene_prompt, sign_prompt

_PRESET = """
name = "tiny-test"
description = "Two prompts, two pictures each, one noising, two sampling steps"

[model]
path = "models/tinyworld"
resolution = 64
dtype = "float32"
use_t5 = false

[lora]
rank = 4
alpha = 8.0

[prompts]
train = {train}
evaluation = {evaluation}

[reward.scorers.jpeg-compressibility]

[rollout]
prompts_per_step = 2
images_per_prompt = 2
sampling_steps = 2
guidance_scale = 1.5

[ram]
reward_multiplier = 1.0
noisings_per_image = 1

[optimizer]
lr = 2e-2

[train]
steps = 2

[evaluation]
sampling_steps = 2
guidance_scale = 1.5
ema_decay = 0.5

[tracking]
kind = "none"

[runtime]
device = "cpu"
precision = "float32"
"""


@pytest.fixture(scope="session")
def tiny_prompts() -> list[Prompt]:
    """One prompt of each GenEval kind."""
    scenes = all_scenes()
    return [scene_prompt(scenes[kind][3]) for kind in KINDS]


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory: pytest.TempPathFactory, tiny_prompts: list[Prompt]) -> Path:
    """A preset file for the smallest run: train.jsonl and test.jsonl lie beside it, signs.jsonl has two words."""
    folder = tmp_path_factory.mktemp("tiny-preset")
    files = {name: folder / f"{name}.jsonl" for name in ("train", "test", "signs")}
    write_prompts(files["train"], tiny_prompts)
    write_prompts(files["test"], tiny_prompts)
    write_prompts(files["signs"], [sign_prompt("fox"), sign_prompt("sun")])
    preset = folder / "tiny-test.toml"
    # A TOML literal string holds any path as it is.
    text = _PRESET.format(train=f"'{files['train']}'", evaluation=f"'{files['test']}'")
    preset.write_text(text, encoding="utf-8")
    return preset


@pytest.fixture(scope="session")
def tiny_settings(tiny_preset: Path) -> Settings:
    """The preset's settings."""
    return load_settings(str(tiny_preset))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_settings: Settings) -> Path:
    """A checkpoint after one real step, in a run folder with ``latest`` and ``best``; to change it, copy it."""
    return make_checkpoint(tiny_settings, tmp_path_factory.mktemp("tiny-run"))


def make_checkpoint(settings: Settings, run_folder: Path) -> Path:
    """Train one step as the settings say and save it."""
    import torch

    from ramctl.backbones.sd3 import StableDiffusion3
    from ramctl.engine.checkpoint import CheckpointStore
    from ramctl.engine.policy import Policy
    from ramctl.engine.trainer import Trainer
    from ramctl.prompts import read_prompts
    from ramctl.scorers.composite import Reward, Term
    from ramctl.scorers.registry import create

    config = settings.config
    backbone = StableDiffusion3.load(config.model, torch.device("cpu"), None)
    policy = Policy(backbone, config.lora, seed=config.train.seed)
    reward = Reward([Term(create(name, term.options)) for name, term in config.reward.scorers.items()])
    trainer = Trainer(config, backbone, policy, read_prompts(config.prompts.train), reward)
    trainer.step()
    return CheckpointStore(run_folder).save(trainer, settings_toml(settings), {}, best=True)


@pytest.fixture(scope="session")
def tiny_full_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_preset: Path) -> Path:
    """As ``tiny_checkpoint``, all weights trained (``lora.rank = 0``)."""
    settings = load_settings(str(tiny_preset), overrides=[("lora.rank", "0"), ("optimizer.lr", "1e-3")])
    return make_checkpoint(settings, tmp_path_factory.mktemp("tiny-full-run"))
