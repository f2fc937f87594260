"""The official GenEval detector beside ours, on the same random full-size weights and the same pictures.

Official: MMDetection 2.28.2 with mmcv 1.7.2, ``inference_detector`` from pixels to boxes and masks, its weights written
by mmcv's own ``save_checkpoint``. Ours reads that file. The class head is sharpened, so that scores spread over
[0, 1] and cross GenEval's thresholds, as those of trained weights do.

mmcv's compiled operators are not built: deformable attention has a plain torch version, which mmcv takes on a CPU.

Run it by ``nox -s parity_mask2former``; it prints RESULT lines and exits with 1 when a difference is beyond rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ramctl.scorers.geneval import mask2former, mmdet_checkpoint
from ramctl.scorers.geneval.coco import CLASS_NAMES
from ramctl.scorers.geneval.rules import SCORE_THRESHOLD, select

CONFIG = "mmdet/.mim/configs/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py"
#: float32 rounding through some forty layers, multiplied by the sharpened head. PIL's resizing instead of OpenCV's, or
#: zeros instead of 128 around the picture, move scores by far more.
SCORE_TOLERANCE = 5e-5


def without_compiled_operators() -> None:
    """Let mmcv import without its extension and torchvision; calling an operator of either fails."""
    # It looks for torchvision when it is imported, and must not find what stands in for it below.
    from transformers import Mask2FormerForUniversalSegmentation  # noqa: F401

    class Extension(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)

            def absent(*_: Any, **__: Any) -> None:
                raise RuntimeError(f"the compiled operator {name} is not built")

            return absent

    for name in ("mmcv._ext", "torchvision", "torchvision.models", "torchvision.ops", "torchvision.transforms"):
        sys.modules[name] = Extension(name)
    sys.modules["torchvision"].__dict__["__version__"] = "0.0"


def official_model(seed: int, sharpness: float) -> Any:
    """MMDetection's network with random weights."""
    import mmcv
    import mmdet
    from mmdet.apis import init_detector

    config = mmcv.Config.fromfile(str(Path(mmdet.__file__).parents[1] / CONFIG))
    config.model.backbone.init_cfg = None
    torch.manual_seed(seed)
    model = init_detector(config, None, device="cpu")
    with torch.no_grad():
        # As trained weights are, and fresh ones are not: every weight matters (biases are not 0, norms not 1).
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".gn." in name or name.endswith("bias_table"):
                weight.add_(0.1 * torch.randn_like(weight))
        model.panoptic_head.cls_embed.weight.mul_(sharpness)
    model.CLASSES = tuple(CLASS_NAMES)
    return model


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Blurred colour noise with a few flat discs: edges at all scales, uint8 [H, W, 3]."""
    import cv2

    rng = np.random.default_rng(seed)
    layers = [
        cv2.resize(rng.uniform(0, 255, (max(height // s, 2), max(width // s, 2), 3)), (width, height))
        for s in (2, 16, 64)
    ]
    image = np.ascontiguousarray(np.mean(layers, axis=0).astype(np.uint8))
    for _ in range(6):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.circle(image, centre, int(rng.integers(8, min(height, width) // 4)), rng.integers(0, 256, 3).tolist(), -1)
    return image


def rows(classes: list[np.ndarray], masks: list[list[np.ndarray]]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(class, box and score [5], mask) of each of the official detections, by class and score."""
    return [
        (label, boxes[i], masks[label][i])
        for label, boxes in enumerate(classes)
        for i in np.argsort(-boxes[:, 4], kind="stable")
    ]


