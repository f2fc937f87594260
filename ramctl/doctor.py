"""What ``ramctl doctor`` looks at: machine, packages, the embedded model, the tracking store, scorers and presets.

Each check is a function without arguments that returns a :class:`Check`; those of scorers and presets are in
:mod:`ramctl.doctor_scorers`. ``failed`` means that the presets on
the embedded model cannot run as shipped; a ``warning`` is something only other work needs, or a surprise.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tomli

from ramctl.doctor_check import Check, CheckFunction, reason
from ramctl.doctor_scorers import check_preset, embedded, scorer_checks
from ramctl.errors import ConfigError, RamctlError
from ramctl.resources import find_resource, resource_dir
from ramctl.settings import Settings, list_presets, load_settings

GB = 1e9
#: Below the first number of bytes a check fails, below the second it warns: the embedded presets need about
#: the first, a real model with its pictures and checkpoints more than the second.
MEMORY_BOUNDS = (1.5 * GB, 4 * GB)
DISK_BOUNDS = (0.5 * GB, 5 * GB)
_OLDEST_PYTHON = (3, 11)
_LFS_POINTER = b"version https://git-lfs"
_NVIDIA_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))


def all_checks(*, deep: bool = False) -> list[tuple[str, CheckFunction]]:
    """The checks of this machine with their names, quick ones first.

    Args:
        deep: also load the scorers whose weights are downloaded, and try them.
    """
    fixed: list[tuple[str, CheckFunction]] = [
        ("python", check_python),
        ("platform", check_platform),
        ("cores", check_cores),
        ("memory", check_memory),
        ("disk", check_disk),
        ("packages", check_packages),
        ("torch", check_torch),
        ("gpu", check_gpu),
        ("torchvision", check_torchvision),
        ("diffusers", check_diffusers),
        ("presets", check_presets),
    ]
    presets = _loadable_presets()
    models = dict.fromkeys(preset.config.model.path for preset in presets if embedded(preset))
    return [
        *fixed,
        *((f"model {path}", partial(check_model, path)) for path in models),
        ("tracking", check_tracking),
        *scorer_checks(presets, deep=deep),
        *((f"preset {preset.config.name}", partial(check_preset, preset)) for preset in presets),
    ]


def run_checks(checks: Iterable[tuple[str, CheckFunction]] | None = None) -> Iterator[Check]:
    """The findings, one by one as they are made; a check that breaks is a finding, too."""
    for name, function in all_checks() if checks is None else checks:
        try:
            yield function()
        except Exception as error:  # whatever is wrong with a machine, the other checks go on
            yield Check(name, "failed", f"the check broke: {reason(error)}")


def passed(checks: Iterable[Check]) -> bool:
    """Whether no check failed."""
    return all(check.status != "failed" for check in checks)


def check_python() -> Check:
    """The interpreter's version."""
    detail = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < _OLDEST_PYTHON:
        return Check("python", "failed", detail, "Install Python 3.11 or newer.")
    return Check("python", "ok", detail)


def check_platform() -> Check:
    """The operating system."""
    detail = f"{platform.platform(terse=True)}, {platform.machine()}"
    if sys.platform not in ("linux", "darwin"):
        return Check("platform", "warning", detail, "ramctl is tested on Linux; use WSL on Windows.")
    return Check("platform", "ok", detail)


def check_cores() -> Check:
    """The CPU cores this process may use."""
    usable = usable_cores()
    total = os.cpu_count() or usable
    detail = f"{usable}" if usable == total else f"{usable} of {total} usable by this process"
    return Check("cores", "ok", detail)


def usable_cores() -> int:
    """Cores this process may run on (affinity), as far as the system says."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_memory() -> Check:
    """Memory that programs can still take, with a container's limit."""
    total, free = memory_bytes()
    if total is None:
        return Check("memory", "ok", "unknown on this system")
    detail = f"{(total if free is None else free) / GB:.1f} GB free of {total / GB:.1f} GB"
    low, modest = MEMORY_BOUNDS
    room = total if free is None else free
    if room < low:
        return Check("memory", "failed", detail, "Close other programs; training needs about 1.5 GB.")
    if room < modest:
        return Check("memory", "warning", detail, "Enough for the embedded presets, not for a real model.")
    return Check("memory", "ok", detail)


def memory_bytes() -> tuple[int | None, int | None]:
    """(total, available) bytes of memory, of the machine or its container; None where unknown."""
    total = free = None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        facts = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if "kB" in line}
        total, free = facts.get("MemTotal"), facts.get("MemAvailable")
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _cgroup_number("memory.max"), _cgroup_used()
    if limit is not None and total is not None and limit < total:
        total = limit
        room = limit - used
        free = room if free is None else min(free, room)
    return total, free


