"""The PaddleOCR engine without PaddleOCR: what is asked of it, how its answers are read, what is missing.

Reading itself is proven with the real packages by tests/parity/paddle_engine.py; the stand-in here only records.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ramctl.errors import MissingDependencyError, ScorerError, UsageError
from ramctl.prompts import Prompt
from ramctl.scorers.ocr import OcrScorer, paddle
from ramctl.scorers.registry import create
from ramctl.weights import OTHER_VARIABLE, ROOT_VARIABLE, entry_folder, find_entry
from ramctl.weights.store import Record, Recorded, write_record

BLANK = np.full((64, 64, 3), 90, dtype=np.uint8)
OPEN = Prompt('a sign that says "open"')

STAND_IN = """
import os
made, seen, answers = [], [], []
environment = dict(os.environ)

class PaddleOCR:
    def __init__(self, **options):
        made.append(options)

    def predict(self, picture):
        seen.append(picture)
        return answers.pop() if answers else [{"rec_texts": ["Open"], "rec_scores": [0.9]}]
"""
STAND_IN_PADDLE = """
import signal
cuda = False
signal.signal(signal.SIGTERM, signal.SIG_IGN)

def disable_signal_handler():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

def is_compiled_with_cuda():
    return cuda
"""


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and an empty cache of PaddleOCR's."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "store"))
    monkeypatch.setenv("PADDLE_PDX_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "store"


def stored(entry: str, model: str) -> Path:
    """The entry as ``ramctl download-weights`` leaves it."""
    model_folder(entry_folder(entry), model, "inference.json", "inference.pdiparams")
    return entry_folder(entry)


def model_folder(folder: Path, name: str, *files: str) -> str:
    folder.mkdir(parents=True)
    (folder / "inference.yml").write_text(f"Global:\n  model_name: {name}\n")
    for file in files:
        (folder / file).write_bytes(file.encode())
    return str(folder)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Folders of two models with Paddle weights, as options."""
    files = ("inference.json", "inference.pdiparams")
    return {
        "detection_dir": model_folder(tmp_path / "det", "A_det", *files),
        "recognition_dir": model_folder(tmp_path / "rec", "B_rec", *files),
    }