def compare(model: Any, network: Any, image: np.ndarray, order: mask2former.ChannelOrder) -> dict[str, float]:
    """Differences of the hundred best candidates, and of what GenEval keeps of them."""
    from mmdet.apis import inference_detector

    # The official code takes BGR, unless it is fed as Flow-GRPO feeds it.
    fed = image[:, :, ::-1] if order == "rgb" else image
    official = rows(*inference_detector(model, np.ascontiguousarray(fed)))
    with torch.inference_mode():
        pixels = torch.from_numpy(mask2former.network_input(image[None], order))
        output = network.forward(pixels)
        padded = (pixels.shape[1], pixels.shape[2])
        logits = output.class_queries_logits[0], output.masks_queries_logits[0]
        ours = mask2former.segments(*logits, padded, image.shape[:2], threshold=-1.0)
    ours.sort(key=lambda s: (CLASS_NAMES.index(s.class_name), -s.score))
    assert len(ours) == len(official) == 100, (len(ours), len(official))
    score = box = mask = 0.0
    labels = 0
    for (label, measured, official_mask), segment in zip(official, ours, strict=True):
        labels += CLASS_NAMES[label] != segment.class_name
        score = max(score, abs(float(measured[4]) - segment.score))
        box = max(box, float(np.abs(measured[:4] - np.array(segment.box)).max()))
        left, top, right, bottom = (int(v) for v in segment.box)
        whole = np.zeros(image.shape[:2], dtype=bool)
        whole[top:bottom, left:right] = segment.mask
        mask = max(mask, float((whole != official_mask).sum()))
    kept = {k: len(v) for k, v in select(network(image[None], order)[0], SCORE_THRESHOLD).items()}
    wanted: dict[str, int] = {}
    for label, measured, _ in official:
        if measured[4] > SCORE_THRESHOLD:
            wanted[CLASS_NAMES[label]] = min(wanted.get(CLASS_NAMES[label], 0) + 1, 16)
    return {
        "labels_differ": labels,
        "score_difference": score,
        "box_difference": box,
        "mask_pixels_differ": mask,
        "kept_official": sum(wanted.values()),
        "kept_differ": sum(abs(kept.get(n, 0) - wanted.get(n, 0)) for n in {*kept, *wanted}),
        "best_score": max(float(measured[4]) for _, measured, _ in official),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sharpness", type=float, default=12.0, help="factor on the class head's random weights")
    parser.add_argument("--sizes", default="512x512,300x400,427x640", help="heights x widths of the pictures")
    arguments = parser.parse_args()
    without_compiled_operators()
    import mmcv
    import mmcv.runner
    import mmdet

    model = official_model(0, arguments.sharpness)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / mmdet_checkpoint.FILE
        meta = {"mmdet_version": mmdet.__version__, "CLASSES": model.CLASSES, "PALETTE": [(1, 2, 3)], "epoch": 50}
        meta |= {"config": model.cfg.pretty_text, "hook_msgs": {"best": np.float64(0.46)}}
        mmcv.runner.save_checkpoint(model, str(file), meta=meta)
        network = mask2former._Network(file, torch.device("cpu"), "float32")
    print(f"RESULT versions=mmdet-{mmdet.__version__}/mmcv-{mmcv.__version__}/torch-{torch.__version__}")
    failed = False
    picked: dict[mask2former.ChannelOrder, float] = {}
    for number, size in enumerate(arguments.sizes.split(",")):
        height, width = (int(side) for side in size.split("x"))
        for order in mask2former.CHANNEL_ORDERS if number == 0 else mask2former.CHANNEL_ORDERS[:1]:
            found = compare(model, network, picture(number, height, width), order)
            if number == 0:
                picked[order] = found["best_score"]
            for key, value in found.items():
                print(f"RESULT {size}_{order}_{key}={value:.3g}", flush=True)
            failed |= found["score_difference"] > SCORE_TOLERANCE or found["best_score"] < SCORE_THRESHOLD
            failed |= bool(found["labels_differ"] or found["kept_differ"] or found["box_difference"] > 1)
    # The comparison must be able to fail: the two channel orders have to disagree by much more than the tolerance.
    sensitivity = abs(picked["rgb"] - picked["swapped"])
    print(f"RESULT channel_order_moves_best_score={sensitivity:.3g}")
    return int(failed or sensitivity < 10 * SCORE_TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
