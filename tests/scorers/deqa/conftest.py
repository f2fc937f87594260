"""A tiny model folder of the hub's layout, for the real runner: the published weights are 16 GB."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

#: The published model's interface (ids and pictures in, logits out), with five numbers from the mean colour in place of
#: a network. Pictures of some plain colours make it misbehave.
CODE = """
import os
import sys
import time

import torch
from transformers import PreTrainedModel

from .configuration_stand_in import StandInConfig
from .first_helper import level_ids


class StandIn(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.levels = torch.nn.Linear(3, 5)
        self.preferential_ids_ = list(config.preferential_ids)
        print("this goes to standard output")
        os.write(1, b"and so does this")
        self.post_init()

    def forward(self, input_ids=None, images=None, use_cache=None):
        count, channels, height, width = images.shape
        assert (channels, height, width) == (3, 448, 448), images.shape
        assert input_ids.shape == (count, 28) and (input_ids == -200).sum(1).tolist() == [1] * count
        assert input_ids[0, 0] == 1 and input_ids[0, 15] == -200
        print("scoring", count)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        corners = ((images[:, :, 0, 0].float() * std + mean) * 255).round().int().tolist()
        if [255, 255, 255] in corners:
            print("the white picture broke me", file=sys.stderr)
            os._exit(3)
        if [1, 1, 1] in corners:
            raise RuntimeError("first line\\nsecond line")
        if [4, 4, 4] in corners and count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        logits = torch.zeros(count, input_ids.shape[1], 32000)
        levels = self.levels(images.mean((2, 3))).float()
        levels[[corner == [2, 2, 2] for corner in corners]] = float("nan")
        logits[:, -1, level_ids()] = levels
        return {"logits": logits}
"""

CONFIGURATION = """
from transformers import PretrainedConfig


class StandInConfig(PretrainedConfig):
    model_type = "ramctl_stand_in"

    def __init__(self, preferential_ids=(15129, 1781, 6534, 6460, 4319), **options):
        self.preferential_ids = preferential_ids
        super().__init__(**options)
"""

# A module that only another helper imports: transformers does not copy it by itself.
FIRST_HELPER = "from .second_helper import IDS\n\n\ndef level_ids():\n    return IDS\n"
SECOND_HELPER = "IDS = [15129, 1781, 6534, 6460, 4319]\n"


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "levels.weight": torch.randn(5, 3, generator=generator),
        "levels.bias": torch.randn(5, generator=generator),
    }


def build(folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["StandIn"],
        "auto_map": {
            "AutoConfig": "configuration_stand_in.StandInConfig",
            "AutoModelForCausalLM": "modeling_stand_in.StandIn",
        },
        "model_type": "ramctl_stand_in",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_stand_in.py").write_text(CODE)
    (folder / "configuration_stand_in.py").write_text(CONFIGURATION)
    (folder / "first_helper.py").write_text(FIRST_HELPER)
    (folder / "second_helper.py").write_text(SECOND_HELPER)
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in's folder, in the weights store."""
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path))
    return build(tmp_path / "deqa")


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights store for a module's tests that do not change it."""
    store = tmp_path_factory.mktemp("store")
    build(store / "deqa")
    return store
