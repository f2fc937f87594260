"""ImageReward: the official rule on a tiny checkpoint of the official layout, and files and inputs that must not pass.

The expected numbers come from a second, plain implementation below that reads the official key names;
tests/parity/imagereward_official.py compares with the official package at full size.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ramctl.errors import MissingDependencyError, RamctlError, ScorerError, UsageError
from ramctl.hashing import file_sha256
from ramctl.prompts import Prompt
from ramctl.scorers import registry
from ramctl.scorers.base import Images, Scores
from ramctl.scorers.imagereward import REWARD_MEAN, REWARD_STD, TOKENS, ImageRewardScorer
from ramctl.weights import load_manifest

#: Said of every file that is not the published one, as here.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not the official file")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "cat", "##s", "!", ","]
DEC, ENC = len(WORDS), len(WORDS) + 1
WIDTH, TEXT_WIDTH, SIDE, PATCH, LAYERS = 64, 128, 32, 16, 2
HEAD = (TEXT_WIDTH, 32, 16, 8, 4, 1)


def official_state(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the official names: one head of 64 in the picture encoder, two in the text encoder."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
        state[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.1
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1

    eye = "blip.visual_encoder"
    patches = (SIDE // PATCH) ** 2
    state[f"{eye}.cls_token"] = torch.randn(1, 1, WIDTH, generator=generator)
    state[f"{eye}.pos_embed"] = torch.randn(1, patches + 1, WIDTH, generator=generator)
    state[f"{eye}.patch_embed.proj.weight"] = torch.randn(WIDTH, 3, PATCH, PATCH, generator=generator) * 0.05
    state[f"{eye}.patch_embed.proj.bias"] = torch.randn(WIDTH, generator=generator) * 0.1
    for n in range(LAYERS):
        norm(f"{eye}.blocks.{n}.norm1", WIDTH)
        linear(f"{eye}.blocks.{n}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{eye}.blocks.{n}.attn.proj", WIDTH, WIDTH)
        norm(f"{eye}.blocks.{n}.norm2", WIDTH)
        linear(f"{eye}.blocks.{n}.mlp.fc1", 96, WIDTH)
        linear(f"{eye}.blocks.{n}.mlp.fc2", WIDTH, 96)
    norm(f"{eye}.norm", WIDTH)

    text = "blip.text_encoder"
    state[f"{text}.embeddings.position_ids"] = torch.arange(48)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(len(WORDS) + 2, TEXT_WIDTH, generator=generator)
    state[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(48, TEXT_WIDTH, generator=generator)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for n in range(LAYERS):
        layer = f"{text}.encoder.layer.{n}"
        for attention, columns in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            linear(f"{layer}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{layer}.{attention}.self.key", TEXT_WIDTH, columns)
            linear(f"{layer}.{attention}.self.value", TEXT_WIDTH, columns)
            linear(f"{layer}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{layer}.intermediate.dense", 160, TEXT_WIDTH)
        linear(f"{layer}.output.dense", TEXT_WIDTH, 160)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    linear("blip.vision_proj", 8, WIDTH)
    linear("blip.text_proj", 8, TEXT_WIDTH)
    for number, (columns, rows) in zip((0, 2, 4, 6, 7), itertools.pairwise(HEAD), strict=True):
        linear(f"mlp.layers.{number}", rows, columns)
    return state


# --- the rule once more, plainly


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """[tokens, width] each, in heads of 64; positions where ``mask`` is 0 are not looked at."""
    parts = []
    for q, k, v in zip(query.split(64, -1), key.split(64, -1), value.split(64, -1), strict=True):
        logits = q @ k.T / 8
        parts.append((logits if mask is None else logits.masked_fill(mask == 0, -math.inf)).softmax(-1) @ v)
    return torch.cat(parts, -1)


def expected_reward(state: dict[str, Tensor], image: Images, ids: list[int]) -> float:
    """The normalised reward of one picture and one prompt's token ids, padded here."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    height, width = image.shape[:2]
    scale = SIDE / min(height, width)
    picture = Image.fromarray(image).resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((picture.width - SIDE) / 2), round((picture.height - SIDE) / 2)
    pixels = torch.from_numpy(np.asarray(picture)[top : top + SIDE, left : left + SIDE] / 255.0).float()
    pixels = (pixels - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    proj = f"{eye}.patch_embed.proj"
    patches = F.conv2d(pixels.permute(2, 0, 1)[None], state[f"{proj}.weight"], state[f"{proj}.bias"], stride=PATCH)
    x = torch.cat([state[f"{eye}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{eye}.pos_embed"][0]
    for n in range(LAYERS):
        block = f"{eye}.blocks.{n}"
        x = x + linear(
            f"{block}.attn.proj", attend(*linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1))
        )
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{eye}.norm", x, 1e-6)

    mask = torch.tensor([1] * len(ids) + [0] * (TOKENS - len(ids)))
    padded = torch.tensor(ids + [0] * (TOKENS - len(ids)))
    embeddings = f"{text}.embeddings"
    y = state[f"{embeddings}.word_embeddings.weight"][padded]
    y = norm(f"{embeddings}.LayerNorm", y + state[f"{embeddings}.position_embeddings.weight"][:TOKENS], 1e-12)
    for n in range(LAYERS):
        layer = f"{text}.encoder.layer.{n}"
        for attention, source, hidden in (("attention", None, mask), ("crossattention", seen, None)):
            part = f"{layer}.{attention}"
            other = y if source is None else source
            z = attend(
                linear(f"{part}.self.query", y),
                linear(f"{part}.self.key", other),
                linear(f"{part}.self.value", other),
                hidden,
            )
            y = norm(f"{part}.output.LayerNorm", y + linear(f"{part}.output.dense", z), 1e-12)
        z = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", y)))
        y = norm(f"{layer}.output.LayerNorm", y + z, 1e-12)
    reward = y[0]
    for number in (0, 2, 4, 6, 7):
        reward = linear(f"mlp.layers.{number}", reward)
    return (float(reward) - 0.16717362830052426) / 1.0333394966054072


# --- fixtures


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(tmp_path))
    for name in ("imagereward", "bert-base-uncased"):
        (tmp_path / name).mkdir()
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    torch.save(official_state(), tmp_path / "imagereward" / "ImageReward.pt")
    return tmp_path


@pytest.fixture
def scorer(store: Path) -> ImageRewardScorer:
    made = ImageRewardScorer(device="cpu")
    made.ensure_loaded()
    return made


def noise(height: int = SIDE, width: int = SIDE, count: int = 1, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def score(scorer: ImageRewardScorer, images: Images, *prompts: str) -> Scores:
    return scorer.score(images, [Prompt(prompt) for prompt in prompts])


# --- the number


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (32, 35), (35, 32), (48, 31), (57, 200), (1, 1)])
def test_the_value_is_the_official_rules(scorer: ImageRewardScorer, shape: tuple[int, int]) -> None:
    images = noise(*shape, count=2)
    scores = score(scorer, images, "a red circle", "Cats!")
    assert not scores.failed.any()
    # 2 [CLS], 3 [SEP]; [ENC] takes no part
    expected = [
        expected_reward(official_state(), images[0], [2, 5, 6, 8, 3]),
        expected_reward(official_state(), images[1], [2, 10, 11, 12, 3]),
    ]
    np.testing.assert_allclose(scores.value, expected, atol=2e-5)
    assert abs(scores.value[0] - scores.value[1]) > 1e-3


