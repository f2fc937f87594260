"""Experiment tracking behind three methods: MLflow, or nothing.

With no address given, MLflow writes to ``mlflow.db`` and ``mlruns/`` in the working directory: no server, no
account, and ``mlflow ui`` typed in that directory shows the run. A tracker may refuse to start; once started
it never stops a run.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import posixpath
import re
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from ramctl.errors import ConfigError, RamctlError, did_you_mean

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

Status = Literal["finished", "failed", "killed"]
TrackerKind = Literal["mlflow", "none"]

#: After a failed write the next attempt waits this long: a dead server costs a timeout a minute, not a step.
RETRY_AFTER_SECONDS = 60.0
#: Metric values kept in memory while the store cannot be reached; the oldest go first.
MAX_PENDING_METRICS = 200_000
_MAX_KEY_LENGTH = 250

# Read by MLflow when it is imported or called. A variable the user has set is left as it is.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow's own 7 retries of 120 s each would hold a training step for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_SCHEMES = ("sqlite", "http", "https", "databricks", "postgresql", "mysql", "mssql")
_CHATTY_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")


class TrackingWarning(UserWarning):
    """Something was not recorded by the tracker; training goes on."""


class Tracker(ABC):
    """Where a run's parameters, metrics and files are recorded besides the run folder; for one process."""

    @abstractmethod
    def start(self, run_name: str, params: Mapping[str, object], run_id: str | None = None) -> str:
        """Begin a run, or continue the one called ``run_id``; returns its id (to be kept in checkpoints).

        Args:
            run_name: what people see in the run list.
            params: the configuration, nested or flat; nested keys are joined by dots (``optimizer.lr``).
            run_id: an id returned by an earlier ``start``; one the store does not know gives a warning and a
                new run.

        Raises:
            RamctlError: the store cannot be used at all (bad address, server down, folder not writable).
        """

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float], files: Sequence[Path] = (), folder: str = "") -> None:
        """Record metrics at ``step``, copy files into artifact ``folder``; never raises for a failing store.

        Values that are not finite are left out. Names may contain slashes (``reward_by_tag/color_attr``).
        """

    @abstractmethod
    def finish(self, status: Status) -> None:
        """Close the run, writing what is still pending; never raises for a failing store."""


class NoTracker(Tracker):
    """Records nothing."""

    def start(self, run_name: str, params: Mapping[str, object], run_id: str | None = None) -> str:
        """Return ``run_id`` unchanged, so that a run resumed later with a tracker finds it again."""
        return run_id or ""

    def log(self, step: int, metrics: Mapping[str, float], files: Sequence[Path] = (), folder: str = "") -> None:
        """Do nothing."""

    def finish(self, status: Status) -> None:
        """Do nothing."""


