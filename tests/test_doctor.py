from __future__ import annotations

import http.server
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ramctl import doctor
from ramctl.doctor import Check
from ramctl.errors import MissingDependencyError
from ramctl.scorers import registry
from ramctl.scorers.base import Scorer, SelfTest


def test_quick_checks_are_well_on_the_machine_that_runs_the_tests() -> None:
    for function in (doctor.check_python, doctor.check_platform, doctor.check_cores, doctor.check_memory):
        check = function()
        assert check.status != "failed", check
        assert check.detail


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_OLDEST_PYTHON", (99, 0))
    check = doctor.check_python()
    assert check.status == "failed"
    assert check.remedy


def test_memory_is_read_from_the_system() -> None:
    total, free = doctor.memory_bytes()
    assert total is not None
    assert free is not None
    assert 0 < free <= total


@pytest.mark.parametrize(("bounds", "status"), [((0.0, 0.0), "ok"), ((0.0, 1e15), "warning"), ((1e15, 1e16), "failed")])
def test_too_little_memory_or_disk_is_said(
    bounds: tuple[float, float], status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "MEMORY_BOUNDS", bounds)
    monkeypatch.setattr(doctor, "DISK_BOUNDS", bounds)
    for check in (doctor.check_memory(), doctor.check_disk(tmp_path)):
        assert check.status == status
        assert bool(check.remedy) == (status != "ok")


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    check = doctor.check_disk(tmp_path / "absent")
    assert check.status == "failed"
    assert "cannot be written" in check.detail


class TestPackages:
    def test_what_the_project_asks_for_is_here(self) -> None:
        check = doctor.check_packages()
        assert check.status == "ok", check
        assert f"numpy {np.__version__}" in check.detail

    @pytest.mark.parametrize(
        ("requirement", "words"),
        [
            ("numpy>=999", f"numpy is {np.__version__} (needs >=999)"),
            ("no-such-package>=1", "no-such-package is missing (needs >=1)"),
            ("no-such-package", "no-such-package is missing (needs any version)"),
        ],
    )
    def test_missing_and_old_ones_are_named(self, requirement: str, words: str) -> None:
        check = doctor.check_packages(["rich", requirement])
        assert (check.status, check.detail) == ("failed", words)
        assert "pip install" in check.remedy

    def test_extras_and_other_platforms_are_not_asked_for(self) -> None:
        wanted = ["no-such-package; extra == 'dev'", "no-such-package; sys_platform == 'plan9'"]
        assert doctor.check_packages(wanted).status == "ok"


