from __future__ import annotations

import math
import os
import socket
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ramctl import tracking
from ramctl.errors import ConfigError, RamctlError
from ramctl.tracking import MlflowTracker, NoTracker, TrackingWarning, flatten, make_tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a migrated database, made once: the migration takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    here = Path.cwd()
    os.chdir(folder)
    tracker = MlflowTracker(None, "first")
    tracker.start("first", {})
    tracker.finish("finished")
    yield folder
    os.chdir(here)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before


def client_of(store: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")


def test_default_store_is_the_one_mlflow_opens_without_options(store: Path) -> None:
    tracker = make_tracker("mlflow", None, "defaults")
    run_id = tracker.start("my run", {"optimizer": {"lr": 1e-4}})
    tracker.log(1, {"reward/mean": 0.5, "reward_by_tag/color_attr": 0.25})
    tracker.finish("finished")
    assert (store / "mlflow.db").is_file()
    import mlflow

    run = mlflow.MlflowClient().get_run(run_id)
    assert run.info.run_name == "my run"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.lr": "0.0001"}
    assert run.data.metrics == {"reward/mean": 0.5, "reward_by_tag/color_attr": 0.25}


def test_files_are_copied_into_the_artifact_folder(store: Path, tmp_path: Path) -> None:
    picture = tmp_path / "step-000010.png"
    picture.write_bytes(b"picture")
    tracker = make_tracker("mlflow", None, "files")
    run_id = tracker.start("run", {})
    tracker.log(10, {}, [picture, tmp_path / "gone.png"], folder="samples")
    tracker.finish("finished")
    client = client_of(store)
    assert [item.path for item in client.list_artifacts(run_id, "samples")] == ["samples/step-000010.png"]
    assert (store / "mlruns" / run_id / "artifacts/samples/step-000010.png").read_bytes() == b"picture"


def test_resuming_continues_the_run_and_survives_changed_parameters(store: Path) -> None:
    first = make_tracker("mlflow", None, "resume")
    run_id = first.start("run", {"train": {"steps": 10}, "seed": 1, "notes": "a" * 9000})
    first.log(1, {"loss": 2.0})
    first.finish("killed")
    assert client_of(store).get_run(run_id).info.status == "KILLED"

    second = make_tracker("mlflow", None, "resume")
    assert second.start("run", {"train": {"steps": 20}, "seed": 1, "new": True, "notes": "a" * 9000}, run_id) == run_id
    assert client_of(store).get_run(run_id).info.status == "RUNNING"
    second.log(2, {"loss": 1.0})
    second.finish("finished")
    run = client_of(store).get_run(run_id)
    assert [(m.step, m.value) for m in client_of(store).get_metric_history(run_id, "loss")] == [
        (1, 2.0),
        (2, 1.0),
    ]
    assert run.data.params["train.steps"] == "10"
    assert run.data.params["new"] == "true"
    assert {key: value for key, value in run.data.tags.items() if key.startswith("resumed.")} == {
        "resumed.train.steps": "20"
    }


@pytest.mark.parametrize("unknown", ["0" * 32, "not an id"])
def test_an_unknown_run_gives_a_warning_and_a_new_run(store: Path, unknown: str) -> None:
    tracker = make_tracker("mlflow", None, "unknown")
    with pytest.warns(TrackingWarning, match=f"no run {unknown}"):
        run_id = tracker.start("run", {}, unknown)
    tracker.finish("finished")
    assert run_id != unknown
    assert client_of(store).get_run(run_id).info.status == "FINISHED"


def test_values_that_are_not_finite_are_left_out(store: Path) -> None:
    tracker = make_tracker("mlflow", None, "nan")
    run_id = tracker.start("run", {})
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    tracker.finish("failed")
    run = client_of(store).get_run(run_id)
    assert run.data.metrics == {"c": 1.0}
    assert run.info.status == "FAILED"


def test_names_mlflow_refuses_are_made_acceptable(store: Path) -> None:
    tracker = make_tracker("mlflow", None, "names")
    run_id = tracker.start("run", {"a$b": 1})
    tracker.log(1, {"reward_by_tag/a//<b>": 1.0, "/x/../y": 2.0, "../up": 3.0, "n" * 400: 4.0})
    tracker.finish("finished")
    run = client_of(store).get_run(run_id)
    assert sorted(run.data.metrics.values()) == [1.0, 2.0, 3.0, 4.0]
    assert run.data.metrics["reward_by_tag/a/_b_"] == 1.0
    assert run.data.params == {"a_b": "1"}


def test_long_parameters_are_cut_and_many_are_taken(store: Path) -> None:
    tracker = make_tracker("mlflow", None, "params")
    run_id = tracker.start("run", {"long": "x" * 50_000, **{f"key{i}": i for i in range(250)}})
    tracker.finish("finished")
    params = client_of(store).get_run(run_id).data.params
    assert len(params) == 251
    assert params["long"].endswith("x…")


def test_a_failing_store_warns_once_and_loses_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "RETRY_AFTER_SECONDS", 0.0)
    tracker = make_tracker("mlflow", None, "failing")
    run_id = tracker.start("run", {})
    with sqlite3.connect(store / "mlflow.db") as database:
        database.execute("ALTER TABLE metrics RENAME TO metrics_away")
    try:
        with pytest.warns(TrackingWarning, match="Training goes on") as caught:
            for step in range(3):
                tracker.log(step, {"loss": float(step)})
        assert len(caught) == 1
        assert "\n" not in str(caught[0].message)
    finally:
        with sqlite3.connect(store / "mlflow.db") as database:
            database.execute("ALTER TABLE metrics_away RENAME TO metrics")
    tracker.log(3, {"loss": 3.0})
    tracker.finish("finished")
    assert [m.value for m in client_of(store).get_metric_history(run_id, "loss")] == [0.0, 1.0, 2.0, 3.0]


