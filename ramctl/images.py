"""Pictures on disk: folders of them with their prompts, single files, grids.

Two layouts are read. Flat: pictures and a ``metadata.jsonl`` beside them whose lines hold ``file_name`` (or
``file``), ``prompt`` and whatever the scorers need. GenEval's: numbered folders, each with a one-line
``metadata.jsonl`` and its pictures in ``samples/``. In memory a picture is always ``uint8 [H, W, 3]`` RGB.

A folder whose list is wrong is refused as a whole; one unreadable picture is not: it becomes an
:class:`UnreadableImage` among the batches, so that the others are scored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ramctl.errors import DataError, RamctlError
from ramctl.prompts import Prompt, parse_prompt

Image = NDArray[np.uint8]

METADATA = "metadata.jsonl"
SAMPLES = "samples"
#: An overview people put beside the pictures; never a picture to score.
GRID = "grid.png"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

_WHITE = 255


@dataclass(frozen=True)
class ImageRow:
    """A picture's file and the prompt it was made from (its metadata without the file's name)."""

    path: Path
    prompt: Prompt


@dataclass(frozen=True)
class ImageBatch:
    """Pictures of one size, uint8 [n, H, W, 3]; ``indices`` are their places in the list of rows."""

    indices: tuple[int, ...]
    images: Image
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class UnreadableImage:
    """The row at ``index`` whose file could not be read, and why (the file is named)."""

    index: int
    reason: str


def read_image_folder(folder: str | Path) -> list[ImageRow]:
    """The pictures of a folder in the order of its list (GenEval's layout: of the folders' and files' names).

    The pictures themselves are not opened.

    Raises:
        DataError: no such folder, neither layout, a broken line, a listed file that is absent, a picture that
            is not listed; file and line are named.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"Image folder {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    if (root / METADATA).is_file():
        return _read_flat(root)
    children = [child for child in _visible(root) if child.is_dir()]
    if any((child / METADATA).is_file() or (child / SAMPLES).is_dir() for child in children):
        strangers = _unlisted(root, set())
        if strangers:
            raise DataError(f"{root} holds prompt folders and loose pictures: {_shown(strangers)}; move these out.")
        return [row for child in children for row in _read_geneval(child)]
    raise DataError(
        f'Image folder {root} has no {METADATA}: add one with a line {{"file_name": "….png", "prompt": "…"}} '
        f"per picture, or use GenEval's layout (00000/{METADATA} and 00000/{SAMPLES}/*.png)."
    )


def load_image(path: str | Path) -> Image:
    """A picture as uint8 [H, W, 3] RGB: turned as its EXIF says, transparency over white, 16-bit gray scaled.

    Raises:
        DataError: the file is absent, no picture, truncated or of a kind without a defined range.
    """
    from PIL import Image as pil
    from PIL import ImageOps

    file = Path(path)
    try:
        with pil.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16"):
                gray = np.asarray(picture, dtype=np.float64) / 257
                return np.repeat(np.round(gray).astype(np.uint8)[:, :, None], 3, axis=2)
            if picture.mode in ("I", "F"):
                raise DataError(f"Picture {file} has pixels of kind {picture.mode!r}; save it as 8-bit RGB.")
            if picture.has_transparency_data:
                layer = picture.convert("RGBA")
                picture = pil.alpha_composite(pil.new("RGBA", layer.size, "white"), layer)
            return np.array(picture.convert("RGB"), dtype=np.uint8)
    except (DataError, MemoryError):
        raise
    except FileNotFoundError:
        raise DataError(f"Picture {file} does not exist.") from None
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise DataError(f"Picture {file} cannot be read ({type(error).__name__}: {error}).") from None


def save_png(array: Image, path: str | Path) -> None:
    """Write uint8 [H, W, 3] RGB as a PNG, making its folder; :func:`load_image` gives the same array back.

    Raises:
        DataError: an array of another shape or dtype.
        RamctlError: the file cannot be written.
    """
    from PIL import Image as pil

    _require_pictures(array, 3)
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        pil.fromarray(array).save(file, format="PNG")
    except OSError as error:
        raise RamctlError(f"Picture {file} cannot be written: {error.strerror or error}.") from None


def write_image_folder(
    folder: str | Path,
    images: Sequence[Image] | Image,
    prompts: Sequence[Prompt],
    names: Sequence[str] | None = None,
) -> list[ImageRow]:
    """Write N pictures as PNG with their ``metadata.jsonl`` (flat layout), over files of the same names.

    Args:
        folder: made when absent.
        images: N arrays uint8 [H, W, 3], or one uint8 [N, H, W, 3].
        prompts: N prompts.
        names: N file names ending in ``.png``, relative to the folder; None: ``00000.png`` and so on.

    Raises:
        DataError: lengths that differ, unusable names, or the folder holds pictures not among the names.
        RamctlError: a file cannot be written.
    """
    root = Path(folder)
    chosen = [f"{i:05d}.png" for i in range(len(images))] if names is None else list(names)
    if not len(images) == len(prompts) == len(chosen):
        raise DataError(f"Got {len(images)} images, {len(prompts)} prompts and {len(chosen)} names.")
    for name in chosen:
        _check_relative(name, f"Image folder {root}")
        if not name.lower().endswith(".png"):
            raise DataError(f"Image folder {root}: the file name {name!r} does not end in .png.")
    if len(set(chosen)) < len(chosen):
        raise DataError(f"Image folder {root}: file name {_first_repeated(chosen)!r} is given twice.")
    rows = [ImageRow(root / name, prompt) for name, prompt in zip(chosen, prompts, strict=True)]
    strangers = _unlisted(root, {row.path for row in rows}) if root.is_dir() else []
    if strangers:
        raise DataError(
            f"Folder {root} already holds other pictures ({_shown(strangers)}); choose another or empty it."
        )
    for row, image in zip(rows, images, strict=True):
        save_png(image, row.path)
    lines = [
        json.dumps({"file_name": name, **_without_file(prompt).to_json()}, ensure_ascii=False)
        for name, prompt in zip(chosen, prompts, strict=True)
    ]
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / METADATA).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise RamctlError(f"{root / METADATA} cannot be written: {error.strerror or error}.") from None
    return rows