class TestTorch:
    def test_torch(self) -> None:
        import torch

        check = doctor.check_torch()
        assert check.status == "ok"
        assert torch.__version__ in check.detail
        assert "gloo" in check.detail

    def test_a_machine_without_gpu_is_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(doctor, "_NVIDIA_DRIVER", (Path("/no/driver"),))
        assert doctor.check_gpu().status == "ok"

    def test_a_driver_that_torch_cannot_use_is_a_warning(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(doctor, "_NVIDIA_DRIVER", (tmp_path,))
        monkeypatch.setattr(torch.version, "cuda", None)
        check = doctor.check_gpu()
        assert check.status == "warning"
        assert "a build without CUDA" in check.detail
        assert "https://" in check.remedy

    @pytest.mark.slow
    def test_diffusers_imports_without_chatter(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert doctor.check_diffusers().status == "ok"
        assert "torchvision" not in capfd.readouterr().err


class TestTorchvision:
    @pytest.fixture
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder that Python searches first, with a torchvision in it."""
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        (tmp_path / "torchvision").mkdir()
        return tmp_path / "torchvision" / "__init__.py"

    def test_one_that_does_not_import_is_a_warning_with_its_reason(self, place: Path) -> None:
        place.write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
        check = doctor.check_torchvision()
        assert check.status == "warning"
        assert "operator torchvision::nms does not exist" in check.detail
        assert "pip uninstall torchvision" in check.remedy
        assert "torchvision" not in sys.modules

    def test_one_that_kills_the_interpreter_is_a_warning(self, place: Path) -> None:
        place.write_text("import os\nos.abort()\n")
        assert doctor.check_torchvision().status == "warning"

    def test_one_that_imports_is_well(self, place: Path) -> None:
        place.write_text("__version__ = '0.26'\n")
        assert doctor.check_torchvision() == Check("torchvision", "ok", "0.26")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder in the layout of diffusers, with one part and real weights of six numbers."""
    from safetensors.numpy import save_file

    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    index = {"_class_name": "SomePipeline", "vae": ["diffusers", "AutoencoderKL"], "t5": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae" / "config.json").write_text("{}")
    save_file({"a": np.zeros((2, 3), dtype=np.float32)}, folder / "vae" / "weights.safetensors")
    return folder


class TestModel:
    def test_whole(self, model: Path) -> None:
        check = doctor.check_model(str(model))
        assert check.status == "ok"
        assert check.detail == f"SomePipeline, 1 parts, 0.0 M weights ({model})"

    def test_absent(self, tmp_path: Path) -> None:
        check = doctor.check_model(str(tmp_path / "no"))
        assert (check.status, check.detail) == ("failed", f"{tmp_path / 'no'} is absent")
        assert check.remedy

    @pytest.mark.parametrize(
        ("file", "content", "words"),
        [
            ("model_index.json", None, "model_index.json is absent"),
            ("model_index.json", b"{", "model_index.json cannot be read"),
            ("vae/config.json", b"[", "config.json cannot be read"),
            ("vae/weights.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
            ("vae/weights.safetensors", b"\x00" * 20, "is damaged"),
            ("vae/weights.safetensors", None, "holds no weights"),
        ],
    )
    def test_damaged(self, model: Path, file: str, content: bytes | None, words: str) -> None:
        if content is None:
            (model / file).unlink()
        else:
            (model / file).write_bytes(content)
        check = doctor.check_model(str(model))
        assert check.status == "failed"
        assert words in check.detail

    def test_cut_weights(self, model: Path) -> None:
        file = model / "vae" / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
        assert "is damaged" in doctor.check_model(str(model)).detail

    def test_part_of_the_index_without_a_folder(self, model: Path) -> None:
        shutil.rmtree(model / "vae")
        assert doctor.check_model(str(model)).detail == f"{model / 'vae'} is absent"


class TestPresets:
    def test_shipped_ones(self) -> None:
        check = doctor.check_presets()
        assert check.status == "ok"
        assert "geneval-tiny" in check.detail

    def test_a_broken_one_fails_and_stops_no_other_check(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "broken.toml").write_text('name = "broken"\nmm = 1\n')
        monkeypatch.setattr("ramctl.settings.resource_dir", lambda kind: tmp_path)
        check = doctor.check_presets()
        assert check.status == "failed"
        assert "broken: Unknown key 'mm'" in check.detail
        assert "scorer geneval" in [name for name, _ in doctor.all_checks()]


class TestTracking:
    @pytest.fixture(autouse=True)
    def _working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    @pytest.mark.slow
    def test_records_in_a_store_of_its_own_and_leaves_nothing(self, tmp_path: Path) -> None:
        check = doctor.check_tracking()
        assert check.status == "ok", check
        assert str(tmp_path / "mlflow.db") in check.detail
        assert list(tmp_path.iterdir()) == []

    @pytest.fixture
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Leaves the recording out, which the slow test covers: only the address is looked at."""
        monkeypatch.setattr("ramctl.tracking.make_tracker", lambda *_: _Tracker())

    @pytest.fixture
    def server(self) -> Iterator[str]:
        class Healthy(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/health" else 404)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as running:
            threading.Thread(target=running.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{running.server_port}"
            running.shutdown()

    @pytest.mark.usefixtures("quick")
    def test_server_that_answers(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        check = doctor.check_tracking()
        assert check.status == "ok", check
        assert server in check.detail

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize(
        ("uri", "words"),
        [
            ("http://127.0.0.1:9", "does not answer"),
            (
                "sqlite:////no/such/folder/mlflow.db",
                "/no/such/folder (MLFLOW_TRACKING_URI) cannot be written",
            ),
        ],
    )
    def test_store_out_of_reach(self, uri: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        check = doctor.check_tracking()
        assert check.status == "failed"
        assert words in check.detail
        assert "--tracking.kind none" in check.remedy


class _Tracker:
    def start(self, *_: object) -> str:
        return ""

    def finish(self, *_: object) -> None: ...


class _Sound(Scorer):
    name = "sound"
    version = "1"

    def self_test(self) -> SelfTest:
        return SelfTest(True, "2 of 2 right")


class _Wrong(_Sound):
    def self_test(self) -> SelfTest:
        return SelfTest(False, "1 of 2 right")


class _Missing(_Sound):
    def self_test(self) -> SelfTest:
        raise MissingDependencyError("No weights. Get them: ramctl download-weights sound")


class _NotInstalled(_Sound):
    def self_test(self) -> SelfTest:
        raise ModuleNotFoundError("No module named 'sound'")


class TestScorers:
    @pytest.mark.parametrize(
        ("scorer", "required", "status", "words"),
        [
            (_Sound, True, "ok", "ready: 2 of 2 right"),
            (_Wrong, False, "failed", "self-test failed: 1 of 2 right"),
            (_Missing, True, "failed", "Get them: ramctl download-weights sound"),
            (_Missing, False, "warning", "Get them: ramctl download-weights sound"),
            (_NotInstalled, False, "warning", "No module named 'sound'"),
        ],
    )
    def test_findings(
        self,
        scorer: type[Scorer],
        required: bool,
        status: str,
        words: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(registry, "create", lambda name, options: scorer())
        check = doctor.check_scorer("scorer sound", "sound", {}, required)
        assert check.status == status
        assert words in check.detail

    def test_unknown_scorer_or_option_of_a_preset_fails(self) -> None:
        assert "no scorer 'genval'" in doctor.check_scorer("x", "genval", {}, True).detail
        assert "no option 'parts'" in doctor.check_scorer("x", "geneval", {"parts": 1}, True).detail

    def test_every_scorer_is_checked_once(self) -> None:
        names = [name for name, _ in doctor.all_checks()]
        assert len(names) == len(set(names))
        assert [name for name in registry.available() if f"scorer {name}" not in names] == []

    def test_a_scorer_set_up_otherwise_by_a_preset_is_checked_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = 'name = "{}"\nextends = "./base.toml"\n[reward.scorers.geneval.options]\npartial = "{}"\n'
        base = '[model]\npath = "models/x"\n[prompts]\ntrain = "x"\n[reward.scorers.geneval]\n'
        (tmp_path / "base.toml").write_text('name = "base"\n' + base)
        (tmp_path / "same.toml").write_text(text.format("same", "clamped"))
        (tmp_path / "other.toml").write_text(text.format("other", "strict"))
        monkeypatch.setattr("ramctl.settings.resource_dir", lambda kind: tmp_path)
        names = [name for name, _ in doctor.all_checks() if name.startswith("scorer geneval")]
        assert names == ["scorer geneval", "scorer geneval (other)"]

    def test_the_drawn_scenes_are_judged_right_here(self) -> None:
        check = doctor.check_scorer("scorer geneval", "geneval", {}, True)
        assert check.status == "ok", check


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on() -> None:
    def broken() -> Check:
        raise ValueError("first\nsecond")

    found = list(doctor.run_checks([("one", broken), ("two", doctor.check_python)]))
    assert found[0] == Check("one", "failed", "the check broke: ValueError: first")
    assert found[1].status == "ok"
    assert not doctor.passed(found)


def test_warnings_do_not_fail() -> None:
    assert doctor.passed([Check("a", "ok", ""), Check("b", "warning", "")])
    assert not doctor.passed([Check("a", "ok", ""), Check("b", "failed", "")])
