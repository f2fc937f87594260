"""A short training run in its folder, and what tests of whole runs look at and break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ramctl import training
from ramctl.engine.checkpoint import MANIFEST_FILE
from ramctl.hashing import file_sha256
from ramctl.heldout import HeldOut
from ramctl.observer import SilentObserver
from ramctl.scorers.base import Images, ImageScore
from ramctl.scorers.jpeg import JpegCompressibility
from ramctl.settings import load_settings
from ramctl.training import Outcome, train

Start = Callable[..., Outcome]
UNTIMED = ("seconds/", "images_per_second")


class Listener(SilentObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self.evaluations: list[float] = []
        self.first: int | None = None

    def note(self, text: str) -> None:
        self.notes.append(text)

    def started(self, step: int, steps: int, folder: Path) -> None:
        self.first = step

    def step(self, metrics: dict[str, float], steps: int) -> None:
        self.steps.append(int(metrics["step"]))

    def evaluated(self, row: dict[str, float]) -> None:
        self.evaluations.append(row["step"])


@pytest.fixture(scope="session", name="start")
def start_fixture(tiny_preset: Path) -> Start:
    """Runs the tiny preset for four steps with a checkpoint and an evaluation after every second."""

    def run(
        output: Path, *overrides: tuple[str, str], fresh: bool = False, observer: SilentObserver | None = None
    ) -> Outcome:
        basis = [
            ("train.steps", "4"),
            ("checkpoint.every", "2"),
            ("evaluation.every", "2"),
            ("rollout.sampling_steps", "1"),
            ("rollout.guidance_scale", "1"),
            ("evaluation.sampling_steps", "1"),
            ("evaluation.guidance_scale", "1"),
            ("picture_prompts", "2"),
            ("threads", "1"),
        ]
        settings = load_settings(str(tiny_preset), overrides=[*basis, *overrides])
        return train(settings, output=output, fresh=fresh, observer=observer)

    return run


@pytest.fixture(scope="session", name="finished")
def finished_fixture(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Listener]:
    """A finished run; read it, and copy it to change it."""
    listener = Listener()
    return start(tmp_path_factory.mktemp("finished") / "run", observer=listener), listener


@pytest.fixture(name="half")
def half_fixture(finished: tuple[Outcome, Listener], tmp_path: Path) -> Path:
    """A copy of the finished run as a kill in the middle of step 4 left it: checkpoint 2, metrics of step 3."""
    folder = tmp_path / "half"
    shutil.copytree(finished[0].folder, folder, symlinks=True)
    shutil.rmtree(folder / "step-000004")
    for link in ("latest", "best"):
        (folder / link).unlink()
        (folder / link).symlink_to("step-000002")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    (folder / "report.html").unlink()
    for path in (folder / "samples").glob("step-000004*"):
        path.unlink()
    evaluations = (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (folder / "evaluations.jsonl").write_text("".join(evaluations[:2]))
    return folder


@pytest.fixture(name="plain_report")
def plain_report_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of two words in place of the drawn one, which takes most of the time of so short a run."""
    monkeypatch.setattr(
        training, "write_report", lambda path, report: path.write_text(f"{report.status} {report.reason}")
    )


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, object]]:
    parsed = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(UNTIMED)} for row in parsed]


def tensors(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint (a file's header lists them in any order)."""
    found = {}
    for path in folder.glob("*.safetensors"):
        found.update({f"{path.name}/{name}": value.numpy().tobytes() for name, value in load_file(path).items()})
    assert len(found) > 100
    return found


def change_state(checkpoint: Path, **changes: object) -> None:
    """Change what a checkpoint knows besides tensors, manifest included; None takes a key away."""
    path, manifest_path = checkpoint / "state.json", checkpoint / MANIFEST_FILE
    state = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    manifest = json.loads(manifest_path.read_text())
    manifest["sha256"]["state.json"] = file_sha256(path)
    manifest_path.write_text(json.dumps(manifest))


def failing_evaluation(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Evaluations of the trained weights raise ``error``."""
    evaluate = HeldOut.evaluate

    def failing(self: HeldOut, which: str, step: int) -> object:
        if which == "evaluation":
            raise error
        return evaluate(self, which, step)  # type: ignore[arg-type]

    monkeypatch.setattr(HeldOut, "evaluate", failing)


def broken_pictures(monkeypatch: pytest.MonkeyPatch, *, from_picture: int, every: int, value: float | None) -> None:
    """The JPEG scorer fails (or gives ``value``) on every ``every``-th picture it sees after ``from_picture``."""
    seen = 0
    score = JpegCompressibility.score_image

    def failing(self: JpegCompressibility, image: Images, prompt: object) -> ImageScore:
        nonlocal seen
        if image.shape[0] == 64:  # not the self-test's
            seen += 1
            if seen > from_picture and (seen - from_picture) % every == 0:
                if value is None:
                    raise ValueError("unreadable picture")
                return ImageScore(value)
        return score(self, image, prompt)  # type: ignore[arg-type]

    monkeypatch.setattr(JpegCompressibility, "score_image", failing)
