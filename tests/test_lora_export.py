"""LoRA files: what is exported gives other programs the same weights, and what they wrote is read back the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ramctl.engine.randomness import keyed_normal, keyed_seed
from ramctl.errors import CheckpointError, DataError, UsageError
from ramctl.images import load_image
from ramctl.lora_export import export_lora, read_lora, with_lora
from ramctl.lora_layouts import LowRank, Updates, read_layout, to_diffusers, to_kohya
from ramctl.prompts import Prompt
from ramctl.resources import resource_dir
from ramctl.sampling import DrawSettings, sample
from ramctl.sources import OpenModel, find_source, open_source

TINYWORLD = resource_dir("models") / "tinyworld"
SETTINGS = DrawSettings(sampling_steps=3, guidance_scale=2.0, negative_prompt="", seed=5, images_per_prompt=1)

#: A small Stable Diffusion 3.5: the first two of three blocks attend twice, the last has no text output.
SD35 = {
    "sample_size": 4,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 4,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}


def original_checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of that model under the names of the original MMDiT."""
    width, text, pooled, layers = 16, 12, 10, 3
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 16, width), "x_embedder.proj.weight": (width, 4, 2, 2)}
    linear = {"context_embedder": (width, text), "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    linear |= {"y_embedder.mlp.0": (width, pooled), "y_embedder.mlp.2": (width, width)}
    linear |= {"final_layer.linear": (16, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    for i in range(layers):
        last = i == layers - 1
        for side in ("x_block", "context_block"):
            block = f"joint_blocks.{i}.{side}"
            linear[f"{block}.attn.qkv"] = (3 * width, width)
            chunks = 2 if last and side == "context_block" else 9 if i < 2 and side == "x_block" else 6
            linear[f"{block}.adaLN_modulation.1"] = (chunks * width, width)
            for norm in ("ln_q", "ln_k"):
                shapes[f"{block}.attn.{norm}.weight"] = (8,)
            if last and side == "context_block":
                continue
            linear[f"{block}.attn.proj"] = (width, width)
            linear[f"{block}.mlp.fc1"] = (4 * width, width)
            linear[f"{block}.mlp.fc2"] = (width, 4 * width)
        if i < 2:
            linear[f"joint_blocks.{i}.x_block.attn2.qkv"] = (3 * width, width)
            linear[f"joint_blocks.{i}.x_block.attn2.proj"] = (width, width)
            shapes |= {f"joint_blocks.{i}.x_block.attn2.{norm}.weight": (8,) for norm in ("ln_q", "ln_k")}
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()} | {"x_embedder.proj.bias": (width,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def in_diffusers(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own conversion of an original checkpoint."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    converted: dict[str, Tensor] = convert_sd3_transformer_checkpoint_to_diffusers(dict(checkpoint))
    return converted


def apply_kohya(checkpoint: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The documented rule of sd-scripts and ComfyUI, key by key of the model: W + alpha / rank · up @ down."""
    changed, unused = dict(checkpoint), set(lora)
    for name, weight in checkpoint.items():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if not name.endswith(".weight") or f"{key}.lora_up.weight" not in lora:
            continue
        up, down, alpha = (lora[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        changed[name] = weight + alpha.item() / down.shape[0] * delta
        unused -= {f"{key}.{part}" for part in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert not unused, f"no layer of the model takes {sorted(unused)[:3]}"
    return changed


def random_updates(model: nn.Module, seed: int = 1, *, rank: int = 3) -> Updates:
    """An update of every layer that has a place in both layouts; ranks vary."""
    generator = torch.Generator().manual_seed(seed)
    updates: Updates = {}
    for i, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            r = rank + i % 2
            down = torch.randn(r, *module.weight.shape[1:], generator=generator)
            updates[name] = LowRank(down, torch.randn(module.weight.shape[0], r, generator=generator))
    return updates


def small_model() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    model: nn.Module = SD3Transformer2DModel(**SD35)
    return model


def test_kohya_files_give_the_original_model_what_diffusers_layers_get() -> None:
    model, original = small_model(), original_checkpoint()
    base = in_diffusers(original)
    assert set(base) == set(model.state_dict())  # the checkpoint above is that model
    updates = random_updates(model)
    assert {"norm_out.linear", "transformer_blocks.2.norm1_context.linear", "pos_embed.proj"} <= set(updates)
    lora = to_kohya(updates)
    fused = lora["lora_unet_joint_blocks_0_x_block_attn2_qkv.lora_down.weight"]
    assert len(fused) == sum(updates[f"transformer_blocks.0.attn2.to_{part}"].rank for part in "qkv")
    merged = in_diffusers(apply_kohya(original, lora))
    for name, weight in base.items():
        layer = name.removesuffix(".weight")
        expected = weight + updates[layer].delta() if name.endswith(".weight") and layer in updates else weight
        torch.testing.assert_close(merged[name], expected, msg=lambda text, name=name: f"{name}: {text}")


def test_a_layer_that_is_not_trained_stays_as_it_is_in_the_fused_one() -> None:
    original = original_checkpoint()
    updates = {
        name: update
        for name, update in random_updates(small_model()).items()
        if name.endswith((".1.attn.to_v", ".1.attn.add_k_proj"))
    }
    assert len(updates) == 2
    merged, base = in_diffusers(apply_kohya(original, to_kohya(updates))), in_diffusers(original)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"{name}.weight" for name in updates}


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_layout_is_read_back_as_the_same_update(layout: str) -> None:
    updates = random_updates(small_model())
    tensors, metadata = to_diffusers(updates) if layout == "diffusers" else (to_kohya(updates), {})
    again, found = read_layout(tensors, metadata, "x")
    assert found == layout and set(again) == set(updates)
    for name, update in updates.items():
        assert again[name].rank == update.rank
        torch.testing.assert_close(again[name].delta(), update.delta(), rtol=1e-5, atol=1e-5)


def test_alpha_is_read_where_each_layout_keeps_it() -> None:
    layer = LowRank(torch.ones(2, 3), torch.ones(4, 2))
    key = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up}

    def scale(adapter: Mapping[str, Any], more: Mapping[str, Tensor] = {}) -> float:
        packed = {f"transformer.{name}": value for name, value in adapter.items()}
        metadata = {"lora_adapter_metadata": json.dumps(packed)} if adapter else {}
        updates, _ = read_layout({**tensors, **more}, metadata, "x")
        return float(updates["transformer_blocks.0.attn.to_q"].up[0, 0])

    assert scale({}) == 1  # diffusers takes the rank for alpha
    assert scale({"r": 2, "lora_alpha": 8}) == 4
    assert scale({"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn.to_q": 1}}) == 0.5
    assert scale({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_k": 1}}) == 4
    assert scale({"r": 2, "lora_alpha": 8, "use_rslora": True}) == pytest.approx(8 / 2**0.5)
    assert scale({}, {f"{key}.alpha": torch.tensor(6.0)}) == 3
    with pytest.raises(CheckpointError, match="DoRA"):
        scale({"use_dora": True})
    kohya = {f"lora_unet_context_embedder.{n}": t for n, t in (("lora_down.weight", layer.down),)}
    kohya["lora_unet_context_embedder.lora_up.weight"] = layer.up
    assert float(read_layout(kohya, {}, "x")[0]["context_embedder"].up[0, 0]) == 1
    kohya["lora_unet_context_embedder.alpha"] = torch.tensor(1.0)
    assert float(read_layout(kohya, {}, "x")[0]["context_embedder"].up[0, 0]) == 0.5


# -- checkpoints and base models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint: Path) -> OpenModel:
    return open_source(str(tiny_checkpoint), device="cpu", precision="float32")


@pytest.fixture
def base() -> OpenModel:
    return open_source("models/tinyworld", device="cpu", precision="float32")


@pytest.fixture(params=["diffusers", "kohya"])
def exported(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    target = tmp_path / f"{request.param}.safetensors"
    assert export_lora(find_source(str(tiny_checkpoint)), target, layout=request.param) == 47
    return target


def pixels(folder: Path) -> np.ndarray:
    return np.stack([load_image(file) for file in sorted(folder.glob("0*.png"))]).astype(int)


def test_an_exported_file_on_the_base_model_draws_the_checkpoints_pictures(
    exported: Path, tuned: OpenModel, base: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    model = with_lora(base, exported)
    both = sample(model, tiny_prompts[:2], SETTINGS, output=tmp_path / "both", compare_base=True)
    expected = sample(tuned, tiny_prompts[:2], SETTINGS, output=tmp_path / "expected", compare_base=True)
    assert both.base is not None and expected.base is not None
    assert np.abs(pixels(both.tuned) - pixels(expected.tuned)).max() <= 1
    np.testing.assert_array_equal(pixels(both.base), pixels(expected.base))
    assert np.abs(pixels(both.tuned) - pixels(both.base)).max() > 1
    facts = json.loads((both.folder / "sampling.json").read_text())
    assert facts["lora"] == str(exported) and exported.name in facts["sha256"]
    assert facts["source"] == f"tinyworld-{exported.stem}"


def test_plain_diffusers_loads_the_exported_file(
    tiny_checkpoint: Path, tuned: OpenModel, tiny_prompts: list[Prompt], tmp_path: Path
) -> None:
    from diffusers import StableDiffusion3Pipeline

    target = tmp_path / "mine.safetensors"
    export_lora(find_source(str(tiny_checkpoint)), target)
    ours = sample(tuned, tiny_prompts[:1], SETTINGS, output=tmp_path / "ours")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        TINYWORLD, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(target)
    noise = keyed_normal([keyed_seed(SETTINGS.seed, "sample", 0, 0)], tuned.backbone.latent_shape, torch.device("cpu"))
    image = pipeline(
        tiny_prompts[0].text,
        negative_prompt="",
        latents=noise,
        height=64,
        width=64,
        num_inference_steps=SETTINGS.sampling_steps,
        guidance_scale=SETTINGS.guidance_scale,
        max_sequence_length=0,
        output_type="np",
    ).images[0]
    assert np.abs((image * 255).round().astype(int) - pixels(ours.folder)[0]).max() <= 1


def test_diffusers_reads_ranks_that_differ(tmp_path: Path) -> None:
    model = small_model()
    updates = {name: u for name, u in random_updates(model).items() if ".attn." in name}
    assert len({update.rank for update in updates.values()}) == 2
    tensors, metadata = to_diffusers(updates)
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", **metadata})
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    model.load_lora_adapter(str(tmp_path), weight_name="x.safetensors")  # type: ignore[operator]
    model.fuse_lora()  # type: ignore[operator]
    after = dict(model.named_parameters())
    for name, update in updates.items():
        fused = after.get(f"{name}.base_layer.weight")
        assert fused is not None
        torch.testing.assert_close(fused, before[f"{name}.weight"] + update.delta(), rtol=1e-4, atol=1e-4)


def test_a_tool_that_knows_no_metadata_applies_the_same_update(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The checkpoint's own file has alpha = 2 · rank in its metadata; ComfyUI takes a file without ``.alpha`` at 1."""
    own = tiny_checkpoint / "pytorch_lora_weights.safetensors"
    target = tmp_path / "x.safetensors"
    export_lora(find_source(str(tiny_checkpoint)), target)
    plain, exact = load_file(target), read_lora(own)
    for name, update in exact.items():
        a, b = (plain[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(b @ a, update.delta())


def test_a_weight_set_is_exported_as_such(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = find_source(str(tiny_checkpoint))
    for which in ("evaluation", "policy"):
        export_lora(source, tmp_path / f"{which}.safetensors", which=which)
    one, other = (read_lora(tmp_path / f"{which}.safetensors") for which in ("evaluation", "policy"))
    name = next(name for name, update in other.items() if update.up.any())
    assert not torch.equal(one[name].up, other[name].up)
    with pytest.raises(UsageError, match="'polici'"):
        export_lora(source, tmp_path / "x.safetensors", which="polici")


def test_a_file_can_be_turned_into_the_other_layout(exported: Path, tmp_path: Path) -> None:
    other = "kohya" if exported.stem == "diffusers" else "diffusers"
    export_lora(find_source("models/tinyworld"), tmp_path / "turned.safetensors", layout=other, lora=exported)
    before, after = read_lora(exported), read_lora(tmp_path / "turned.safetensors")
    assert set(after) == set(before)
    for name, update in before.items():
        torch.testing.assert_close(after[name].delta(), update.delta())


def test_a_lora_that_was_never_trained_is_kept(tmp_path: Path) -> None:
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    zero = {name: LowRank(torch.ones(2, 3), torch.zeros(3, 2)) for name in names}
    assert set(read_layout(to_kohya(zero), {}, "x")[0]) == set(names)


def test_the_file_says_where_it_is_from_and_others_may_read_it(exported: Path, tiny_checkpoint: Path) -> None:
    from safetensors import safe_open

    with safe_open(exported, framework="pt") as file:
        facts = json.loads(file.metadata()["ramctl"])
    assert facts["source"] == str(tiny_checkpoint) and facts["weights"] == "evaluation"
    plain = exported.with_name("plain.txt")
    plain.write_text("")
    assert exported.stat().st_mode == plain.stat().st_mode
    assert [path.name for path in exported.parent.iterdir() if path.name.startswith(".")] == []


# -- mistakes -------------------------------------------------------------------------------------------------------


def test_a_lora_of_another_model_is_refused_by_its_first_layer_or_shape(
    base: OpenModel, tmp_path: Path, exported: Path
) -> None:
    def refused(tensors: Mapping[str, Tensor], said: str) -> None:
        save_file(dict(tensors), tmp_path / "bad.safetensors")
        with pytest.raises(CheckpointError, match=said) as caught:
            with_lora(base, tmp_path / "bad.safetensors")
        assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)

    wider = random_updates(small_model())
    layer = {"transformer_blocks.0.attn.to_q": wider["transformer_blocks.0.attn.to_q"]}
    refused(to_diffusers(layer)[0], r"transformer_blocks.0.attn.to_q is \(192, 192\) here, \(16, 16\) there")
    second = {"transformer_blocks.0.attn2.to_q": LowRank(torch.ones(1, 192), torch.ones(192, 1))}
    refused(to_diffusers(second)[0], "no layer transformer_blocks.0.attn2.to_q")
    refused(to_kohya(second), "no layer transformer_blocks.0.attn2.to_")
    sdxl = "lora_unet_down_blocks_1_attentions_0_proj_in"
    refused(
        {f"{sdxl}.lora_down.weight": torch.ones(1, 2), f"{sdxl}.lora_up.weight": torch.ones(2, 1)},
        f"no layer for the key {sdxl}",
    )
    refused({"unet.conv_in.lora_A.weight": torch.ones(1, 2)}, "first key is 'unet.conv_in.lora_A.weight'")
    good = load_file(exported)
    refused({name: t for name, t in good.items() if name != max(good)}, f"it has no {max(good)}")
    refused({**good, "lora_te1_text_model.lora_up.weight": torch.ones(2, 2)}, "'lora_te1_text_model.lora_up.weight'")


def test_a_refused_lora_leaves_the_model_alone(base: OpenModel, exported: Path) -> None:
    before = {name: p.clone() for name, p in base.backbone.transformer.state_dict().items()}
    model = with_lora(base, exported)
    model.network()
    assert any(not torch.equal(p, before[n]) for n, p in base.backbone.transformer.state_dict().items())
    model.base_network()
    assert all(torch.equal(p, before[n]) for n, p in base.backbone.transformer.state_dict().items())


def test_a_file_that_is_no_lora_is_refused(base: OpenModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        with_lora(base, tmp_path / "gone.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="cannot be read"):
        with_lora(base, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="first key is"):
        with_lora(base, TINYWORLD / "vae" / "diffusion_pytorch_model.safetensors")


def test_a_checkpoint_takes_no_second_lora(tuned: OpenModel, exported: Path) -> None:
    with pytest.raises(UsageError, match="goes on a base model: ramctl sample models/tinyworld --lora"):
        with_lora(tuned, exported)


def test_exports_that_cannot_be_are_refused(tiny_checkpoint: Path, tiny_full_checkpoint: Path, tmp_path: Path) -> None:
    source = find_source(str(tiny_checkpoint))
    with pytest.raises(UsageError, match="Did you mean 'kohya'"):
        export_lora(source, tmp_path / "x.safetensors", layout="kohia")
    with pytest.raises(UsageError, match="safetensors"):
        export_lora(source, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="base model"):
        export_lora(find_source("models/tinyworld"), tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="trained all weights"):
        export_lora(find_source(str(tiny_full_checkpoint)), tmp_path / "x.safetensors")
    (tmp_path / "mine.safetensors").write_bytes(b"precious")
    with pytest.raises(DataError, match="exists"):
        export_lora(source, tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").read_bytes() == b"precious"
    damaged = tmp_path / "step-000001"
    shutil.copytree(tiny_checkpoint, damaged)
    file = damaged / "pytorch_lora_weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        export_lora(find_source(str(damaged)), tmp_path / "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.safetensors", "step-000001"]


def test_merging_again_gives_the_same_weights(base: OpenModel, exported: Path) -> None:
    model = with_lora(base, exported)
    first = {name: p.clone() for name, p in model.network().state_dict().items()}
    model.network()
    model.base_network()
    again = model.network().state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
