"""What a user may name as a source, what it opens to, and what is said when nothing is there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ramctl.engine.checkpoint import EVALUATION_FILE
from ramctl.errors import CheckpointError, ConfigError, MissingDependencyError, RamctlError, UsageError
from ramctl.resources import resource_dir
from ramctl.settings import Settings, load_settings
from ramctl.sources import find_source, model_section, open_source, weight_hashes

TINYWORLD = resource_dir("models") / "tinyworld"


@pytest.fixture
def run_folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    copy = tmp_path / "run"
    shutil.copytree(tiny_checkpoint.parent, copy, symlinks=True)
    return copy


def replace_in_manifest(checkpoint: Path, name: str) -> None:
    """Make a changed file the one that the manifest promises."""
    manifest = checkpoint / "manifest.json"
    content = json.loads(manifest.read_text())
    content["sha256"][name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("part", [".", "latest", "best", "step-000001"])
def test_every_way_to_name_a_checkpoint_finds_it(part: str, tiny_checkpoint: Path, tiny_settings: Settings) -> None:
    found = find_source(str(tiny_checkpoint.parent / part))
    assert found.checkpoint is not None and found.checkpoint.resolve() == tiny_checkpoint.resolve()
    assert found.config == tiny_settings.config
    assert found.label == "tiny-test-step-000001"
    assert found.evaluation.sampling_steps == 2


def test_a_pointer_written_as_text_works_like_a_link(run_folder: Path) -> None:
    (run_folder / "latest").unlink()
    (run_folder / "latest").write_text("step-000001")
    assert find_source(str(run_folder / "latest")).checkpoint == run_folder / "step-000001"


def test_the_embedded_model_takes_the_section_of_its_preset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # found from anywhere
    found = find_source("models/tinyworld")
    assert found.checkpoint is None
    assert found.model == load_settings("geneval-tiny").config.model
    assert found.label == "tinyworld"


def test_a_given_preset_of_the_model_comes_before_others() -> None:
    preset = load_settings("geneval-tiny", overrides=[("evaluation.sampling_steps", "3")]).config
    assert find_source("models/tinyworld", preset=preset).evaluation.sampling_steps == 3


def test_a_model_without_a_preset_is_read_off_its_folder(tmp_path: Path) -> None:
    copy = tmp_path / "own"
    shutil.copytree(TINYWORLD, copy)
    found = find_source(str(copy))
    assert found.config is None
    assert (found.model.resolution, found.model.use_t5) == (64, False)


def test_a_presets_model_that_is_there_in_part_is_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = tmp_path / "sd3.5-medium"
    part.mkdir()
    (part / "model_index.json").write_text("{}")
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path))
    assert find_source("models/tinyworld").config is not None


def test_a_t5_that_puts_out_something_is_used(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "own"
    shutil.copytree(TINYWORLD, copy)
    file = copy / "text_encoder_3" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.final_layer_norm.weight"].fill_(1)
    save_file(tensors, file, metadata={"format": "pt"})
    assert model_section(str(copy)).use_t5


def test_evaluation_policy_and_old_weights_and_the_base_differ(tiny_checkpoint: Path) -> None:
    name = "transformer_blocks.0.attn.to_q.weight"
    seen = {}
    for which in ("evaluation", "policy"):
        model = open_source(str(tiny_checkpoint), device="cpu", which=which)
        seen[which] = model.network().get_parameter(name).clone()
        seen["base"] = model.base_network().get_parameter(name).clone()
        torch.testing.assert_close(model.network().get_parameter(name), seen[which], rtol=0, atol=0)
    base = open_source("models/tinyworld", device="cpu", precision="float32").network().get_parameter(name)
    torch.testing.assert_close(seen["base"], base, rtol=0, atol=0)
    # The EMA's decay is one half: after one step it is halfway in each factor, so nearer to the base.
    far, near = (seen[which] - base for which in ("policy", "evaluation"))
    assert far.norm() > near.norm() > 0


def test_a_checkpoint_of_all_weights_opens(tiny_full_checkpoint: Path) -> None:
    model = open_source(str(tiny_full_checkpoint), device="cpu")
    tuned = model.network().get_parameter("proj_out.weight").clone()
    assert not torch.equal(tuned, model.base_network().get_parameter("proj_out.weight"))
    assert "evaluation_weights.safetensors" in model.hashes


def test_hashes_are_those_of_the_files(tiny_checkpoint: Path) -> None:
    model = open_source(str(tiny_checkpoint), device="cpu")
    files = {
        EVALUATION_FILE: tiny_checkpoint / EVALUATION_FILE,
        "base/vae/diffusion_pytorch_model.safetensors": TINYWORLD / "vae/diffusion_pytorch_model.safetensors",
    }
    for name, file in files.items():
        assert model.hashes[name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not any("text_encoder_3" in name for name in model.hashes)  # not used, so it cannot matter


def test_float32_stores_and_computes_in_float32() -> None:
    model = open_source("models/tinyworld", device="cpu", precision="float32")
    assert model.model.dtype == "float32" and model.precision == "float32"
    assert model.network().get_parameter("proj_out.weight").dtype == torch.float32


def test_a_damaged_weight_file_is_named(run_folder: Path) -> None:
    file = run_folder / "step-000001" / EVALUATION_FILE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=EVALUATION_FILE):
        open_source(str(run_folder / "step-000001"), device="cpu")


@pytest.mark.parametrize("name", ["manifest.json", "config.toml"])
def test_a_missing_file_of_a_checkpoint_is_named(name: str, run_folder: Path) -> None:
    (run_folder / "step-000001" / name).unlink()
    with pytest.raises(CheckpointError, match=f"damaged.*{name} is missing"):
        find_source(str(run_folder / "step-000001"))


def test_an_unknown_key_in_the_config_is_refused(run_folder: Path) -> None:
    file = run_folder / "step-000001" / "config.toml"
    file.write_text(file.read_text().replace("[train]", "[train]\nstepz = 3"))
    with pytest.raises(ConfigError, match="stepz"):
        find_source(str(run_folder / "step-000001"))


def test_the_lora_of_another_rank_is_refused(run_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = run_folder / "step-000001"
    tensors = load_file(checkpoint / EVALUATION_FILE)
    wider = {k: v.repeat(2, 1) if "lora_A" in k else v.repeat(1, 2) for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in wider.items()}, checkpoint / EVALUATION_FILE)
    replace_in_manifest(checkpoint, EVALUATION_FILE)
    with pytest.raises(CheckpointError, match="step-000001 belongs to another model or LoRA"):
        open_source(str(checkpoint), device="cpu")


def test_a_lora_on_another_base_model_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from ramctl.tinyworld.model import build_pipeline

    build_pipeline(width=64, layers=2).save_pretrained(tmp_path / "other")
    found = find_source(str(tiny_checkpoint), base=str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="step-000001 belongs to another model or LoRA"):
        open_source(found, device="cpu")


def test_a_moved_base_model_is_named_and_can_be_given(run_folder: Path, tmp_path: Path) -> None:
    checkpoint = run_folder / "step-000001"
    file = checkpoint / "config.toml"
    file.write_text(file.read_text().replace('"models/tinyworld"', f'"{tmp_path}/gone"'))
    replace_in_manifest(checkpoint, "config.toml")
    with pytest.raises(RamctlError, match=r"step-000001 cannot be loaded.*gone.*--base FOLDER"):
        open_source(str(checkpoint), device="cpu")
    found = find_source(str(checkpoint), base="models/tinyworld")
    assert open_source(found, device="cpu").policy is not None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run/latest/../step-000009", "no checkpoint, run folder or model folder"),
        ("outputs/nothing", "Nothing is at outputs/nothing"),
        ("rum", "Did you mean 'run'"),
        ("models", "neither a checkpoint .* nor a model"),
        ("run/step-000001/state.json", "is a file"),
    ],
)
def test_what_was_looked_for_is_named(
    name: str, said: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=said) as caught:
        find_source(name)
    assert "\n" not in str(caught.value)


def test_an_incomplete_model_folder_names_the_file(tmp_path: Path) -> None:
    shutil.copytree(TINYWORLD, tmp_path / "own")
    (tmp_path / "own" / "vae" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"own.*vae/config.json is missing"):
        find_source(str(tmp_path / "own"))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"which": "policy"}, "base model"),
        ({"which": "polici"}, "Did you mean 'policy'"),
        ({"precision": "float16"}, "float32, bfloat16"),
        ({"device": "gpu"}, "auto, cpu, cuda"),
    ],
)
def test_wrong_choices_are_refused_before_loading(option: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_source("models/tinyworld", **{"device": "cpu", **option})


def test_a_base_for_a_base_model_is_refused() -> None:
    with pytest.raises(UsageError, match="is a base model itself"):
        find_source("models/tinyworld", base="models/tinyworld")


def fake_hub_cache(folder: Path) -> Path:
    """A hub cache that holds the embedded model as someone/tiny."""
    repository = folder / "models--someone--tiny"
    shutil.copytree(TINYWORLD, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return folder


def test_a_hub_id_in_the_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fake_hub_cache(tmp_path)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = find_source("someone/tiny")
    assert found.model.path == "someone/tiny" and found.model.resolution == 64
    assert weight_hashes(found.model).keys() >= {"transformer/diffusion_pytorch_model.safetensors"}
    with pytest.raises(MissingDependencyError, match="someone/other is no checkpoint"):
        find_source("someone/other")


def test_a_hub_that_cannot_be_reached_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What looks like a hub id is often a mistyped path."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda repository, name: f"http://127.0.0.1:1/{name}")
    began = time.monotonic()
    with pytest.raises(MissingDependencyError, match=r"someone/other is no checkpoint.*refused"):
        find_source("someone/other")
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_hub_id_is_sampled_from_the_cache(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_CACHE": str(fake_hub_cache(tmp_path / "hub")), "HF_HUB_OFFLINE": "1"}
    words = ["sample", "someone/tiny", "-p", "a photo of a star", "--steps", "1", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "ramctl", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "00000.png").is_file()
