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

from ramctl import doctor, doctor_scorers
from ramctl.doctor_check import Check
from ramctl.errors import MissingDependencyError
from ramctl.scorers import registry
from ramctl.scorers.base import Scorer, SelfTest
from ramctl.settings import load_settings
from ramctl.weights import ROOT_VARIABLE, load_manifest


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


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store with nothing in it."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "no-weights"))


class TestWhatPresetsMiss:
    def test_an_embedded_one_has_everything(self) -> None:
        check = doctor_scorers.check_preset(load_settings("geneval-tiny"))
        assert check == Check("preset geneval-tiny", "ok", "has its model, prompts and scorers")

    @pytest.mark.usefixtures("no_weights")
    def test_model_prompts_and_scorers_are_named(self, tmp_path: Path) -> None:
        preset = tmp_path / "large.toml"
        preset.write_text(
            'name = "large"\n[model]\npath = "nobody/no-such-model"\n[prompts]\ntrain = "absent.jsonl"\n'
            "[reward.scorers.aesthetic]\n[reward.scorers.jpeg-compressibility]\n"
        )
        check = doctor_scorers.check_preset(load_settings(str(preset)))
        assert (check.name, check.status) == ("preset large", "warning")
        assert "model nobody/no-such-model: " in check.detail
        assert "training prompts: " in check.detail and "absent.jsonl" in check.detail
        assert "scorer aesthetic: " in check.detail and "ramctl download-weights" in check.detail
        assert "jpeg" not in check.detail
        assert check.remedy == "All its downloads: ramctl download-weights preset:large"

    def test_what_an_embedded_one_lacks_is_a_failure(self, tmp_path: Path) -> None:
        preset = tmp_path / "small.toml"
        preset.write_text(
            'name = "small"\n[model]\npath = "models/tinyworld"\n[prompts]\ntrain = "absent.jsonl"\n'
            "[reward.scorers.jpeg-compressibility]\n"
        )
        check = doctor_scorers.check_preset(load_settings(str(preset)))
        assert check.status == "failed"
        assert check.detail.startswith("lacks training prompts: ")
        assert check.remedy == ""

    def test_an_unknown_scorer_is_named(self, tmp_path: Path) -> None:
        preset = tmp_path / "odd.toml"
        preset.write_text(
            'name = "odd"\n[model]\npath = "models/tinyworld"\n[prompts]\n'
            'train = "prompts/geneval-tiny/train.jsonl"\n[reward.scorers.genval]\n'
        )
        assert "no scorer 'genval'" in doctor_scorers.check_preset(load_settings(str(preset))).detail

    def test_every_readable_preset_is_looked_at(self) -> None:
        names = [name for name, _ in doctor.all_checks()]
        assert {"preset geneval-tiny", "preset ocr-tiny"} <= set(names)


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


class _Absent(_Sound):
    """Says what it lacks before it is tried; a trial would be a bug."""

    def missing(self) -> list[str]:
        return ["No package: pip install sound", "No weights: ramctl download-weights sound"]

    def self_test(self) -> SelfTest:
        raise AssertionError("tried although something is missing")


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
            (_Absent, True, "failed", "pip install sound; No weights: ramctl download-weights sound"),
            (_Absent, False, "warning", "pip install sound; No weights: ramctl download-weights sound"),
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
        check = doctor_scorers.check_scorer("scorer sound", "sound", {}, required)
        assert check.status == status
        assert words in check.detail

    def test_weights_are_not_loaded_unless_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded: list[bool] = []

        class Heavy(_Sound):
            def load(self) -> None:
                loaded.append(True)

            def self_test(self) -> SelfTest:
                self.ensure_loaded()
                return SelfTest(True, "3 of 3 right")

        monkeypatch.setattr(registry, "create", lambda name, options: Heavy())
        check = doctor_scorers.check_scorer("scorer sound", "sound", {}, False, tried=False)
        assert (check.status, loaded) == ("ok", [])
        assert "not tried (ramctl doctor --deep does): 1" in check.detail
        check = doctor_scorers.check_scorer("scorer sound", "sound", {}, False)
        assert (check.detail, loaded) == ("ready: 3 of 3 right", [True])

    def test_only_what_an_embedded_preset_uses_or_what_needs_no_download_is_tried(self) -> None:
        presets = [load_settings(name) for name in ("geneval-tiny", "ocr-tiny")]
        tried = {
            name: function.keywords["tried"]  # type: ignore[attr-defined]
            for name, function in doctor_scorers.scorer_checks(presets, deep=False)
        }
        weighty = {user for entry in load_manifest().values() for user in entry.used_by if user.startswith("scorer:")}
        expected = {f"scorer {user.removeprefix('scorer:')}" for user in weighty} - {"scorer geneval"}
        assert {name for name, is_tried in tried.items() if not is_tried} == expected & set(tried)
        assert expected & set(tried) and tried["scorer geneval"] and tried["scorer ocr"]
        deep = doctor_scorers.scorer_checks(presets, deep=True)
        assert all(function.keywords["tried"] for _, function in deep)  # type: ignore[attr-defined]

    @pytest.mark.usefixtures("no_weights")
    def test_absent_weights_are_named_with_one_command_for_all(self) -> None:
        check = doctor_scorers.check_scorer("scorer pickscore", "pickscore", {}, False, tried=False)
        assert check.status == "warning"
        assert "is not there: ramctl download-weights" in check.detail
        assert check.remedy == "All its downloads: ramctl download-weights scorer:pickscore"

    def test_unknown_scorer_or_option_of_a_preset_fails(self) -> None:
        assert "no scorer 'genval'" in doctor_scorers.check_scorer("x", "genval", {}, True).detail
        assert "no option 'parts'" in doctor_scorers.check_scorer("x", "geneval", {"parts": 1}, True).detail

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

    @pytest.mark.usefixtures("no_weights")
    def test_the_default_of_a_scorer_is_required_only_where_an_embedded_preset_uses_it_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = '[model]\npath = "{}"\n[prompts]\ntrain = "x"\n[reward.scorers.geneval]\n'
        (tmp_path / "small.toml").write_text('name = "small"\n' + base.format("models/x"))
        text = 'name = "large"\n' + base.format("some/model") + 'options = { partial = "flow_grpo" }\n'
        (tmp_path / "large.toml").write_text(text)
        monkeypatch.setattr("ramctl.settings.resource_dir", lambda kind: tmp_path)
        presets = [load_settings("small"), load_settings("large")]
        required = {name: f.args[3] for name, f in doctor_scorers.scorer_checks(presets, deep=False)}  # type: ignore[attr-defined]
        assert required["scorer geneval"] is True
        assert required["scorer geneval (large)"] is False

    def test_the_drawn_scenes_are_judged_right_here(self) -> None:
        check = doctor_scorers.check_scorer("scorer geneval", "geneval", {}, True)
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