def test_the_value_is_normalised_with_the_published_mean_and_deviation(store: Path) -> None:
    state = official_state()
    state["mlp.layers.7.weight"] = torch.zeros(1, 4)
    state["mlp.layers.7.bias"] = torch.tensor([1.2005131249058314])
    torch.save(state, store / "imagereward" / "ImageReward.pt")
    scores = score(ImageRewardScorer(device="cpu"), noise(), "a cat")
    assert scores.value[0] == pytest.approx((1.2005131249058314 - 0.16717362830052426) / 1.0333394966054072)
    assert scores.value[0] == pytest.approx(1.0)
    assert (REWARD_MEAN, REWARD_STD) == (0.16717362830052426, 1.0333394966054072)


def test_it_depends_on_the_picture_and_on_the_prompt(scorer: ImageRewardScorer) -> None:
    same = np.repeat(noise(seed=1), 3, axis=0)
    same[2] = noise(seed=2)[0]
    values = score(scorer, same, "a red circle", "a blue square", "a red circle").value
    assert abs(values[0] - values[1]) > 1e-3
    assert abs(values[0] - values[2]) > 1e-3


def test_a_batch_of_one_and_of_eight_agree(store: Path) -> None:
    images = noise(40, 56, count=8)
    prompts = ["a", "a red cat", "", "square " * 50, "blue", "cats, cats", "[ENC]", "a !"]
    together = score(ImageRewardScorer(device="cpu", batch_size=8), images, *prompts)
    singly = score(ImageRewardScorer(device="cpu", batch_size=1), images, *prompts)
    alone = [
        score(ImageRewardScorer(device="cpu"), image[None], text).value[0]
        for image, text in zip(images, prompts, strict=True)
    ]
    np.testing.assert_allclose(together.value, singly.value, atol=1e-5)
    np.testing.assert_allclose(together.value, alone, atol=1e-5)