class MlflowTracker(Tracker):
    """Records into MLflow.

    Args:
        uri: a tracking address (``sqlite:///path/mlflow.db``, ``http://host:5000``). None means MLflow's own
            default: the variable ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working directory.
        experiment: the experiment's name; created when it does not exist.
    """

    def __init__(self, uri: str | None, experiment: str) -> None:
        self._uri = uri
        self._experiment = experiment
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._pending_metrics: list[Metric] = []
        self._pending_files: list[tuple[Path, str]] = []
        self._warned = False
        self._retry_at = 0.0

    def start(self, run_name: str, params: Mapping[str, object], run_id: str | None = None) -> str:
        """See :meth:`Tracker.start`. Parameters changed since the first start become ``resumed.*`` tags."""
        client = self._connect()
        try:
            with _quiet():
                run = self._find_run(client, run_id) if run_id else None
                if run is None:
                    run = client.create_run(
                        self._experiment_id(client),
                        run_name=run_name,
                        tags={"mlflow.source.name": "ramctl", "mlflow.source.type": "LOCAL"},
                    )
                else:
                    client.update_run(run.info.run_id, status="RUNNING")
                _log_params(client, run, flatten(params))
        except Exception as error:
            raise RamctlError(self._cannot_use(error)) from error
        self._client = client
        self._run_id = str(run.info.run_id)
        return self._run_id

    def log(self, step: int, metrics: Mapping[str, float], files: Sequence[Path] = (), folder: str = "") -> None:
        """See :meth:`Tracker.log`. One batch call a step; what cannot be written is kept and tried again.

        Raises:
            RuntimeError: called before ``start``.
        """
        if self._client is None:
            raise RuntimeError("MlflowTracker.log called before start")
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._pending_metrics += [Metric(_safe_name(name), value, now, step) for name, value in finite.items()]
        del self._pending_metrics[:-MAX_PENDING_METRICS]
        self._pending_files += [(Path(file), folder) for file in files]
        if time.monotonic() >= self._retry_at:
            self._flush()

    def finish(self, status: Status) -> None:
        """See :meth:`Tracker.finish`; a second call, or one before ``start``, does nothing."""
        if self._client is None:
            return
        self._flush()
        try:
            with _quiet():
                self._client.set_terminated(self._run_id, status=status.upper())
        except Exception as error:
            self._warn(error)
        self._client = None

    def _connect(self) -> MlflowClient:
        if self._uri is not None:
            _check_uri(self._uri)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Importing MLflow sets its log levels, so it comes before they are raised.
        from mlflow.tracking import MlflowClient

        if self._uri is None:
            self._uri = _default_uri()
            _check_uri(self._uri)
        try:
            with _quiet():
                return MlflowClient(tracking_uri=self._uri)
        except Exception as error:
            raise RamctlError(self._cannot_use(error)) from error

    def _cannot_use(self, error: Exception) -> str:
        return (
            f"MLflow cannot use the tracking address {self._uri!r}: {_reason(error)}. "
            "Correct tracking.uri, or set tracking.kind to none."
        )

    def _experiment_id(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is None:
            # MLflow lists the experiment as model training, not as an application with traces.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            where = _artifacts_beside(self._uri or "")
            return str(client.create_experiment(self._experiment, artifact_location=where, tags=kind))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _find_run(self, client: MlflowClient, run_id: str) -> Run | None:
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            # Any other code means that the store is out of order, which is the caller's error to report.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            run = None
        if run is None or run.info.lifecycle_stage == "deleted":
            warnings.warn(
                f"MLflow at {self._uri} has no run {run_id} (deleted, or tracked elsewhere): a new run is recorded.",
                TrackingWarning,
                stacklevel=4,
            )
            return None
        return run

    def _flush(self) -> None:
        assert self._client is not None
        try:
            with _quiet():
                if self._pending_metrics:
                    self._client.log_batch(self._run_id, metrics=self._pending_metrics)
                    self._pending_metrics = []
                while self._pending_files:
                    file, folder = self._pending_files[0]
                    if file.exists():
                        self._client.log_artifact(self._run_id, str(file), folder or None)
                    self._pending_files.pop(0)
        except Exception as error:
            self._retry_at = time.monotonic() + RETRY_AFTER_SECONDS
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"MLflow at {self._uri} does not record: {_reason(error)}. Training goes on; the values stay in "
            f"metrics.jsonl and are sent again every {RETRY_AFTER_SECONDS:.0f} s.",
            TrackingWarning,
            stacklevel=4,
        )


