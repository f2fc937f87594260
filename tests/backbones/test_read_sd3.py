"""Reading a Stable Diffusion 3 folder: what official folders may hold, and what is refused with the file's name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ramctl.backbones.read_sd3 import pinned_revision, read_pipeline
from ramctl.config import ModelSection
from ramctl.errors import ConfigError, MissingDependencyError
from ramctl.resources import resource_dir
from ramctl.weights import find_entry

TINY = resource_dir("models") / "tinyworld"
MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
    "text_encoder_3": "text_encoder_3/model.safetensors",
}
#: A tensor of each part.
TENSORS = {
    "transformer": "transformer_blocks.1.attn.to_q.weight",
    "vae": "decoder.conv_in.bias",
    "text_encoder": "text_model.encoder.layers.0.mlp.fc1.weight",
    "text_encoder_2": "text_projection.weight",
    "text_encoder_3": "encoder.final_layer_norm.weight",
}
#: The configuration's word for how many layers it has.
DEPTH = {
    "transformer": "num_layers",
    "vae": "layers_per_block",
    "text_encoder": "num_hidden_layers",
    "text_encoder_2": "num_hidden_layers",
    "text_encoder_3": "num_layers",
}
parts = pytest.mark.parametrize("part", WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model, all of whose files may be replaced."""

    def link(source: str, target: str) -> None:
        Path(target).symlink_to(source)

    return Path(shutil.copytree(TINY.resolve(), tmp_path / "model", copy_function=link))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache of the hub, no network and an empty store."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path / "store"))
    return tmp_path / "hub"


def read(path: Path | str, *, use_t5: bool = True, **values: Any) -> Any:
    torch.set_num_threads(1)
    return read_pipeline(ModelSection(path=str(path), resolution=64, dtype="float32", use_t5=use_t5, **values))