def test_prompts_are_cut_at_35_tokens(scorer: ImageRewardScorer) -> None:
    images = np.repeat(noise(), 3, axis=0)
    long = ["red"] * 60
    within, beyond = list(long), list(long)
    within[32], beyond[33] = "blue", "blue"  # 33 words between [CLS] and [SEP]
    values = score(scorer, images, " ".join(long), " ".join(within), " ".join(beyond)).value
    assert abs(values[0] - values[1]) > 1e-4
    assert values[0] == pytest.approx(values[2], abs=1e-6)


def test_the_two_added_tokens_come_after_the_vocabulary(scorer: ImageRewardScorer) -> None:
    images = np.repeat(noise(), 2, axis=0)
    values = score(scorer, images, "[DEC] cat", "[ENC] cat").value
    expected = [expected_reward(official_state(), images[0], [2, token, 10, 3]) for token in (DEC, ENC)]
    np.testing.assert_allclose(values, expected, atol=2e-5)


def test_half_precision_is_near_and_named_in_the_version(store: Path, scorer: ImageRewardScorer) -> None:
    half = ImageRewardScorer(device="cpu", dtype="bfloat16")
    exact, near = (score(s, noise(), "a red circle").value[0] for s in (scorer, half))
    assert near != exact
    assert near == pytest.approx(exact, abs=0.1)
    assert scorer.version != half.version


def test_the_version_names_rule_weights_and_vocabulary(store: Path, scorer: ImageRewardScorer) -> None:
    before = scorer.version
    assert before.startswith("imagereward/imagereward-1.0/ImageReward-")
    assert before.endswith("/float32")
    torch.save(official_state(seed=1), store / "imagereward" / "ImageReward.pt")
    assert ImageRewardScorer().version != before


# --- files