def check_disk(folder: Path | None = None) -> Check:
    """Free disk where runs are written."""
    folder = folder or Path.cwd()
    if not _writable(folder):
        return Check("disk", "failed", f"{folder} cannot be written", "Start ramctl in a folder of your own.")
    free = shutil.disk_usage(folder).free
    detail = f"{free / GB:.1f} GB free in {folder}"
    low, modest = DISK_BOUNDS
    if free < low:
        return Check("disk", "failed", detail, "Free some space, or start ramctl on another disk.")
    if free < modest:
        return Check("disk", "warning", detail, "Enough for the embedded presets, not for a real model.")
    return Check("disk", "ok", detail)


def check_packages(requirements: list[str] | None = None) -> Check:
    """The versions of the packages ramctl asks for, against what it asks for."""
    from packaging.requirements import Requirement

    found, wrong = [], []
    for text in _requirements() if requirements is None else requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing (needs {wanted.specifier or 'any version'})")
            continue
        found.append(f"{wanted.name} {version}")
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} is {version} (needs {wanted.specifier})")
    if wrong:
        return Check("packages", "failed", "; ".join(wrong), "pip install --upgrade ramctl")
    return Check("packages", "ok", ", ".join(found))


def check_torch() -> Check:
    """Whether torch works, what it was built for, and its ways to talk between processes."""
    try:
        import torch
        import torch.distributed as distributed

        total = float(torch.ones(8, 8).matmul(torch.ones(8, 8)).sum())
    except (ImportError, OSError, RuntimeError) as error:
        remedy = "pip install --force-reinstall 'torch>=2.11,<2.14'"
        return Check("torch", "failed", f"does not work: {reason(error)}", remedy)
    if total != 512.0:
        return Check("torch", "failed", f"multiplies wrongly: {total} instead of 512")
    backends = []
    if distributed.is_available():
        backends = [name for name in ("gloo", "nccl") if getattr(distributed, f"is_{name}_available")()]
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    cpu = torch.backends.cpu.get_cpu_capability()
    detail = f"{torch.__version__} with {built}, CPU {cpu}, processes talk over {', '.join(backends) or 'nothing'}"
    if not backends:
        return Check("torch", "warning", detail, "One process only: this build has no torch.distributed.")
    return Check("torch", "ok", detail)


def check_gpu() -> Check:
    """The CUDA devices: each computes once in bfloat16, so a missing kernel shows here, not in a run."""
    import torch

    if not torch.cuda.is_available():
        if any(path.exists() for path in _NVIDIA_DRIVER):
            built = torch.version.cuda
            why = f"torch (CUDA {built}) cannot use it" if built else "torch is a build without CUDA"
            remedy = "Update the driver, or install a torch build for it: https://pytorch.org/get-started/locally"
            return Check("gpu", "warning", f"this machine has an NVIDIA driver, but {why}", remedy)
        return Check("gpu", "ok", "none; the embedded presets run on the CPU")
    facts, broken = [], []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts.append(f"{index}: {device.name}, {device.total_memory / GB:.0f} GB, sm_{device.major}{device.minor}")
        try:
            with torch.cuda.device(index):
                ones = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
                if float((ones @ ones).float().sum()) != 64.0**3:
                    broken.append(f"device {index} multiplies wrongly")
        except (RuntimeError, AssertionError) as error:
            broken.append(f"device {index}: {reason(error)}")
    if broken:
        remedy = (
            "Free the device, update the driver, or install a torch build for it: "
            "https://pytorch.org/get-started/locally"
        )
        return Check("gpu", "failed", "; ".join([*facts, *broken]), remedy)
    return _gpu_features(facts)


def _gpu_features(facts: list[str]) -> Check:
    import torch

    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "absent"  # type: ignore[no-untyped-call]
    detail = "; ".join([*facts, f"bfloat16 {'yes' if bf16 else 'no'}", f"NCCL {version}"])
    if not bf16:
        return Check("gpu", "warning", detail, "Slow in bfloat16: use --runtime.precision float32.")
    if len(facts) > 1 and not nccl:
        return Check("gpu", "warning", detail, "Several GPUs need a torch build with NCCL.")
    return Check("gpu", "ok", detail)