def refusal(path: Path | str, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(file: Path, content: bytes | str) -> None:
    """Replace a file, not what it links to."""
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def change(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def shard(folder: Path, part: str) -> tuple[Path, list[Path]]:
    """Split the weights of a part into two files with an index."""
    whole = folder / WEIGHTS[part]
    tensors = load_file(whole)
    names, stem = sorted(tensors), whole.stem
    shards = [whole.with_name(f"{stem}-0000{i}-of-00002.safetensors") for i in (1, 2)]
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(shards, halves, strict=True):
        save_file({name: tensors[name] for name in half}, file, metadata={"format": "pt"})
    listed = {name: file.name for file, half in zip(shards, halves, strict=True) for name in half}
    index = whole.with_name(f"{whole.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    whole.unlink()
    return index, shards


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def edit_json(file: Path, **values: Any) -> None:
    write(file, json.dumps({**json.loads(file.read_text()), **values}))


# -- what is read


def test_all_parts_are_the_pipelines_own() -> None:
    from diffusers import StableDiffusion3Pipeline

    ours, theirs = read(TINY), StableDiffusion3Pipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    assert ours.components.keys() == theirs.components.keys()
    for name in WEIGHTS:
        network = ours.components[name]
        assert same(network, theirs.components[name])
        assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
        assert not network.training
    assert ours.scheduler.config.shift == theirs.scheduler.config.shift
    assert all(ours.components[name] is not None for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))


def test_the_third_encoder_is_not_read_unless_it_is_used(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    assert read(folder, use_t5=False).text_encoder_3 is None
    edit_json(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert read(folder, use_t5=False).tokenizer_3 is None
    assert "set model.use_t5 to false" in refusal(folder)


def test_what_official_folders_hold_besides_is_read_without_complaint(folder: Path) -> None:
    plain = read(TINY)
    # Old CLIP files have this buffer; T5 files may have the tied embedding under both names, and a decoder.
    for part in ("text_encoder", "text_encoder_2"):
        change(
            folder / WEIGHTS[part], lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(16)[None]})
        )
    change(
        folder / WEIGHTS["text_encoder_3"],
        lambda t: t.update(
            {
                "encoder.embed_tokens.weight": t["shared.weight"].clone(),
                "decoder.final_layer_norm.weight": torch.ones(256),
            }
        ),
    )
    shard(folder, "text_encoder_3")
    # Weights of other precisions lie beside; nobody reads them.
    write(folder / "transformer/diffusion_pytorch_model.fp16.safetensors", b"not read")
    write(folder / "text_encoder_3/model.fp16-00001-of-00002.safetensors", b"not read")
    write(folder / "text_encoder_3/model.safetensors.index.fp16.json", b"not read")
    ours = read(folder)
    assert all(same(ours.components[name], plain.components[name]) for name in WEIGHTS)


@parts
def test_sharded_weights_are_read(folder: Path, part: str) -> None:
    shard(folder, part)
    assert same(read(folder).components[part], read(TINY).components[part])


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_pickled_weights_are_read_and_checked(folder: Path, part: str) -> None:
    whole = folder / WEIGHTS[part]
    pickled = whole.with_name("diffusion_pytorch_model.bin" if part == "transformer" else "pytorch_model.bin")
    tensors = load_file(whole)
    whole.unlink()
    torch.save(tensors, pickled)
    assert same(read(folder).components[part], read(TINY).components[part])
    del tensors[TENSORS[part]]
    torch.save(tensors, pickled)
    assert f"{pickled.name} does not fit {part}/config.json: it lacks 1 tensor (first '{TENSORS[part]}')" in refusal(
        folder
    )
    pickled.write_bytes(pickled.read_bytes()[:5000])
    assert f"{part}/{pickled.name} cannot be loaded" in refusal(folder)


# -- weights that do not fit


@parts
def test_a_missing_tensor_is_named(folder: Path, part: str) -> None:
    change(folder / WEIGHTS[part], lambda tensors: tensors.pop(TENSORS[part]))
    said = refusal(folder)
    assert f"{WEIGHTS[part]} does not fit {part}/config.json: it lacks 1 tensor (first '{TENSORS[part]}')." in said
    assert "Copy it again from where the folder came from" in said


@parts
def test_an_unexpected_tensor_is_named(folder: Path, part: str) -> None:
    change(folder / WEIGHTS[part], lambda t: t.update({"other.weight": torch.ones(2), "other.bias": torch.ones(2)}))
    said = refusal(folder)
    assert f"{WEIGHTS[part]} does not fit" in said
    assert "it has 2 tensors (first 'other.bias') that the network has not" in said


@parts
def test_a_tensor_of_another_shape_is_named(folder: Path, part: str) -> None:
    shape = list(load_file(TINY / WEIGHTS[part])[TENSORS[part]].shape)
    change(folder / WEIGHTS[part], lambda tensors: tensors.update({TENSORS[part]: torch.ones(3, 5)}))
    said = refusal(folder)
    assert f"{WEIGHTS[part]} does not fit" in said
    assert f"it has 1 tensor (first '{TENSORS[part]}') of another shape ([3, 5], not {shape})" in said


def test_a_tied_embedding_must_be_there_under_one_of_its_names(folder: Path) -> None:
    file = folder / WEIGHTS["text_encoder_3"]
    change(file, lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors.pop("shared.weight")}))
    assert same(read(folder).text_encoder_3, read(TINY).text_encoder_3)
    change(file, lambda tensors: tensors.pop("encoder.embed_tokens.weight"))
    assert "it lacks 2 tensors (first 'encoder.embed_tokens.weight')" in refusal(folder)  # as the class counts