def test_a_checkpoint_saved_on_a_gpu_loads_without_one(
    store: Path, scorer: ImageRewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = score(scorer, noise(), "a cat").value
    file = store / "imagereward" / "ImageReward.pt"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(official_state(), file)
    monkeypatch.undo()
    monkeypatch.setenv("RAMCTL_WEIGHTS", str(store))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(file, weights_only=True)  # the trap is there
    np.testing.assert_array_equal(score(ImageRewardScorer(device="cpu"), noise(), "a cat").value, before)


@pytest.mark.parametrize("file", ["imagereward/ImageReward.pt", "bert-base-uncased/vocab.txt"])
def test_other_files_than_the_published_ones_are_refused_before_a_network_is_built(
    store: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.delenv("RAMCTL_OTHER_WEIGHTS")
    entries = dict(load_manifest())
    for name in ("imagereward", "bert-base-uncased"):  # as if those of the store had been published
        official = entries[name].files[0]
        published = replace(official, size=None, sha256=file_sha256(store / name / official.path))
        entries[name] = replace(entries[name], files=(published,))
    monkeypatch.setattr("ramctl.weights.manifest.load_manifest", lambda: entries)
    ImageRewardScorer(device="cpu").ensure_loaded()
    content = bytearray((store / file).read_bytes())
    content[-2] ^= 1
    (store / file).write_bytes(content)
    os.utime(store / file, ns=(1, 1))
    monkeypatch.setattr("ramctl.scorers.imagereward._Network", pytest.fail)
    said = rf"{file} is not the official file: SHA-256 {file_sha256(store / file)}, expected"
    with pytest.raises(MissingDependencyError, match=said):
        ImageRewardScorer(device="cpu").ensure_loaded()


def change(**tensors: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            key = name.replace("__", ".")
            if tensor is None:
                del state[key]
            else:
                state[key] = tensor

    return apply


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param(
            change(blip__visual_encoder__blocks__1__attn__qkv__bias=None), "layers.1.self_attn.qkv.bias", id="missing"
        ),
        pytest.param(change(mlp__layers__4__bias=None), "4.bias", id="missing in the head"),
        pytest.param(
            change(blip__text_encoder__embeddings__word_embeddings__weight=None), "word_embeddings", id="no sizes"
        ),
        pytest.param(change(blip__text_decoder__bias=torch.zeros(3)), "blip.text_decoder.bias", id="unknown"),
        pytest.param(
            change(blip__text_encoder__pooler__dense__bias=torch.zeros(3)),
            "pooler.dense.bias",
            id="unknown text tensor",
        ),
        pytest.param(
            change(blip__text_encoder__encoder__layer__0__output__dense__bias=torch.zeros(3)),
            "layer.0.output.dense.bias",
            id="another shape",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_the_tensor_named(
    store: Path, damage: Callable[[dict[str, Tensor]], None], named: str
) -> None:
    state = official_state()
    damage(state)
    torch.save(state, store / "imagereward" / "ImageReward.pt")
    with pytest.raises(ScorerError) as caught:
        ImageRewardScorer(device="cpu").ensure_loaded()
    assert named in str(caught.value)
    assert "ramctl download-weights imagereward --verify" in str(caught.value)


def test_the_tensors_that_play_no_part_may_be_absent(store: Path, scorer: ImageRewardScorer) -> None:
    before = score(scorer, noise(), "a cat").value
    idle = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
    state = {key: tensor for key, tensor in official_state().items() if not key.startswith(idle)}
    assert len(state) == len(official_state()) - 5
    torch.save(state, store / "imagereward" / "ImageReward.pt")
    np.testing.assert_array_equal(score(ImageRewardScorer(device="cpu"), noise(), "a cat").value, before)


class _Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html>not found</html>", id="an error page"),
        pytest.param(None, id="cut short"),
        pytest.param(pickle.dumps(_Payload(), protocol=2), id="code"),
    ],
)
def test_a_damaged_file_is_refused_and_no_code_in_it_runs(
    store: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store)
    file = store / "imagereward" / "ImageReward.pt"
    file.write_bytes(file.read_bytes()[:100_000] if content is None else content)
    with pytest.raises(ScorerError, match=r"ImageReward\.pt .*ramctl download-weights imagereward"):
        ImageRewardScorer(device="cpu").ensure_loaded()
    assert not (store / "executed").exists()


def test_a_file_of_other_things_is_refused(store: Path) -> None:
    torch.save({"step": 3, "lr": 1e-4}, store / "imagereward" / "ImageReward.pt")
    with pytest.raises(ScorerError, match="something other than named tensors"):
        ImageRewardScorer(device="cpu").ensure_loaded()


def test_another_vocabulary_is_refused(store: Path) -> None:
    (store / "bert-base-uncased" / "vocab.txt").write_text("\n".join([*WORDS, "dog"]) + "\n", encoding="utf-8")
    with pytest.raises(ScorerError, match=r"17 tokens.*trained with 16.*download-weights bert-base-uncased"):
        ImageRewardScorer(device="cpu").ensure_loaded()


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("imagereward/ImageReward.pt", "ramctl download-weights imagereward"),
        ("bert-base-uncased/vocab.txt", "ramctl download-weights bert-base-uncased"),
    ],
)
def test_a_missing_file_is_named_with_the_command_that_gets_it(store: Path, file: str, command: str) -> None:
    (store / file).unlink()
    for use in (lambda: ImageRewardScorer(device="cpu").ensure_loaded(), lambda: ImageRewardScorer().version):
        with pytest.raises(MissingDependencyError) as caught:
            use()
        assert command in str(caught.value)
        assert file in str(caught.value)


# --- inputs


@pytest.mark.parametrize(
    "images",
    [
        pytest.param(noise(1, 1), id="1x1"),
        pytest.param(noise(1, 500), id="1x500"),
        pytest.param(noise(2000, 3), id="2000x3"),
        pytest.param(noise(33, 61), id="odd sides"),
        pytest.param(np.zeros((1, 64, 64, 3), dtype=np.uint8), id="black"),
        pytest.param(np.full((1, 64, 64, 3), 255, dtype=np.uint8), id="white"),
        pytest.param(noise(64, 64)[:, :, ::-1], id="a view that is not contiguous"),
    ],
)
def test_odd_pictures_are_scored(scorer: ImageRewardScorer, images: Images) -> None:
    scores = score(scorer, images, "a cat")
    assert not scores.failed[0], scores.errors
    assert np.isfinite(scores.value[0])


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "   ",
        "\n\t",
        "word " * 400,
        "💡🔆",
        "“curly” ‘quotes’",
        "&amp;&lt;",
        "灯 кошка",
        "\u0301\u200b\x07",
        "[PAD]",
    ],
)
def test_odd_prompts_are_scored(scorer: ImageRewardScorer, prompt: str) -> None:
    scores = score(scorer, noise(), prompt)
    assert not scores.failed[0], scores.errors