def make_grid(images: Image, columns: int, gap: int = 2, scale: int = 1) -> Image:
    """Pictures side by side, row by row, on white.

    Args:
        images: uint8 [N, H, W, 3].
        columns: pictures per row (no more than N are used).
        gap: white pixels between pictures, after scaling.
        scale: whole factor by which each picture is enlarged, pixel by pixel.

    Returns:
        uint8 [rows * H * scale + (rows - 1) * gap, columns * W * scale + (columns - 1) * gap, 3].

    Raises:
        DataError: no picture, another shape or dtype, or a number below its least value.
    """
    _require_pictures(images, 4)
    if not len(images) or columns < 1 or scale < 1 or gap < 0:
        raise DataError(
            f"A grid needs a picture, columns and scale of 1 or more and a gap of 0 or more; "
            f"got {len(images)} pictures, columns={columns}, scale={scale}, gap={gap}."
        )
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width = large.shape[:3]
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    grid = np.full(shape, _WHITE, dtype=np.uint8)
    for i, picture in enumerate(large):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        grid[top : top + height, left : left + width] = picture
    return grid


def batches_by_size(rows: Sequence[ImageRow], batch_size: int = 64) -> Iterator[ImageBatch | UnreadableImage]:
    """Read the rows' pictures and yield them in batches of one size each, never more than ``batch_size``.

    Every index of ``rows`` comes out once, in an :class:`ImageBatch` or as an :class:`UnreadableImage`; the
    order differs from the rows' when sizes are mixed. At most four batches' worth of pictures wait in memory.

    Raises:
        DataError: ``batch_size`` below 1.
    """
    if batch_size < 1:
        raise DataError(f"The batch size must be 1 or more, got {batch_size}.")
    waiting: dict[tuple[int, ...], list[tuple[int, Image]]] = {}
    for index, row in enumerate(rows):
        try:
            image = load_image(row.path)
        except DataError as error:
            yield UnreadableImage(index, str(error))
            continue
        waiting.setdefault(image.shape, []).append((index, image))
        fullest = max(waiting, key=lambda shape: len(waiting[shape]))
        total = sum(len(entries) for entries in waiting.values())
        if len(waiting[fullest]) == batch_size or total >= 4 * batch_size:
            yield _batch(waiting.pop(fullest), rows)
    for entries in waiting.values():
        yield _batch(entries, rows)