def test_several_faults_are_counted(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["other.weight"] = tensors.pop("proj_out.bias")
        del tensors["proj_out.weight"]
        tensors["context_embedder.bias"] = torch.ones(1)

    change(folder / WEIGHTS["transformer"], spoil)
    assert (
        "it lacks 2 tensors (first 'proj_out.bias') and has 1 tensor (first 'context_embedder.bias') of another shape "
        "([1], not [192]) and has 1 tensor (first 'other.weight') that the network has not" in refusal(folder)
    )


@parts
@pytest.mark.parametrize("length", [5, 1000, 20_000])
def test_a_truncated_file_is_named(folder: Path, part: str, length: int) -> None:
    file = folder / WEIGHTS[part]
    whole = file.read_bytes()
    write(file, whole[:length])
    said = refusal(folder)
    assert f"{WEIGHTS[part]} is truncated" in said
    header = 8 + int.from_bytes(whole[:8], "little")
    assert (f"{length} bytes in place of {len(whole)}" in said) == (length >= header)


def test_files_that_are_no_weights_are_named(folder: Path) -> None:
    file = folder / WEIGHTS["vae"]
    write(file, file.read_bytes() + b"more")
    assert f"{WEIGHTS['vae']} is damaged: too long" in refusal(folder)
    write(file, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3519462\n")
    assert f"{WEIGHTS['vae']} is a git-lfs pointer" in refusal(folder)
    write(file, b"\x02\0\0\0\0\0\0\0{]")
    assert f"{WEIGHTS['vae']} cannot be read (" in refusal(folder)


@parts
def test_absent_weights_are_named(folder: Path, part: str) -> None:
    (folder / WEIGHTS[part]).unlink()
    assert f"{WEIGHTS[part]} is not there" in refusal(folder)
    shutil.rmtree(folder / part)
    assert f": {part}/config.json is not there" in refusal(folder)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_a_shard_that_is_absent_or_lacks_what_the_index_lists_is_named(folder: Path, part: str) -> None:
    index, (first, second) = shard(folder, part)
    listed = json.loads(index.read_text())["weight_map"]
    lost = next(name for name, file in listed.items() if file == first.name)
    change(first, lambda tensors: tensors.pop(lost))
    assert f"{part}/{first.name} does not fit {part}/config.json: it lacks 1 tensor (first '{lost}')" in refusal(folder)
    second.unlink()
    assert f"{part}/{second.name} is not there, but {index.name} lists it" in refusal(folder)
    index.write_text("{}")
    assert f"{part}/{index.name} is no index of weight files" in refusal(folder)


@parts
def test_a_configuration_that_cannot_be_used_is_named(folder: Path, part: str) -> None:
    file = folder / part / "config.json"
    for content, said in (("[]", "holds no JSON object"), ('{"a": ', "cannot be read")):
        write(file, content)
        assert f"{part}/config.json {said}" in refusal(folder)
    write(file, (TINY / part / "config.json").read_text())
    edit_json(file, **{DEPTH[part]: 3})
    assert f"{WEIGHTS[part]} does not fit {part}/config.json" in refusal(folder)


# -- scheduler, tokenizers, index


def test_a_scheduler_that_cannot_be_used_is_named(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    edit_json(file, shift="x")
    assert "scheduler/scheduler_config.json cannot be used as FlowMatchEulerDiscreteScheduler" in refusal(folder)
    edit_json(file, shift=0.0)
    assert "scheduler/scheduler_config.json has the shift 0.0, which must be above 0" in refusal(folder)
    write(file, '{"shift"')
    assert "scheduler/scheduler_config.json cannot be read" in refusal(folder)
    file.unlink()
    assert "scheduler/scheduler_config.json is not there" in refusal(folder)
    edit_json(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    write(file, "{}")
    assert "cannot be used as DDIMScheduler" in refusal(folder)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "tokenizer_3"])
def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path, name: str) -> None:
    write(folder / name / "tokenizer.json", (folder / name / "tokenizer.json").read_bytes()[:300])
    assert f": {name} holds no " in refusal(folder)
    (folder / name / "tokenizer.json").unlink()
    assert f"{name}/tokenizer.json is not there, nor is " in refusal(folder)  # it would know two words and say nothing
    (folder / name / "tokenizer_config.json").unlink()
    assert f"{name}/tokenizer_config.json is not there" in refusal(folder)


def test_a_vocabulary_in_two_files_is_read(folder: Path) -> None:
    vocab = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    write(folder / "tokenizer" / "vocab.json", json.dumps({**vocab, "re": len(vocab), "red</w>": len(vocab) + 1}))
    write(folder / "tokenizer" / "merges.txt", "#version: 0.2\nr e\nre d</w>\n")
    assert read(folder).tokenizer("red").input_ids == [0, len(vocab) + 1, 1]
    (folder / "tokenizer" / "merges.txt").unlink()
    assert "tokenizer/tokenizer.json is not there, nor is merges.txt" in refusal(folder)


def test_a_tokenizer_of_another_encoder_is_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer_2" / "tokenizer_config.json", model_max_length=77)
    said = refusal(folder)
    assert "tokenizer_2/tokenizer_config.json has a model_max_length above the 16 positions of text_encoder_2" in said
    edit_json(folder / "text_encoder" / "config.json", vocab_size=100)
    assert ": tokenizer numbers its tokens up to 174, but text_encoder embeds 100 of them" in refusal(folder)


def test_an_index_without_a_part_or_with_an_unknown_class_is_refused(folder: Path) -> None:
    index, whole = folder / "model_index.json", (TINY / "model_index.json").read_text()
    for part, named, said in (
        ("vae", [None, None], "names no vae"),
        ("text_encoder", ["transformers", "NoSuchModel"], "names the class transformers.NoSuchModel for text_encoder"),
        ("text_encoder", ["os", "DirEntry"], "names the class os.DirEntry for text_encoder"),
        ("vae", ["diffusers", "DDIMScheduler"], "names a class for vae that is no network"),
    ):
        write(index, whole)
        edit_json(index, **{part: named})
        assert f"model_index.json {said}" in refusal(folder)
    write(index, whole[:50])
    assert "model_index.json cannot be read" in refusal(folder)


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    for index, found in (
        ({"_class_name": "DDPMPipeline", "unet": [None, None]}, "it names no transformer"),
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "its transformer is FluxTransformer2DModel"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert f"not a Stable Diffusion 3 model (model_index.json: {found})" in refusal(tmp_path)


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} is no diffusers folder (it has no model_index.json)" in refusal(tmp_path)


# -- where it comes from


def test_a_missing_model_says_what_to_set(offline: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(MissingDependencyError) as caught:
        read(missing)
    assert repr(missing) in str(caught.value)
    assert "--model.path models/tinyworld" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_manifest_pins_the_revision_of_a_model_it_knows() -> None:
    pinned = find_entry("sd3.5-medium").revision
    assert re.fullmatch("[0-9a-f]{40}", pinned)
    assert pinned_revision(MEDIUM, None) == pinned
    assert pinned_revision(MEDIUM, "main") == "main"
    assert pinned_revision("someone/model", None) is None


def cached(hub: Path, repo: str, commit: str, model: Path, *, main: bool = True) -> Path:
    """Put ``model`` into the hub's cache as one commit of ``repo``."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    if main:
        (folder / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(model, folder / "snapshots" / commit))


def test_the_hub_is_asked_for_the_pinned_revision(offline: Path, folder: Path) -> None:
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text("{}")
    cached(offline, MEDIUM, "a" * 40, folder)  # what `main` is by now
    with pytest.raises(MissingDependencyError, match=find_entry("sd3.5-medium").revision):
        read(MEDIUM)
    assert "not a Stable Diffusion 3 model" in refusal(MEDIUM, revision="main")
    cached(offline, MEDIUM, find_entry("sd3.5-medium").revision, TINY, main=False)
    assert same(read(MEDIUM).transformer, read(TINY).transformer)


def test_a_damaged_file_of_the_hubs_cache_names_the_command_that_gets_it(offline: Path, folder: Path) -> None:
    change(folder / WEIGHTS["text_encoder"], lambda tensors: tensors.pop(TENSORS["text_encoder"]))
    snapshot = cached(offline, "someone/model", "b" * 40, folder)
    said = refusal("someone/model")
    assert f"{snapshot / WEIGHTS['text_encoder']} does not fit" in said
    assert f"hf download someone/model {WEIGHTS['text_encoder']} --force-download" in said
    cached(offline, MEDIUM, find_entry("sd3.5-medium").revision, folder)
    assert "Fetch the model again with: ramctl download-weights sd3.5-medium" in refusal(MEDIUM)


def test_a_damaged_file_of_the_store_names_the_command_that_gets_it(offline: Path, folder: Path) -> None:
    file = folder / WEIGHTS["vae"]
    write(file, file.read_bytes()[:20_000])
    store = offline.parent / "store"
    store.mkdir()
    (store / "sd3.5-medium").symlink_to(folder)
    said = refusal(store / "sd3.5-medium")
    assert f"{WEIGHTS['vae']} is truncated" in said
    assert "Delete it and fetch it again with: ramctl download-weights sd3.5-medium" in said
    file.unlink()
    assert ". Fetch it again with: ramctl download-weights sd3.5-medium" in refusal(store / "sd3.5-medium")