def test_no_pictures_and_pictures_without_pixels(scorer: ImageRewardScorer) -> None:
    assert len(score(scorer, noise()[:0])) == 0
    scores = score(scorer, np.zeros((2, 0, 64, 3), dtype=np.uint8), "a", "cat")
    assert scores.failed.all()
    assert scores.errors[0] == "the picture has no pixels"


def test_a_number_that_is_not_finite_is_a_failure(store: Path) -> None:
    state = official_state()
    state["mlp.layers.0.bias"][0] = math.nan
    torch.save(state, store / "imagereward" / "ImageReward.pt")
    scores = score(ImageRewardScorer(device="cpu"), noise(), "a cat")
    assert scores.failed[0] and np.isnan(scores.value[0])


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"batch_size": 0}, {"batch_size": "many"}, {"devise": "cpu"}], ids=str
)
def test_wrong_options_are_refused_at_once(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="imagereward"):
        registry.create("imagereward", options)


def test_a_device_that_is_not_there_is_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="tpu"):
        ImageRewardScorer(device="tpu").ensure_loaded()


@pytest.mark.parametrize("text", ["half a pair \ud83d", None, 7], ids=ascii)
def test_a_prompt_that_cannot_be_encoded_fails_alone(scorer: ImageRewardScorer, text: str) -> None:
    images = noise(count=3)
    expected = score(scorer, images, "a cat", "a cat", "red").value
    scores = scorer.score(images, [Prompt("a cat"), Prompt(text), Prompt("red")])
    assert scores.failed.tolist() == [False, True, False]
    np.testing.assert_allclose(scores.value[[0, 2]], expected[[0, 2]], atol=1e-5)
    assert "not valid Unicode" in str(scores.errors[1])
    assert scorer.score(images[:1], [Prompt(text)]).failed.all()


def test_autocast_around_it_changes_no_number(scorer: ImageRewardScorer) -> None:
    expected = score(scorer, noise(), "a cat").value
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(score(scorer, noise(), "a cat").value, expected)


def test_loading_draws_no_random_number(store: Path) -> None:
    before = torch.random.get_rng_state()
    ImageRewardScorer(device="cpu").ensure_loaded()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "key, value", [("mlp.layers.x.weight", torch.zeros(1, 4)), ("mlp.layers.9.weight", torch.zeros(4))]
)
def test_a_head_of_something_else_is_named(store: Path, key: str, value: Tensor) -> None:
    torch.save({**official_state(), key: value}, store / "imagereward" / "ImageReward.pt")
    with pytest.raises(ScorerError, match=r"is not ImageReward v1\.0: its head"):
        ImageRewardScorer(device="cpu").ensure_loaded()


# --- memory


def limit_memory(scorer: ImageRewardScorer, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the network run out of memory above ``most`` pairs; returns the sizes it was asked for."""
    assert scorer._engine is not None
    network, sizes = scorer._engine[0], []
    original = network.rewards

    def rewards(pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        sizes.append(len(pixels))
        if len(pixels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(pixels, ids, mask)

    monkeypatch.setattr(network, "rewards", rewards)
    return sizes


def test_a_full_gpu_halves_the_batch_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ImageRewardScorer(device="cpu", batch_size=8)
    images, prompts = noise(count=10), ["a cat"] * 10
    before = score(scorer, images, *prompts).value
    sizes = limit_memory(scorer, monkeypatch, most=4)
    np.testing.assert_allclose(score(scorer, images, *prompts).value, before, atol=1e-5)
    assert sizes == [8, 4, 4, 2]


def test_a_gpu_that_does_not_hold_half_a_batch_is_reported(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ImageRewardScorer(device="cpu", batch_size=8)
    scorer.ensure_loaded()
    limit_memory(scorer, monkeypatch, most=1)
    with pytest.raises(RamctlError, match=r"imagereward.*batch_size"):
        score(scorer, noise(count=8), *["a cat"] * 8)


def test_the_self_test_compares_captions_and_never_raises(
    scorer: ImageRewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = scorer.self_test()  # random weights: either way, but with a reason
    assert result.summary
    assert scorer._engine is not None
    seen: list[int] = []

    def rewards(pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen.append(len(pixels))
        return torch.zeros(len(pixels))

    monkeypatch.setattr(scorer._engine[0], "rewards", rewards)
    assert not scorer.self_test().passed  # nothing is told apart
    assert sum(seen) == 9