def _batch(entries: Sequence[tuple[int, Image]], rows: Sequence[ImageRow]) -> ImageBatch:
    return ImageBatch(
        indices=tuple(index for index, _ in entries),
        images=np.stack([image for _, image in entries]),
        prompts=tuple(rows[index].prompt for index, _ in entries),
    )


def _read_flat(root: Path) -> list[ImageRow]:
    listing = root / METADATA
    rows: list[ImageRow] = []
    lines_of: dict[Path, int] = {}
    for number, line in _lines(listing):
        where = f"{listing}, line {number}"
        prompt = parse_prompt(line, where)
        name = prompt.metadata.get("file_name", prompt.metadata.get("file"))
        if not isinstance(name, str) or not name:
            raise DataError(f'{where}: add the key "file_name" with the picture\'s file name, got {name!r}.')
        _check_relative(name, where)
        path = root / name
        if not path.is_file():
            raise DataError(f"{where}: picture {path} does not exist; remove the line or add the file.")
        if path in lines_of:
            raise DataError(f"{where}: picture {name} is already listed in line {lines_of[path]}.")
        lines_of[path] = number
        rows.append(ImageRow(path, _without_file(prompt)))
    if not rows:
        raise DataError(f"{listing} lists no pictures.")
    strangers = _unlisted(root, set(lines_of))
    if strangers:
        raise DataError(f"{listing} does not list {_shown(strangers)}; add a line for each or move them elsewhere.")
    return rows


def _read_geneval(child: Path) -> list[ImageRow]:
    listing = child / METADATA
    if not listing.is_file():
        raise DataError(f"{child} has no {METADATA} with its prompt; add it or move the folder away.")
    lines = list(_lines(listing))
    if len(lines) != 1:
        raise DataError(f"{listing}: GenEval's layout has one line per prompt folder, got {len(lines)}.")
    number, line = lines[0]
    prompt = parse_prompt(line, f"{listing}, line {number}")
    pictures = [path for path in _visible(child / SAMPLES) if _is_picture(path)]
    if not pictures:
        raise DataError(f"{child / SAMPLES} holds no pictures for the prompt of {listing}.")
    return [ImageRow(path, prompt) for path in pictures]


def _lines(listing: Path) -> Iterator[tuple[int, str]]:
    """The non-empty lines with their numbers from 1."""
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing} cannot be read: {error}.") from None
    # Not splitlines(): that also splits at separators which JSON strings may hold as they are.
    yield from ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _check_relative(name: str, where: str) -> None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise DataError(f"{where}: the file name {name!r} must be a path inside the folder.")


def _without_file(prompt: Prompt) -> Prompt:
    kept = {key: value for key, value in prompt.metadata.items() if key not in ("file_name", "file")}
    return Prompt(prompt.text, kept)


def _visible(folder: Path) -> list[Path]:
    """The folder's entries by name, without hidden ones (file managers leave thumbnails there)."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name != GRID and path.is_file()


def _unlisted(root: Path, listed: set[Path]) -> list[Path]:
    """Pictures in the folder, and in subfolders the list names pictures of, that are not listed."""
    folders = sorted({root, *(path.parent for path in listed)})
    return [path for folder in folders for path in _visible(folder) if _is_picture(path) and path not in listed]


def _shown(paths: Sequence[Path], limit: int = 3) -> str:
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(path.name for path in paths[:limit]) + more


def _first_repeated(names: Sequence[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])


def _require_pictures(array: Image, dimensions: int) -> None:
    shape = "[H, W, 3]" if dimensions == 3 else "[N, H, W, 3]"
    good = isinstance(array, np.ndarray) and array.dtype == np.uint8
    if not good or array.ndim != dimensions or array.shape[-1] != 3 or 0 in array.shape[-3:]:
        raise DataError(
            f"Expected pictures as uint8 {shape} in RGB, got {getattr(array, 'dtype', type(array).__name__)} "
            f"{getattr(array, 'shape', '')}."
        )