def make_tracker(kind: TrackerKind, uri: str | None = None, experiment: str = "ramctl") -> Tracker:
    """The tracker of a configuration's ``tracking`` section; touches no disk and no network before ``start``.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind == "mlflow":
        return MlflowTracker(uri, experiment)
    if kind == "none":
        return NoTracker()
    raise ConfigError(f"tracking.kind must be mlflow or none, got {kind!r}.{did_you_mean(kind, ('mlflow', 'none'))}")


def flatten(params: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested parameters as ``{"section.key": text}``: sequences as JSON, None as ``none``."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, (list, tuple)):
            flat[name] = json.dumps(value, default=str, ensure_ascii=False)
        elif value is None or isinstance(value, bool):
            flat[name] = str(value).lower()
        else:
            flat[name] = str(value)
    return flat


def _log_params(client: MlflowClient, run: Run, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    limit = _param_limit()
    texts = {
        _safe_name(key): value if len(value) <= limit else value[: limit - 1] + "…" for key, value in params.items()
    }
    known = run.data.params
    new = [Param(key, value) for key, value in texts.items() if key not in known]
    # MLflow refuses a second value for a parameter; a resumed run may well have one (more steps).
    changed = [RunTag(f"resumed.{key}", value) for key, value in texts.items() if known.get(key, value) != value]
    client.log_batch(run.info.run_id, params=new, tags=changed)


def _param_limit() -> int:
    try:
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH
    except ImportError:
        return 500
    return int(MAX_PARAM_VAL_LENGTH)


def _safe_name(name: str) -> str:
    """A name MLflow takes: its characters only, no empty or relative path part, at most 250 characters."""
    clean = posixpath.normpath(re.sub(r"[^/\w.\- ]", "_", name)).lstrip("/")
    return ("_" if clean.startswith(".") else "") + clean[: _MAX_KEY_LENGTH - 1]


def _check_uri(uri: str) -> None:
    """Refuse at once an address MLflow would take for something else (a plain path) or retry for minutes.

    Raises:
        ConfigError: a plain folder, an unknown scheme, a SQLite address without a file.
        RamctlError: the SQLite file cannot be written.
    """
    scheme = urlsplit(uri).scheme
    # A one-letter scheme is a Windows drive.
    if scheme in ("", "file") or len(scheme) == 1:
        path = Path(unquote(urlsplit(uri).path) if scheme == "file" else uri)
        raise ConfigError(
            f"The tracking address {uri!r} is a plain folder, which MLflow no longer writes to. "
            f"Use sqlite:///{(path / 'mlflow.db').as_posix()}, or leave tracking.uri out."
        )
    if not scheme.startswith(_SCHEMES):
        raise ConfigError(
            f"The tracking address {uri!r} has an unknown scheme. "
            "Use sqlite:///FILE or http(s)://HOST:PORT, or leave tracking.uri out."
        )
    if not scheme.startswith("sqlite"):
        return
    database = _sqlite_file(uri)
    if database is None:
        raise ConfigError(f"The tracking address {uri!r} names no file. Use, for instance, sqlite:///mlflow.db.")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with database.open("ab"):
            pass
    except OSError as error:
        raise RamctlError(
            f"MLflow cannot write its database {database}: {error.strerror}. "
            "Correct tracking.uri, or set tracking.kind to none."
        ) from None


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    path = unquote(uri.removeprefix("sqlite:///").split("?")[0])
    return Path(path) if path and path != ":memory:" else None


def _default_uri() -> str:
    """MLflow's default, which is what ``mlflow ui`` opens; never its old folder store, closed to writing."""
    import mlflow

    uri = str(mlflow.get_tracking_uri())
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if not uri.startswith("file:"):
        # MLflow quotes the path, then makes a second, empty folder with the quoted name.
        plain = unquote(uri)
        return uri if "%" in plain else plain
    warnings.warn(
        "The folder mlruns holds runs of an old MLflow, which MLflow no longer writes to: this run goes into "
        "mlflow.db. See it with `mlflow ui --backend-store-uri sqlite:///mlflow.db`.",
        TrackingWarning,
        stacklevel=5,
    )
    return f"sqlite:///{Path('mlflow.db').absolute().as_posix()}"


def _artifacts_beside(uri: str) -> str | None:
    """Artifacts lie in ``mlruns/`` beside a SQLite file, wherever that is; None leaves it to the server."""
    database = _sqlite_file(uri)
    return None if database is None else (database.absolute().parent / "mlruns").as_uri()


def _reason(error: BaseException) -> str:
    """Why, in a few words: the operating system's reason at the root of the chain, else the first line."""
    root: BaseException | None = error
    while root is not None:
        if isinstance(root, OSError) and root.strerror:
            return root.strerror
        root = root.__cause__ or root.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0].strip()
    return (line if len(line) <= 200 else line[:199] + "…").rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what MLflow and its migrations log, and the lines it prints on standard output."""
    loggers: list[Any] = [logging.getLogger(name) for name in _CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
