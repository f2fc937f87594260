from __future__ import annotations

import hashlib
import os
from collections import OrderedDict

import numpy as np
import pytest
import torch

from ramctl.errors import ScorerError
from ramctl.scorers.geneval import mask2former, mmdet_checkpoint
from ramctl.scorers.geneval.mmdet_checkpoint import convert, merge_order, read_checkpoint

#: SHA-256 of the sorted "name shape" lines of the official network's weights (without relative_position_index), built
#: by MMDetection itself from the official configuration (mmdet 2.28.2 with mmcv 1.7.2; mmdet 3.3.0 with mmcv 2.1.0).
OFFICIAL_NAMES = {
    2: "558cc4db903357e40a0c6baa32786a2d22a26232bd9d37155cdbae0257592711",
    3: "beab2526efb2e3a6addc9f184c59bdfbdda15119c05d5f194efbf338e1fb676d",
}


@pytest.fixture(scope="module")
def full_size_state():
    """The official network's weights, names and shapes only."""
    from transformers import Mask2FormerForUniversalSegmentation

    with torch.device("meta"):
        return Mask2FormerForUniversalSegmentation(mask2former.network_config()).state_dict()


def test_patch_merging_computes_what_mmdetection_does():
    from transformers.models.swin.modeling_swin import SwinPatchMerging

    torch.manual_seed(0)
    channels = 5
    norm, reduction = torch.nn.LayerNorm(4 * channels), torch.nn.Linear(4 * channels, 2 * channels, bias=False)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    theirs = SwinPatchMerging(channels)
    theirs.norm.load_state_dict({name: merge_order(weight) for name, weight in norm.state_dict().items()})
    theirs.reduction.load_state_dict({"weight": merge_order(reduction.weight.detach())})
    features = torch.randn(2, channels, 6, 8)
    with torch.no_grad():
        unfolded = torch.nn.functional.unfold(features, 2, stride=2).transpose(1, 2)  # as MMDetection's PatchMerging
        expected = reduction(norm(unfolded))
        actual = theirs(features.flatten(2).transpose(1, 2), (6, 8))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("version", [2, 3])
def test_the_full_size_network_wants_exactly_the_official_weights(version, full_size_state, as_mmdetection):
    state = as_mmdetection(full_size_state, version)
    lines = [
        f"{name} {'x'.join(map(str, tensor.shape))}"
        for name, tensor in sorted(state.items())
        if not name.endswith("relative_position_index")
    ]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == OFFICIAL_NAMES[version]
    assert sum(t.numel() for k, t in state.items() if not k.endswith("relative_position_index")) == 68_739_547
    converted = convert(state, full_size_state, "FILE")
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in full_size_state.items()}


@pytest.mark.parametrize("version", [2, 3])
def test_both_layouts_give_back_every_weight(version, make_network, as_mmdetection):
    weights = make_network().state_dict()
    converted = convert(as_mmdetection(weights, version), weights, "FILE")
    assert converted.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(converted[name], tensor), name


def test_a_missing_weight_is_named(make_network, as_mmdetection):
    weights = make_network().state_dict()
    state = as_mmdetection(weights)
    del state["backbone.stages.1.downsample.norm.bias"]
    with pytest.raises(ScorerError) as caught:
        convert(state, weights, "detector.pth")
    message = str(caught.value)
    assert "detector.pth" in message
    assert "1 weights missing (first: backbone.stages.1.downsample.norm.bias)" in message
    assert "ramctl download-weights mask2former-swin-s-coco" in message


def test_a_weight_there_is_no_place_for_is_named(make_network, as_mmdetection):
    weights = make_network().state_dict()
    state = {**as_mmdetection(weights, 3), "backbone.stages.0.blocks.1.norm1.weight": torch.ones(8)}
    with pytest.raises(ScorerError, match=r"1 weights unknown \(first: backbone\.stages\.0\.blocks\.1\.norm1\.weight"):
        convert(state, weights, "FILE")


def test_another_size_of_the_network_is_refused(full_size_state, make_network, as_mmdetection):
    with pytest.raises(ScorerError, match=r"of another shape \(first: .*expected \(96"):
        convert(as_mmdetection(make_network().state_dict()), full_size_state, "FILE")


def test_the_same_network_under_the_hubs_names_is_refused(make_network):
    # facebook/mask2former-swin-small-coco-instance has other weights: not GenEval's detector.
    weights = make_network().state_dict()
    with pytest.raises(ScorerError, match="is not MMDetection's Mask2Former Swin-S"):
        convert(weights, weights, "FILE")


# --- files


def save(content, file):
    torch.save(content, file)
    return file


def test_meta_of_training_is_read_past(tmp_path):
    meta = {
        "mmdet_version": "2.25.0",
        "CLASSES": ("person", "car"),
        "PALETTE": [(220, 20, 60)],
        "hook_msgs": OrderedDict(best_score=np.float64(0.46), losses=np.arange(3.0)),
        "seed": None,
    }
    weights = {"a": torch.arange(3.0)}
    for content in ({"meta": meta, "state_dict": weights}, {"state_dict": OrderedDict(weights)}, weights):
        read = read_checkpoint(save(content, tmp_path / "x.pth"))
        assert read.keys() == {"a"} and torch.equal(read["a"], weights["a"])


class Trap:
    def __reduce__(self):
        return os.mkdir, (Trap.folder,)


def test_nothing_in_a_file_is_executed(tmp_path):
    Trap.folder = str(tmp_path / "sprung")
    file = save({"meta": Trap(), "state_dict": {"a": torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(ScorerError, match=r"x\.pth cannot be read as weights: it holds a .*mkdir, which is not loaded"):
        read_checkpoint(file)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="truncated"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"<!DOCTYPE html><html>Not Found</html>", id="an error page"),
        pytest.param(lambda content: os.urandom(1000), id="noise"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(damage, tmp_path):
    file = save({"state_dict": {"a": torch.ones(1000)}}, tmp_path / "x.pth")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ScorerError, match=r"x\.pth .*ramctl download-weights mask2former-swin-s-coco") as caught:
        read_checkpoint(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"state_dict": {"a": 1}}, [torch.ones(1)], "weights"])
def test_a_file_without_weights_is_refused(content, tmp_path):
    with pytest.raises(ScorerError, match="holds no weights"):
        read_checkpoint(save(content, tmp_path / "x.pth"))


def test_building_the_network_leaves_the_random_state_alone(make_network):
    torch.manual_seed(3)
    with mmdet_checkpoint.untouched_random_state():
        torch.randn(10)
    after = torch.randn(2)
    torch.manual_seed(3)
    assert torch.equal(after, torch.randn(2))
