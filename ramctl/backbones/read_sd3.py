"""Reading a Stable Diffusion 3 folder part by part, and refusing one that is damaged.

The libraries go on where a file does not fit: transformers fills tensors that a file lacks with random numbers, and
with one warning; diffusers leaves them without data; a tokenizer without its vocabulary knows two words. Here each part
is read alone, what its class reports about the file is looked at, and any difference is an error that names the part,
the file and the remedy.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ramctl.config import ModelSection
from ramctl.errors import ConfigError, MissingDependencyError
from ramctl.resources import download_command, find_model, resource_dir
from ramctl.weights import entry_folder, entry_of_repository, load_manifest

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_INDEX = "model_index.json"
#: Each text encoder and its tokenizer.
_TEXT = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", "text_encoder_3": "tokenizer_3"}
#: What the libraries raise over files that are absent, damaged or say impossible things.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, SafetensorError)

Shapes = Mapping[str, tuple[int, ...]]


def read_pipeline(spec: ModelSection) -> StableDiffusion3Pipeline:
    """The model of ``spec`` in main memory: networks in ``spec.dtype``, without the third encoder unless ``use_t5``.

    Args:
        spec: ``path`` is a diffusers folder, a hub id of which the store has the files, or any other hub id.

    Raises:
        ConfigError: no Stable Diffusion 3 model, or a part of it is absent, damaged or does not fit its configuration.
        MissingDependencyError: neither a folder nor a model that can be downloaded.
    """
    with quiet_import():
        from diffusers import StableDiffusion3Pipeline

    with quiet():
        folder, revision = _model_folder(spec)
        reader = _Reader(spec, folder, revision)
        encoders = [name for name in _TEXT if spec.use_t5 or name != "text_encoder_3"]
        networks = ["transformer", "vae", *encoders]
        reader.check_index(networks)
        # The small files and the headers of the large ones first: T5 alone takes a minute to read.
        parts: dict[str, Any] = dict.fromkeys([*_TEXT, *_TEXT.values()])
        parts["scheduler"] = reader.scheduler()
        for name in encoders:
            parts[_TEXT[name]] = reader.tokenizer(_TEXT[name], name)
        stored = {name: reader.stored(name) for name in networks}
        for name in networks:
            parts[name] = reader.network(name, stored[name])
        return StableDiffusion3Pipeline(**parts)


def pinned_revision(path: str, revision: str | None) -> str | None:
    """The hub revision of model ``path``: ``revision`` where one is given, else the manifest's, else None."""
    entry = None if revision else entry_of_repository(path)
    return revision if entry is None else entry.revision


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' advice and progress bars while a model loads."""
    import diffusers
    import transformers

    levels = diffusers.logging.get_verbosity(), transformers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.captureWarnings(False)
        diffusers.logging.set_verbosity(levels[0])
        transformers.logging.set_verbosity(levels[1])


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """diffusers and transformers warn at import about packages that nothing here needs."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _model_folder(spec: ModelSection) -> tuple[Path, str | None]:
    """The folder of the model, fetched from the hub where need be, and the revision asked of the hub."""
    from diffusers import StableDiffusion3Pipeline

    folder = find_model(spec.path, with_t5=spec.use_t5)
    if (folder / _INDEX).is_file():
        return folder, None
    if folder.exists():
        raise ConfigError(f"model.path {spec.path!r}: {folder} is no diffusers folder (it has no {_INDEX}).")
    revision = pinned_revision(spec.path, spec.revision)
    unused: dict[str, Any] = {} if spec.use_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    try:
        return Path(StableDiffusion3Pipeline.download(spec.path, revision=revision, **unused)), revision
    except (OSError, ValueError) as error:
        command = download_command(spec.path)
        remedy = (
            f"Fetch it with: {command}"
            if command
            else "Set model.path to a diffusers folder, e.g. --model.path models/tinyworld."
        )
        at = f" at revision {revision}" if revision else ""
        raise MissingDependencyError(
            f"Model {spec.path!r} is neither a local folder nor a model that could be downloaded{at} "
            f"({_reason(error)}). {remedy}"
        ) from error


@dataclass(frozen=True)
class _Stored:
    """The weight files of a part.

    ``main`` is the only one, or the index of the others. ``shapes`` are those in the files' headers, None for pickled
    files, which have none. ``homes`` says which file holds a tensor, or would by the index.
    """

    main: Path
    shapes: Shapes | None
    homes: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class _Differences:
    """How a file's tensors differ from those of the network; ``reshaped`` holds (stored, expected) shapes."""

    missing: Collection[str]
    unexpected: Collection[str]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def first(self) -> str | None:
        """The first offending tensor, None where the files fit."""
        return next((name for names in (self.missing, self.reshaped, self.unexpected) for name in sorted(names)), None)

    def __str__(self) -> str:
        said = []
        if self.missing:
            said.append(f"lacks {_tensors(self.missing)}")
        if self.reshaped:
            stored, expected = self.reshaped[min(self.reshaped)]
            said.append(f"has {_tensors(self.reshaped)} of another shape ({list(stored)}, not {list(expected)})")
        if self.unexpected:
            said.append(f"has {_tensors(self.unexpected)} that the network has not")
        return " and ".join(said)