@pytest.fixture
def onnx_models(tmp_path: Path) -> dict[str, str]:
    return {
        "detection_dir": model_folder(tmp_path / "onnx-det", "A_det", "inference.onnx"),
        "recognition_dir": model_folder(tmp_path / "onnx-rec", "B_rec", "inference.onnx"),
    }


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with modules and metadata under the packages' names, which Python searches first."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "paddleocr.py").write_text(STAND_IN)
    (site / "paddle.py").write_text(STAND_IN_PADDLE)
    for name, version in (("paddleocr", "3.7.0"), ("paddlepaddle", "3.3.1")):
        (site / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(str(site))
    for variable in ("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "GLOG_minloglevel"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield site
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in ("paddleocr", "paddle"):
        sys.modules.pop(name, None)


def stand_in() -> Any:
    return sys.modules["paddleocr"]


def scorer(threads: int = 1, **options: Any) -> OcrScorer:
    return OcrScorer(threads=threads, engine="paddleocr", device=options.pop("device", "cpu"), **options)


# --- what is asked of it


@pytest.mark.usefixtures("installed")
def test_every_setting_that_changes_what_is_read_is_given(models: dict[str, str]) -> None:
    scorer(detector_side=192, **models).ensure_loaded()
    assert stand_in().made == [
        {
            "text_detection_model_name": "A_det",
            "text_detection_model_dir": models["detection_dir"],
            "text_recognition_model_name": "B_rec",
            "text_recognition_model_dir": models["recognition_dir"],
            "use_doc_orientation_classify": False,
            "use_doc_unwarping": False,
            "use_textline_orientation": False,
            "text_det_limit_type": "min",
            "text_det_limit_side_len": 192,
            "text_det_thresh": 0.3,
            "text_det_box_thresh": 0.6,
            "text_det_unclip_ratio": 1.5,
            "text_rec_score_thresh": 0.0,
            "device": "cpu",
            "enable_mkldnn": False,
            "cpu_threads": 1,
        }
    ]
    assert stand_in().environment["PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK"] == "True"


@pytest.mark.usefixtures("installed")
def test_onnx_folders_are_run_by_onnx_runtime_on_one_thread(onnx_models: dict[str, str]) -> None:
    scorer(**onnx_models).ensure_loaded()
    options = stand_in().made[0]
    assert options["engine"] == "onnxruntime"
    assert options["engine_config"] == {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
    assert "enable_mkldnn" not in options


@pytest.mark.usefixtures("installed")
def test_pictures_arrive_as_blue_green_red(models: dict[str, str]) -> None:
    made = scorer(**models)
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    image[..., 0] = 250
    made.score(image[None], [OPEN])
    picture = stand_in().seen[-1]
    assert picture[0, 0].tolist() == [0, 0, 250] and picture.flags.c_contiguous


@pytest.mark.usefixtures("installed")
def test_long_strips_are_padded_first(models: dict[str, str]) -> None:
    scorer(**models).score(np.zeros((1, 1, 500, 3), dtype=np.uint8), [OPEN])
    assert stand_in().seen[-1].shape == (50, 500, 3)


@pytest.mark.usefixtures("installed")
def test_each_thread_has_an_engine_of_its_own(models: dict[str, str]) -> None:
    made = scorer(threads=2, **models)
    made.ensure_loaded()
    together = threading.Barrier(2, timeout=10)

    class Both(list[Any]):
        def append(self, picture: Any) -> None:
            together.wait()

    stand_in().seen = Both()
    made.score(np.stack([BLANK, BLANK]), [OPEN, OPEN])
    assert len(stand_in().made) == 2


# --- how its answers are read


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("pages", "text", "value"),
    [
        ([{"rec_texts": ["Op", "en"], "rec_scores": [0.9, 0.2]}], "Op en", 1.0),
        ([{"rec_texts": ["open", "ghost"], "rec_scores": np.array([0.9, 0.0])}], "open", 1.0),
        ([{"rec_texts": ["opem"], "rec_scores": [0.01]}], "opem", 0.75),
        ([{"rec_texts": [], "rec_scores": []}], "", 0.0),
        ([], "", 0.0),
    ],
)
def test_answers(models: dict[str, str], pages: list[Any], text: str, value: float) -> None:
    made = scorer(**models)
    made.ensure_loaded()
    stand_in().answers.append(pages)
    scores = made.score(BLANK[None], [OPEN])
    assert scores.records[0] == {"text": text, "target": "open"}
    assert scores.value[0] == pytest.approx(value)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("pages", [None, [{"texts": ["open"]}], [{"rec_texts": ["a", "b"], "rec_scores": [0.5]}]])
def test_an_answer_of_another_form_is_a_failure_not_a_zero(models: dict[str, str], pages: Any) -> None:
    made = scorer(**models)
    made.ensure_loaded()
    stand_in().answers.append(pages)
    # None stands for no answer in the list; PaddleOCR 2 gave None for a picture without text.
    scores = made.score(BLANK[None], [OPEN])
    assert scores.failed[0] and np.isnan(scores.value[0])


# --- where it runs


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("option", "torch_says", "cuda_build", "device", "readers"),
    [
        ("cpu", "cuda:1", True, "cpu", 8),
        ("auto", "cuda:1", True, "gpu:1", 1),
        ("auto", "cuda:1", False, "cpu", 8),
        ("auto", "cpu", True, "cpu", 8),
        ("cuda:1", "cuda:1", True, "gpu:1", 1),
        ("cuda", "cuda", True, "gpu:0", 1),
    ],
)
def test_devices(
    models: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    torch_says: str,
    cuda_build: bool,
    device: str,
    readers: int,
) -> None:
    import torch

    monkeypatch.setattr(paddle, "scorer_device", lambda asked: torch.device(torch_says))
    monkeypatch.setattr(paddle, "_paddle_has_cuda", lambda: cuda_build)
    made = scorer(device=option, **models)
    made.ensure_loaded()
    assert stand_in().made[0]["device"] == device
    assert made.engine.most_readers() == readers


@pytest.mark.usefixtures("installed")
def test_a_gpu_that_this_paddlepaddle_cannot_use_is_refused(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(paddle, "scorer_device", lambda asked: torch.device("cuda:0"))
    with pytest.raises(UsageError, match="CPU build"):
        scorer(device="cuda", **models).ensure_loaded()


@pytest.mark.usefixtures("installed")
def test_the_process_keeps_its_signal_handlers(models: dict[str, str]) -> None:
    def mine(number: int, frame: object) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    scorer(**models).ensure_loaded()
    assert signal.getsignal(signal.SIGTERM) is mine


# --- names and folders


@pytest.mark.usefixtures("installed")
def test_the_version_names_packages_models_and_side(models: dict[str, str], onnx_models: dict[str, str]) -> None:
    version = scorer(detector_side=192, **models).version
    head = "ocr/flow-grpo-ocr-1/paddleocr-3.7.0+paddlepaddle-3.3.1/"
    assert version.startswith(head + "A_det-") and "/B_rec-" in version and version.endswith("/side-192")
    assert scorer(**onnx_models).version.startswith("ocr/flow-grpo-ocr-1/paddleocr-3.7.0+onnxruntime-")
    (Path(models["recognition_dir"]) / "inference.pdiparams").write_bytes(b"other weights")
    paddle.fingerprint.cache_clear()
    assert scorer(detector_side=192, **models).version != version


def test_absent_packages_and_models_are_named_with_their_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PADDLE_PDX_CACHE_HOME", str(tmp_path / "a b"))
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    monkeypatch.setitem(sys.modules, "paddle", None)
    made = scorer()
    package, detection, recognition = made.missing()
    assert package.endswith("needs paddleocr and paddlepaddle, not installed here: pip install 'ramctl[paddle]'")
    assert detection.endswith("PP-OCRv3_mobile_det, which is not here: ramctl download-weights pp-ocrv3-mobile-det")
    assert recognition.endswith(": ramctl download-weights en-pp-ocrv4-mobile-rec")
    for ask in (made.ensure_loaded, lambda: made.version):
        with pytest.raises(MissingDependencyError) as caught:
            ask()
        assert str(caught.value) == "\n".join([package, detection, recognition])
    chosen = scorer(detection_model="PP-OCRv5_server_det").missing()[1]
    folder = tmp_path / "a b" / "official_models"
    assert f"hf download PaddlePaddle/PP-OCRv5_server_det --local-dir '{folder}/PP-OCRv5_server_det'" in chosen


@pytest.mark.usefixtures("installed")
def test_the_stores_models_come_before_the_cache_and_after_a_folder_given(
    models: dict[str, str], tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "official_models"
    for name in (paddle.DETECTION_MODEL, paddle.RECOGNITION_MODEL):
        model_folder(cache / name, name, "inference.json", "inference.pdiparams")
    detection = stored("pp-ocrv3-mobile-det", paddle.DETECTION_MODEL)
    made = scorer()
    made.ensure_loaded()
    asked = stand_in().made[0]
    assert asked["text_detection_model_dir"] == str(detection)
    assert asked["text_recognition_model_dir"] == str(cache / paddle.RECOGNITION_MODEL)
    scorer(detection_dir=models["detection_dir"]).ensure_loaded()
    assert stand_in().made[1]["text_detection_model_dir"] == models["detection_dir"]


@pytest.mark.usefixtures("installed")
def test_the_stores_entries_are_whole_models_of_the_default_pair() -> None:
    for entry, model in (
        ("pp-ocrv3-mobile-det", paddle.DETECTION_MODEL),
        ("en-pp-ocrv4-mobile-rec", paddle.RECOGNITION_MODEL),
    ):
        assert find_entry(entry).repo == f"PaddlePaddle/{model}"
        stored(entry, model)
        assert {file.path for file in find_entry(entry).files} == {path.name for path in entry_folder(entry).iterdir()}
    made = scorer()
    assert made.missing() == []
    assert f"/{paddle.DETECTION_MODEL}-" in made.version


@pytest.mark.usefixtures("installed")
def test_a_model_of_the_store_that_has_changed_since_its_download_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(OTHER_VARIABLE, raising=False)
    for entry, model in (
        ("pp-ocrv3-mobile-det", paddle.DETECTION_MODEL),
        ("en-pp-ocrv4-mobile-rec", paddle.RECOGNITION_MODEL),
    ):
        stored(entry, model)
    file = entry_folder("pp-ocrv3-mobile-det") / "inference.pdiparams"
    downloaded = Recorded(file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    write_record(file.parent, Record(files={file.name: downloaded}))
    scorer().ensure_loaded()
    file.write_bytes(b"?" * downloaded.size)
    os.utime(file, (0, 0))  # a clock's tick may be longer than this test
    with pytest.raises(MissingDependencyError, match=r"download-weights pp-ocrv3-mobile-det"):
        scorer().ensure_loaded()


@pytest.mark.usefixtures("installed")
def test_a_download_cut_short_is_named_and_a_whole_model_in_the_cache_used_instead(tmp_path: Path) -> None:
    stored("en-pp-ocrv4-mobile-rec", paddle.RECOGNITION_MODEL)
    folder = stored("pp-ocrv3-mobile-det", paddle.DETECTION_MODEL)
    (folder / "inference.pdiparams").unlink()
    (line,) = scorer().missing()
    assert str(folder / "inference.pdiparams") in line
    assert line.endswith("is not there: ramctl download-weights pp-ocrv3-mobile-det")
    name = paddle.DETECTION_MODEL
    model_folder(tmp_path / "cache" / "official_models" / name, name, "inference.json", "inference.pdiparams")
    assert scorer().missing() == []


@pytest.mark.usefixtures("installed")
def test_models_in_the_cache_are_used_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLE_PDX_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "official_models"
    model_folder(cache / paddle.DETECTION_MODEL, paddle.DETECTION_MODEL, "inference.pdmodel", "inference.pdiparams")
    made = scorer(recognition_model="PP-OCRv5_server_rec")
    assert [line.partition("model ")[2].partition(",")[0] for line in made.missing()] == ["PP-OCRv5_server_rec"]
    name = "PP-OCRv5_server_rec"
    model_folder(cache / name, name, "inference.json", "inference.pdiparams")
    made.ensure_loaded()
    assert stand_in().made[0]["text_detection_model_name"] == "PP-OCRv3_mobile_det"
    assert stand_in().made[0]["text_recognition_model_dir"] == str(cache / name)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "absent", ["inference.yml", "inference.json", "inference.pdiparams"], ids=lambda name: f"without {name}"
)
def test_an_incomplete_folder_is_named_with_what_it_needs(models: dict[str, str], absent: str) -> None:
    (Path(models["recognition_dir"]) / absent).unlink()
    with pytest.raises(MissingDependencyError) as caught:
        scorer(**models).ensure_loaded()
    assert f"{models['recognition_dir']} (recognition_dir)" in str(caught.value) and "inference.onnx" in str(
        caught.value
    )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("text", ["Global: 3", "{", "Other: {}"])
def test_settings_that_name_no_model_are_refused(models: dict[str, str], text: str) -> None:
    (Path(models["detection_dir"]) / "inference.yml").write_text(text)
    with pytest.raises(UsageError, match=r"inference\.yml names no model"):
        scorer(**models).ensure_loaded()


@pytest.mark.usefixtures("installed")
def test_a_folder_with_another_model_is_refused(models: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"holds the model A_det, but detection_model is 'PP-OCRv5_server_det'"):
        scorer(detection_model="PP-OCRv5_server_det", **models).ensure_loaded()


@pytest.mark.usefixtures("installed")
def test_two_kinds_of_weights_are_refused(models: dict[str, str], onnx_models: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="must both hold Paddle weights or both ONNX"):
        scorer(detection_dir=models["detection_dir"], recognition_dir=onnx_models["recognition_dir"]).ensure_loaded()


# --- what does not start


def test_a_package_that_does_not_import_is_named(installed: Path, models: dict[str, str]) -> None:
    (installed / "paddleocr.py").write_text("raise ImportError('libGL.so.1')")
    with pytest.raises(MissingDependencyError, match=r"libGL\.so\.1.*pip install 'ramctl\[paddle\]'"):
        scorer(**models).ensure_loaded()


def test_an_engine_that_does_not_start_is_an_error_of_the_scorer(installed: Path, models: dict[str, str]) -> None:
    (installed / "paddleocr.py").write_text("class PaddleOCR:\n    def __init__(self, **_): raise ValueError('no')\n")
    with pytest.raises(ScorerError, match=r"does not start \(ValueError: no\).*ramctl\[paddle\]"):
        scorer(**models).ensure_loaded()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "paddelocr"}, "engine is 'paddelocr'|input should be"),
        ({"detection_dir": "/x"}, "detection_dir is for the engine paddleocr"),
        ({"recognition_model": "x"}, "recognition_model is for the engine paddleocr"),
        ({"device": "cuda"}, "rapidocr reads on the CPU"),
    ],
)
def test_options_that_do_not_fit_the_engine_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        create("ocr", options)
    with pytest.raises(UsageError):
        OcrScorer(**options)  # type: ignore[arg-type]


def test_choosing_the_engine_and_asking_what_is_missing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ramctl.scorers.registry import create; create('ocr', {'engine': 'paddleocr'}).missing();"
        "print(sorted({'torch', 'cv2', 'rapidocr', 'onnxruntime', 'paddle', 'paddleocr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