def check_torchvision() -> Check:
    """Whether an installed torchvision fits torch; one that does not breaks transformers' image processors.

    It is imported in a process of its own: a half-done import would leave its traces in this one.
    """
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", "ok", "not installed; ramctl does not need it")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    code = "import torchvision; print(torchvision.__version__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    if done.returncode == 0:
        return Check("torchvision", "ok", done.stdout.strip())
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    remedy = "pip uninstall torchvision, or install the one of your torch: https://pytorch.org/get-started/locally"
    return Check("torchvision", "warning", f"does not fit this torch: {last}", remedy)


def check_diffusers() -> Check:
    """Whether the pipeline class imports; that takes torch, diffusers, transformers and peft together."""
    try:
        with _quiet_transformers():
            from diffusers import StableDiffusion3Pipeline
            from peft import LoraConfig
    except (ImportError, RuntimeError, OSError) as error:
        remedy = "pip install --upgrade diffusers transformers peft accelerate"
        return Check("diffusers", "failed", f"does not import: {reason(error)}", remedy)
    return Check("diffusers", "ok", f"{StableDiffusion3Pipeline.__name__} and {LoraConfig.__name__} import")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back the advice transformers logs when its classes are imported."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def check_presets() -> Check:
    """Whether every shipped preset can be read."""
    presets = list_presets()
    broken = []
    for preset in presets:
        try:
            load_settings(preset.name)
        except ConfigError as error:
            broken.append(f"{preset.name}: {error}")
    if broken or not presets:
        detail = "; ".join(broken) or f"none in {resource_dir('presets')}"
        return Check("presets", "failed", detail, "pip install --force-reinstall ramctl")
    return Check("presets", "ok", ", ".join(preset.name for preset in presets))


def check_model(path: str) -> Check:
    """Whether a shipped model is there and whole: its index, each part's configuration, each weight file."""
    name = f"model {path}"
    folder = find_resource(path)
    remedy = "pip install --force-reinstall ramctl; in a checkout: git lfs pull"
    if not folder.is_dir():
        return Check(name, "failed", f"{folder} is absent", remedy)
    try:
        index = _read_json(folder / "model_index.json")
        parts = [key for key, value in index.items() if isinstance(value, list) and value[0] is not None]
        for part in parts:
            _check_part(folder / part)
        weights = sorted(folder.rglob("*.safetensors"))
        numbers = sum(_count_numbers(file) for file in weights)
    except RamctlError as error:
        return Check(name, "failed", str(error), remedy)
    if not weights:
        return Check(name, "failed", f"{folder} holds no weights", remedy)
    pipeline = index.get("_class_name", "pipeline")
    return Check(name, "ok", f"{pipeline}, {len(parts)} parts, {numbers / 1e6:.1f} M weights ({folder})")


def check_tracking() -> Check:
    """Whether the tracker records a run, in a store of its own, and whether the real store can be written."""
    from ramctl.tracking import make_tracker

    remedy = "Or train without a tracker: --tracking.kind none"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tracker = make_tracker("mlflow", f"sqlite:///{Path(scratch).as_posix()}/mlflow.db", "doctor")
            tracker.start("doctor", {})
            tracker.finish("finished")
        where = _tracking_store()
    except ImportError as error:
        return Check("tracking", "failed", f"MLflow does not import: {reason(error)}", f"pip install mlflow. {remedy}")
    except RamctlError as error:
        return Check("tracking", "failed", str(error), remedy)
    return Check("tracking", "ok", f"MLflow records to {where}")


def _loadable_presets() -> list[Settings]:
    settings = []
    for preset in list_presets():
        try:
            settings.append(load_settings(preset.name))
        except ConfigError:
            continue  # check_presets says so
    return settings


def _requirements() -> list[str]:
    """What the installed ramctl asks for, or the checkout's pyproject.toml."""
    try:
        return importlib.metadata.requires("ramctl") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return list(tomli.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])


def _check_part(folder: Path) -> None:
    """Raise a RamctlError for a part of a pipeline without a readable configuration."""
    if not folder.is_dir():
        raise RamctlError(f"{folder} is absent")
    for file in folder.glob("*.json"):
        _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RamctlError(f"{file} is absent") from None
    except (OSError, ValueError) as error:
        raise RamctlError(f"{file} cannot be read: {error}") from None
    return table if isinstance(table, dict) else {}


def _count_numbers(file: Path) -> int:
    """How many numbers a weight file holds; its header must be whole and fit the file's length."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise RamctlError(f"{file} is a git-lfs pointer, not the weights")
    import math

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise RamctlError(f"{file} is damaged: {error}") from None


def _tracking_store() -> str:
    """Where runs are recorded by default; raises a RamctlError when that cannot be written or reached."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        folder = Path.cwd()
        if not _writable(folder):
            raise RamctlError(f"{folder} cannot be written, so MLflow cannot keep its database there.")
        return str(folder / "mlflow.db")
    if urlsplit(uri).scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):
                pass
        except (urllib.error.URLError, OSError) as error:
            raise RamctlError(
                f"The MLflow server {uri} (MLFLOW_TRACKING_URI) does not answer: {reason(error)}."
            ) from None
    elif uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent
        if not folder.is_dir() or not _writable(folder):
            raise RamctlError(f"{folder} (MLFLOW_TRACKING_URI) cannot be written.")
    return f"{uri} (MLFLOW_TRACKING_URI)"


def _writable(folder: Path) -> bool:
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _cgroup_number(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_used() -> int:
    """Bytes a container holds; its cached files do not count, the system gives them up on demand."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    cached = sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
    return max(0, (_cgroup_number("memory.current") or 0) - cached)