def test_after_a_failure_the_store_is_left_alone_for_a_while(store: Path) -> None:
    tracker = MlflowTracker(None, "patience")
    tracker.start("run", {})
    with sqlite3.connect(store / "mlflow.db") as database:
        database.execute("ALTER TABLE metrics RENAME TO metrics_away")
    try:
        with pytest.warns(TrackingWarning):
            tracker.log(0, {"loss": 0.0})
    finally:
        with sqlite3.connect(store / "mlflow.db") as database:
            database.execute("ALTER TABLE metrics_away RENAME TO metrics")
    start = time.perf_counter()
    for step in range(1, 200):
        tracker.log(step, {"loss": 0.0})
    assert time.perf_counter() - start < 0.5
    tracker.finish("finished")


def test_finish_never_raises_and_log_before_start_does(store: Path) -> None:
    tracker = make_tracker("mlflow", None, "order")
    tracker.finish("finished")
    with pytest.raises(RuntimeError, match="before start"):
        tracker.log(1, {"a": 1.0})
    run_id = tracker.start("run", {})
    with sqlite3.connect(store / "mlflow.db") as database:
        database.execute("DELETE FROM tags WHERE run_uuid = ?", (run_id,))
        database.execute("DELETE FROM runs WHERE run_uuid = ?", (run_id,))
    with pytest.warns(TrackingWarning):
        tracker.finish("finished")
    tracker.finish("finished")


def test_an_explicit_sqlite_address_keeps_its_artifacts_beside_it(store: Path, tmp_path: Path) -> None:
    # The migrated database is copied, as a user's own would be.
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "runs.db").write_bytes((store / "mlflow.db").read_bytes())
    (tmp_path / "file.txt").write_text("text")
    tracker = make_tracker("mlflow", f"sqlite:///{tmp_path / 'a b' / 'runs.db'}", "beside")
    run_id = tracker.start("run", {})
    tracker.log(1, {}, [tmp_path / "file.txt"])
    tracker.finish("finished")
    assert (tmp_path / "a b" / "mlruns" / run_id / "artifacts" / "file.txt").read_text() == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b", "file.txt"]


def test_logging_a_step_is_fast(store: Path) -> None:
    tracker = make_tracker("mlflow", None, "speed")
    tracker.start("run", {})
    metrics = {f"group/metric{i}": float(i) for i in range(30)}
    seconds = []
    for step in range(30):
        start = time.perf_counter()
        tracker.log(step, metrics)
        seconds.append(time.perf_counter() - start)
    tracker.finish("finished")
    # 20 ms on a machine of its own; the bound leaves room for a busy one.
    assert sorted(seconds)[10] < 0.06


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("mlruns", "plain folder"),
        ("file:///tmp/somewhere", "plain folder"),
        ("foo://bar", "unknown scheme"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_a_wrong_address_is_refused_before_mlflow_is_imported(uri: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make_tracker("mlflow", uri, "x").start("run", {})
    assert "\n" not in str(caught.value)


def test_an_address_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RamctlError, match="cannot write its database"):
        make_tracker("mlflow", f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", "x").start("run", {})


def test_a_file_that_is_no_database_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, " * 100)
    with pytest.raises(RamctlError, match="file is not a database") as caught:
        make_tracker("mlflow", f"sqlite:///{tmp_path / 'notes.txt'}", "x").start("run", {})
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_is_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RamctlError, match="Connection refused") as caught:
        make_tracker("mlflow", f"http://127.0.0.1:{port}", "x").start("run", {})
    assert "\n" not in str(caught.value)
    assert str(port) in str(caught.value)


def test_an_old_folder_store_does_not_stop_a_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("")
    (tmp_path / "mlflow.db").write_bytes((store / "mlflow.db").read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.warns(TrackingWarning, match="mlflow ui --backend-store-uri"):
        run_id = make_tracker("mlflow", None, "old").start("run", {})
    assert client_of(tmp_path).get_run(run_id).info.run_id == run_id


def test_the_twin_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = make_tracker("none", "http://nowhere.invalid", "x")
    assert isinstance(tracker, NoTracker)
    assert tracker.start("run", {}, None) == ""
    assert tracker.start("run", {}, "earlier") == "earlier"
    tracker.log(1, {"a": math.nan}, [Path("gone")])
    tracker.finish("finished")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'mlflow'"):
        make_tracker("mlfow")  # type: ignore[arg-type]


def test_flatten() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1, "x"], "f": False, "g": Path("p/q")}
    assert flatten(nested) == {"a.b": "1", "a.c.d": "none", "e": '[1, "x"]', "f": "false", "g": "p/q"}


@pytest.mark.slow
def test_a_fresh_store_is_made_in_silence(tmp_path: Path) -> None:
    code = (
        "import sys, ramctl.tracking as t; assert 'mlflow' not in sys.modules;"
        "r = t.make_tracker('mlflow', None, 'quiet'); r.start('run', {'a': 1});"
        "r.log(1, {'x': 1.0}); r.finish('finished')"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::FutureWarning", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
    assert (tmp_path / "mlflow.db").is_file()


def test_warnings_of_a_normal_run_are_none(store: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrackingWarning)
        tracker = make_tracker("mlflow", None, "calm")
        run_id = tracker.start("run", {"a": 1})
        tracker.log(1, {"x": 1.0})
        tracker.finish("finished")
        again = make_tracker("mlflow", None, "calm")
        assert again.start("run", {"a": 1}, run_id) == run_id
        again.finish("finished")