class _Reader:
    """Reads the parts of one model folder; every error names ``spec.path``, the file and what to do."""

    def __init__(self, spec: ModelSection, folder: Path, revision: str | None) -> None:
        self._spec, self._folder, self._revision = spec, folder, revision
        self._dtype = DTYPES[spec.dtype]
        self._index = self._json(_INDEX)

    # -- which parts

    def check_index(self, networks: Collection[str]) -> None:
        """Refuse a model of another family."""
        transformer = self._index.get("transformer")
        if not _is_class(transformer) or transformer[1] != "SD3Transformer2DModel":
            found = f"its transformer is {transformer[1]}" if _is_class(transformer) else "it names no transformer"
            raise ConfigError(f"model.path {self._spec.path!r}: not a Stable Diffusion 3 model ({_INDEX}: {found}).")
        for name in networks:
            if not issubclass(self._class(name), nn.Module):
                self._fail(_INDEX, f"names a class for {name} that is no network")

    def _class(self, name: str) -> Any:
        """The class that the index names for a part."""
        named = self._index.get(name)
        if not _is_class(named):
            hint = "; without it set model.use_t5 to false" if name.endswith("_3") else ""
            self._fail(_INDEX, f"names no {name}{hint}")
        library, class_name = named
        # Any module could be named here; only these two have model classes.
        kind = (
            getattr(importlib.import_module(library), class_name, None)
            if library in ("diffusers", "transformers")
            else None
        )
        if not isinstance(kind, type):
            self._fail(_INDEX, f"names the class {library}.{class_name} for {name}, which is not installed")
        return kind

    # -- scheduler and tokenizers

    def scheduler(self) -> Any:
        """The scheduler; the backbone reads its ``shift``."""
        file = "scheduler/scheduler_config.json"
        kind = self._class("scheduler")
        self._json(file)
        try:
            scheduler = kind.from_pretrained(self._folder / "scheduler")
            shift = float(scheduler.config.shift)
        except _UNREADABLE as error:
            self._fail(file, f"cannot be used as {kind.__name__} ({_reason(error)})", error)
        if not shift > 0:
            self._fail(file, f"has the shift {shift}, which must be above 0")
        return scheduler

    def tokenizer(self, name: str, encoder: str) -> Any:
        """A tokenizer that has its vocabulary, none of whose tokens are beyond what its encoder embeds."""
        kind = self._class(name)
        self._json(f"{name}/tokenizer_config.json")
        # Without these a tokenizer loads and takes every word for an unknown one.
        files = dict(kind.vocab_files_names)
        whole = files.pop("tokenizer_file", "tokenizer.json")
        absent = [file for file in files.values() if not (self._folder / name / file).is_file()]
        if not (self._folder / name / whole).is_file() and (absent or not files):
            self._fail(f"{name}/{whole}", "is not there" + (f", nor is {absent[0]}" if absent else ""))
        try:
            tokenizer = kind.from_pretrained(self._folder / name)
        except Exception as error:  # the tokenizers package raises bare exceptions
            self._fail(name, f"holds no {kind.__name__} that can be read ({_reason(error)})", error)
        embedded = self._encoder_config(encoder)
        last = max(tokenizer.get_vocab().values())
        if last >= embedded.vocab_size:
            self._fail(name, f"numbers its tokens up to {last}, but {encoder} embeds {embedded.vocab_size} of them")
        longest = getattr(embedded, "max_position_embeddings", None)
        if longest is not None and tokenizer.model_max_length > longest:
            file = f"{name}/tokenizer_config.json"
            self._fail(file, f"has a model_max_length above the {longest} positions of {encoder}")
        return tokenizer

    def _encoder_config(self, name: str) -> Any:
        self._json(f"{name}/config.json")
        try:
            return self._class(name).config_class.from_pretrained(self._folder / name)
        except _UNREADABLE as error:
            self._fail(f"{name}/config.json", f"cannot be used ({_reason(error)})", error)

    # -- networks

    def stored(self, name: str) -> _Stored:
        """The weight files of a network, as its library would choose them, with headers that were read."""
        self._json(f"{name}/config.json")
        folder = self._folder / name
        single, sharded, pickled = _weight_names(self._index[name][0])
        # With both there, each library has its own preference.
        for file in (sharded, single) if self._index[name][0] == "diffusers" else (single, sharded):
            if (folder / file).is_file():
                return self._stored_in(folder / file) if file == single else self._stored_by(folder / file)
        main = next((folder / file for file in pickled if (folder / file).is_file()), None)
        if main is None:
            self._fail(f"{name}/{single}", "is not there")
        return _Stored(main, None)

    def _stored_in(self, file: Path) -> _Stored:
        shapes = self._shapes(file)
        return _Stored(file, shapes, dict.fromkeys(shapes, file))

    def _stored_by(self, index: Path) -> _Stored:
        name = index.parent.name
        listed = self._json(f"{name}/{index.name}").get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            self._fail(f"{name}/{index.name}", "is no index of weight files (no weight_map)")
        homes = {tensor: index.parent / file for tensor, file in listed.items()}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(homes.values())):
            if not file.is_file():
                self._fail(f"{name}/{file.name}", f"is not there, but {index.name} lists it")
            found = self._shapes(file)
            shapes.update(found)
            homes.update(dict.fromkeys(found, file))
        return _Stored(index, shapes, homes)

    def _shapes(self, file: Path) -> Shapes:
        """The shapes in a file's header; the header says how long the file must be, which opening it checks."""
        try:
            with safe_open(file, "pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            self._fail(str(file.relative_to(self._folder)), _damage(file, error), error)

    def network(self, name: str, stored: _Stored) -> nn.Module:
        """A network all of whose tensors come from its files, and whose files hold no others."""
        kind, folder = self._class(name), self._folder / name
        ours = self._index[name][0] == "diffusers"
        # transformers reports other shapes, too, if it may go on; diffusers cannot, and is asked again below.
        options = {"torch_dtype": self._dtype} if ours else {"dtype": self._dtype, "ignore_mismatched_sizes": True}
        try:
            network, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        except _UNREADABLE as error:
            if ours and stored.shapes is not None:
                self._refuse(name, stored, self._compared(name, kind, stored.shapes))
            self._fail(str(stored.main.relative_to(self._folder)), f"cannot be loaded ({_reason(error)})", error)
        # An index may promise diffusers a tensor that no file of it holds; such a one stays without data.
        empty = {tensor for tensor, value in network.state_dict().items() if value.is_meta}
        reshaped = {tensor: (tuple(old), tuple(new)) for tensor, old, new in report["mismatched_keys"]}
        self._refuse(
            name, stored, _Differences(empty.union(report["missing_keys"]), report["unexpected_keys"], reshaped)
        )
        loaded: nn.Module = network
        return loaded

    def _compared(self, name: str, kind: Any, shapes: Shapes) -> _Differences:
        """The headers against the network that the configuration describes, built without data."""
        file = f"{name}/config.json"
        try:
            with torch.device("meta"):
                network = kind.from_config(kind.load_config(self._folder / name))
        except (*_UNREADABLE, ArithmeticError, RuntimeError) as error:
            self._fail(file, f"describes no {kind.__name__} that can be built ({_reason(error)})", error)
        expected = {tensor: tuple(value.shape) for tensor, value in network.state_dict().items()}
        reshaped = {
            tensor: (shapes[tensor], expected[tensor])
            for tensor in expected.keys() & shapes.keys()
            if shapes[tensor] != expected[tensor]
        }
        return _Differences(expected.keys() - shapes.keys(), shapes.keys() - expected.keys(), reshaped)

    def _refuse(self, name: str, stored: _Stored, differences: _Differences) -> None:
        first = differences.first
        if first is None:
            return
        file = str(stored.homes.get(first, stored.main).relative_to(self._folder))
        self._fail(file, f"does not fit {name}/config.json: it {differences}")

    # -- errors

    def _json(self, file: str) -> Mapping[str, Any]:
        """A JSON object of the folder."""
        try:
            content = json.loads((self._folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            self._fail(file, "is not there", error)
        except (OSError, ValueError) as error:
            self._fail(file, f"cannot be read ({_reason(error)})", error)
        if not isinstance(content, dict):
            self._fail(file, "holds no JSON object")
        return content

    def _fail(self, file: str, what: str, cause: BaseException | None = None) -> NoReturn:
        where = file if self._folder == Path(self._spec.path) else self._folder / file
        raise ConfigError(f"model.path {self._spec.path!r}: {where} {what}. {self._remedy(file)}") from cause

    def _remedy(self, file: str) -> str:
        """How a file that is absent or damaged is got again."""
        folder = self._folder.resolve()
        entry = next((e.name for e in load_manifest().values() if entry_folder(e.name).resolve() == folder), None)
        if entry is not None:
            # A file put there by hand has no recorded hash: download-weights would keep it.
            delete = "Delete it and fetch" if (folder / file).is_file() else "Fetch"
            return f"{delete} it again with: ramctl download-weights {entry}"
        if (command := download_command(self._spec.path)) is not None:
            return f"Fetch the model again with: {command}"
        if folder.is_relative_to(resource_dir("models").resolve()):
            return "Install ramctl again, or in a checkout restore it with: git checkout -- models"
        if not Path(self._spec.path).expanduser().exists():
            revision = f" --revision {self._revision}" if self._revision else ""
            return f"Fetch it again with: hf download {self._spec.path} {file} --force-download{revision}"
        return "Copy it again from where the folder came from, or set model.path to another folder."


def _weight_names(library: str) -> tuple[str, str, tuple[str, ...]]:
    """A library's names of the only weight file, of the index of several, and of the pickled ones."""
    if library == "diffusers":
        from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

        return SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, (WEIGHTS_NAME,)
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as SHARDED
    from transformers.utils import SAFE_WEIGHTS_NAME as SINGLE
    from transformers.utils import WEIGHTS_INDEX_NAME, WEIGHTS_NAME

    return SINGLE, SHARDED, (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def _is_class(value: object) -> TypeGuard[list[str]]:
    """Whether an entry of the index is a library and a class, as of a part that is there."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(item, str) for item in value)


def _tensors(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} (first {min(names)!r})"


def _reason(error: BaseException) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _damage(file: Path, error: BaseException) -> str:
    """What is wrong with a safetensors file that cannot be opened."""
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
            if start == b"version ":
                return "is a git-lfs pointer, not the weights (git lfs pull fetches them)"
            size, header = file.stat().st_size, int.from_bytes(start, "little")
            if size < 8 + header:
                return f"is truncated or no safetensors file ({size} bytes)"
            ends = [row["data_offsets"][1] for key, row in json.loads(opened.read(header)).items() if key[:2] != "__"]
        expected = 8 + header + max(ends, default=0)
        if size != expected:
            return f"is truncated: {size} bytes in place of {expected}" if size < expected else "is damaged: too long"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # the error at hand says it
    return f"cannot be read ({_reason(error)})"
