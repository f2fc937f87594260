"""Folders of pictures: both layouts, what a wrong one is answered, damaged files, grids and batches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as pil

from ramctl.errors import DataError, RamctlError
from ramctl.images import (
    Image,
    ImageBatch,
    ImageRow,
    UnreadableImage,
    batches_by_size,
    load_image,
    make_grid,
    read_image_folder,
    save_png,
    write_image_folder,
)
from ramctl.prompts import Prompt


def picture(height: int = 6, width: int = 8, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def flat_folder(root: Path, *lines: Mapping[str, Any] | str) -> Path:
    """A flat folder with a picture for every named file and these lines."""
    root.mkdir(exist_ok=True)
    for line in lines:
        name = line.get("file_name", line.get("file")) if isinstance(line, Mapping) else None
        if isinstance(name, str):
            save_png(picture(), root / name)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (root / "metadata.jsonl").write_text(text, encoding="utf-8")
    return root


def geneval_folder(root: Path, counts: Mapping[str, int]) -> Path:
    for number, (text, count) in enumerate(counts.items()):
        child = root / f"{number:05d}"
        for i in range(count):
            save_png(picture(seed=i), child / "samples" / f"{i:05d}.png")
        save_png(picture(), child / "grid.png")  # GenEval's own generation scripts leave one
        # Their metadata has no newline at its end.
        (child / "metadata.jsonl").write_text(json.dumps({"tag": "colors", "prompt": text}), encoding="utf-8")
    return root


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_image_folder(folder)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


# --- reading folders


def test_a_flat_folder_keeps_the_order_of_its_list_and_the_metadata(tmp_path: Path) -> None:
    root = flat_folder(
        tmp_path / "f",
        {"file_name": "b.png", "prompt": "a cat", "tag": "single_object", "include": [{"class": "cat"}]},
        {"file": "a.png", "prompt": 'a sign "Ünï"', "target": "x"},
    )
    assert read_image_folder(root) == [
        ImageRow(root / "b.png", Prompt("a cat", {"tag": "single_object", "include": [{"class": "cat"}]})),
        ImageRow(root / "a.png", Prompt('a sign "Ünï"', {"target": "x"})),
    ]


def test_listed_subfolders_blank_lines_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    root = flat_folder(tmp_path / "f", {"file_name": "sub/a.png", "prompt": "a cat"}, "", "   ")
    listing = root / "metadata.jsonl"
    listing.write_bytes(b"\xef\xbb\xbf" + listing.read_bytes())
    assert [row.path for row in read_image_folder(root)] == [root / "sub" / "a.png"]


def test_a_line_separator_inside_a_prompt_does_not_split_the_line(tmp_path: Path) -> None:
    root = flat_folder(tmp_path / "f", {"file_name": "a.png", "prompt": "x"})
    line = json.dumps({"file_name": "a.png", "prompt": "one\u2028two"}, ensure_ascii=False)
    (root / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_image_folder(root)[0].prompt.text == "one\u2028two"


def test_genevals_layout_gives_every_sample_its_folders_prompt(tmp_path: Path) -> None:
    root = geneval_folder(tmp_path, {"a red car": 2, "a blue dog": 1})
    rows = read_image_folder(root)
    assert [str(row.path.relative_to(root)) for row in rows] == [
        "00000/samples/00000.png",
        "00000/samples/00001.png",
        "00001/samples/00000.png",
    ]
    assert [row.prompt.text for row in rows] == ["a red car", "a red car", "a blue dog"]
    assert rows[0].prompt.metadata == {"tag": "colors"}


def test_overviews_hidden_files_and_other_kinds_are_no_pictures(tmp_path: Path) -> None:
    root = flat_folder(tmp_path / "f", {"file_name": "a.png", "prompt": "a cat"})
    save_png(picture(), root / "grid.png")
    (root / "._a.png").write_bytes(b"thumbnail")
    (root / "notes.txt").write_text("hello")
    assert len(read_image_folder(root)) == 1


def test_a_folder_that_is_absent_or_a_file(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(tmp_path / "file")


def test_a_folder_without_metadata_says_what_to_write(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "a.png")
    message = refused(tmp_path)
    assert str(tmp_path) in message and "metadata.jsonl" in message and "file_name" in message and "samples" in message


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("{broken", "not valid JSON"),
        ("[1, 2]", "expected a JSON object"),
        ({"file_name": "b.png"}, '"prompt"'),
        ({"file_name": "b.png", "prompt": "  "}, '"prompt"'),
        ({"prompt": "a cat"}, '"file_name"'),
        ('{"file_name": 3, "prompt": "a cat"}', '"file_name"'),
        ('{"file_name": "gone.png", "prompt": "a cat"}', "gone.png does not exist"),
        ('{"file_name": "a.png", "prompt": "a cat"}', "already listed in line 1"),
        ('{"file_name": "../a.png", "prompt": "a cat"}', "inside the folder"),
        ('{"file_name": "/etc/a.png", "prompt": "a cat"}', "inside the folder"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, line: Any, fragment: str) -> None:
    root = flat_folder(tmp_path / "f", {"file_name": "a.png", "prompt": "a cat"}, "", line)
    message = refused(root)
    assert f"{root / 'metadata.jsonl'}, line 3" in message and fragment in message


def test_pictures_that_are_not_listed_are_named(tmp_path: Path) -> None:
    root = flat_folder(tmp_path / "f", {"file_name": "a.png", "prompt": "a cat"})
    for name in ("w.JPG", "x.png", "y.webp", "z.png"):
        save_png(picture(), root / name)
    message = refused(root)
    assert "does not list w.JPG, x.png, y.webp and 1 more" in message and str(root / "metadata.jsonl") in message


def test_an_empty_list_and_one_that_is_no_text(tmp_path: Path) -> None:
    assert "lists no pictures" in refused(flat_folder(tmp_path / "f"))
    (tmp_path / "f" / "metadata.jsonl").write_bytes(b"\xff\xfe\x00bad")
    assert "cannot be read" in refused(tmp_path / "f")


def test_a_damaged_geneval_layout_is_named(tmp_path: Path) -> None:
    root = geneval_folder(tmp_path, {"a red car": 1, "a blue dog": 1})
    listing = root / "00001" / "metadata.jsonl"
    good = listing.read_text()
    listing.write_text(good + "\n" + good)
    assert f"{listing}: " in refused(root) and "got 2" in refused(root)
    listing.write_text("{broken")
    assert f"{listing}, line 1: not valid JSON" in refused(root)
    listing.unlink()
    assert f"{root / '00001'} has no metadata.jsonl" in refused(root)
    listing.write_text(good)
    shutil.rmtree(root / "00001" / "samples")
    assert f"{root / '00001' / 'samples'} holds no pictures" in refused(root)


def test_loose_pictures_beside_genevals_folders_are_named(tmp_path: Path) -> None:
    root = geneval_folder(tmp_path, {"a red car": 1})
    save_png(picture(), root / "loose.png")
    assert "loose.png" in refused(root)


# --- single pictures


def test_a_png_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "new" / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "new" / "a.png"), picture())


def test_kinds_of_pictures_become_rgb(tmp_path: Path) -> None:
    red = pil.new("RGB", (4, 3), (255, 0, 0))
    transparent = pil.new("RGBA", (4, 3), (255, 0, 0, 0))
    half = pil.new("RGBA", (4, 3), (255, 0, 0, 51))
    deep = pil.fromarray(np.full((3, 4), 32896, dtype=np.uint16))
    palette = red.quantize(4)
    see_through = red.quantize(4)
    see_through.info["transparency"] = 0
    cases = [
        (red, "png", (255, 0, 0)),
        (transparent, "png", (255, 255, 255)),
        (half, "png", (255, 204, 204)),
        (palette, "png", (255, 0, 0)),
        (see_through, "png", (255, 255, 255)),
        (pil.new("L", (4, 3), 77), "png", (77, 77, 77)),
        (pil.new("LA", (4, 3), (77, 0)), "png", (255, 255, 255)),
        (pil.new("1", (4, 3), 1), "png", (255, 255, 255)),
        (deep, "png", (128, 128, 128)),
        (pil.fromarray(np.full((3, 4), 65535, dtype=np.uint16)), "png", (255, 255, 255)),
        (red, "bmp", (255, 0, 0)),
        (red, "webp", None),
        (pil.new("CMYK", (4, 3), (0, 0, 0, 255)), "jpg", (0, 0, 0)),
    ]
    for number, (source, suffix, colour) in enumerate(cases):
        file = tmp_path / f"{number}.{suffix}"
        source.save(file, **({"transparency": 0} if source is see_through else {}))
        loaded = load_image(file)
        assert loaded.shape == (3, 4, 3) and loaded.dtype == np.uint8, (number, loaded.shape)
        if colour is not None:
            assert loaded[1, 2].tolist() == list(colour), number


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = pil.Exif()
    exif[0x0112] = 6  # turn right
    pil.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (8, 4, 3)


@pytest.mark.parametrize(
    "damage", ["truncated png", "truncated jpeg", "text", "empty", "float tiff", "folder", "absent"]
)
def test_a_file_that_is_no_whole_picture_is_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "bad.png"
    if damage.startswith("truncated"):
        pil.fromarray(picture(64, 64)).save(file, format=damage.split()[1])
        file.write_bytes(file.read_bytes()[:1500])
    elif damage == "text":
        file.write_text("hello")
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "float tiff":
        pil.new("F", (4, 4)).save(file, format="tiff")
    elif damage == "folder":
        file.mkdir()
    with pytest.raises(DataError, match=r"bad\.png"):
        load_image(file)


@pytest.mark.parametrize(
    "array",
    [
        picture().astype(np.float32),
        picture().transpose(2, 0, 1),
        picture()[..., 0],
        picture()[None],
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_only_rgb_bytes_are_saved(tmp_path: Path, array: Image) -> None:
    with pytest.raises(DataError, match=r"uint8 \[H, W, 3\]"):
        save_png(array, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RamctlError, match=r"a\.png cannot be written"):
        save_png(picture(), tmp_path / "file" / "a.png")


# --- writing folders


def test_a_written_folder_reads_back(tmp_path: Path) -> None:
    images = np.stack([picture(seed=i) for i in range(3)])
    prompts = [
        Prompt("a cat", {"tag": "x"}),
        Prompt('a sign "Ü"', {"target": "Ü", "file_name": "old.png"}),
        Prompt("c"),
    ]
    rows = write_image_folder(tmp_path / "out", images, prompts)
    assert [row.path.name for row in rows] == ["00000.png", "00001.png", "00002.png"]
    read = read_image_folder(tmp_path / "out")
    assert [row.path for row in read] == [row.path for row in rows]
    assert [row.prompt for row in read] == [prompts[0], Prompt('a sign "Ü"', {"target": "Ü"}), prompts[2]]
    for row, image in zip(read, images, strict=True):
        np.testing.assert_array_equal(load_image(row.path), image)


def test_names_and_sizes_may_be_chosen_and_the_same_folder_written_again(tmp_path: Path) -> None:
    images = [picture(4, 5), picture(7, 3)]
    for _ in range(2):
        write_image_folder(tmp_path, images, [Prompt("a"), Prompt("b")], ["x.png", "sub/y.png"])
    assert [load_image(row.path).shape for row in read_image_folder(tmp_path)] == [(4, 5, 3), (7, 3, 3)]


def test_other_peoples_pictures_are_not_mixed_in(tmp_path: Path) -> None:
    save_png(picture(), tmp_path / "mine.png")
    with pytest.raises(DataError, match=r"already holds other pictures \(mine\.png\)"):
        write_image_folder(tmp_path, [picture()], [Prompt("a")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.png"]


@pytest.mark.parametrize(
    ("prompts", "names", "fragment"),
    [
        ([Prompt("a")], None, "2 images, 1 prompts"),
        ([Prompt("a"), Prompt("b")], ["x.png"], "1 names"),
        ([Prompt("a"), Prompt("b")], ["x.png", "x.png"], "'x.png' is given twice"),
        ([Prompt("a"), Prompt("b")], ["x.png", "y.jpg"], "'y.jpg' does not end"),
        ([Prompt("a"), Prompt("b")], ["x.png", "../y.png"], "inside the folder"),
    ],
)
def test_lists_that_do_not_fit_are_refused_before_writing(
    tmp_path: Path, prompts: list[Prompt], names: list[str] | None, fragment: str
) -> None:
    with pytest.raises(DataError, match=fragment.replace("(", r"\(")):
        write_image_folder(tmp_path / "out", [picture(), picture()], prompts, names)
    assert not (tmp_path / "out").exists()


# --- grids


def test_a_grid_fills_row_by_row_with_white_gaps() -> None:
    images = np.stack([np.full((2, 3, 3), value, dtype=np.uint8) for value in (10, 20, 30)])
    grid = make_grid(images, columns=2, gap=1, scale=2)
    assert grid.shape == (2 * 4 + 1, 2 * 6 + 1, 3) and grid.dtype == np.uint8
    assert (grid[:4, :6] == 10).all() and (grid[:4, 7:] == 20).all() and (grid[5:, :6] == 30).all()
    assert (grid[4] == 255).all() and (grid[:, 6] == 255).all() and (grid[5:, 7:] == 255).all()


def test_a_grid_is_no_wider_than_its_pictures() -> None:
    assert make_grid(picture()[None], columns=8).shape == picture().shape


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"columns": 2, "scale": 0}, {"columns": 2, "gap": -1}])
def test_impossible_grids_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError):
        make_grid(picture()[None], **wrong)
    with pytest.raises(DataError):
        make_grid(np.zeros((0, 2, 2, 3), dtype=np.uint8), columns=2)


# --- batches


def rows_of(tmp_path: Path, shapes: list[tuple[int, int]]) -> list[ImageRow]:
    rows = []
    for i, (height, width) in enumerate(shapes):
        save_png(picture(height, width, seed=i), tmp_path / f"{i}.png")
        rows.append(ImageRow(tmp_path / f"{i}.png", Prompt(f"picture {i}")))
    return rows


def test_batches_hold_one_size_each_and_every_picture_once(tmp_path: Path) -> None:
    shapes = [(4, 4), (6, 4), (4, 4), (4, 4), (6, 4), (4, 4), (4, 4)]
    rows = rows_of(tmp_path, shapes)
    seen = {}
    for batch in batches_by_size(rows, batch_size=2):
        assert isinstance(batch, ImageBatch) and 1 <= len(batch.images) <= 2
        for index, image, prompt in zip(batch.indices, batch.images, batch.prompts, strict=True):
            assert index not in seen
            seen[index] = image
            assert prompt == rows[index].prompt
    assert sorted(seen) == list(range(7))
    for index, image in seen.items():
        np.testing.assert_array_equal(image, picture(*shapes[index], seed=index))


def test_an_unreadable_picture_is_reported_among_the_batches(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [(40, 40)] * 3)
    rows[1].path.write_bytes(rows[1].path.read_bytes()[:200])
    got = list(batches_by_size(rows))
    broken = [item for item in got if isinstance(item, UnreadableImage)]
    assert [item.index for item in broken] == [1] and str(rows[1].path) in broken[0].reason
    assert [item.indices for item in got if isinstance(item, ImageBatch)] == [(0, 2)]


def test_many_sizes_do_not_pile_up(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [(2 + i, 3) for i in range(20)])
    waiting = 0
    for position, row in enumerate(batches_by_size(iter_counted(rows, counter := []), batch_size=2)):
        assert isinstance(row, ImageBatch)
        waiting = max(waiting, len(counter) - position)
    assert waiting <= 8


def iter_counted(rows: list[ImageRow], counter: list[int]) -> Any:
    """The rows, noting in ``counter`` how many were asked for."""

    class Counted(list[ImageRow]):
        def __iter__(self) -> Any:
            for row in super().__iter__():
                counter.append(1)
                yield row

    return Counted(rows)


def test_no_rows_and_a_wrong_batch_size() -> None:
    assert list(batches_by_size([])) == []
    with pytest.raises(DataError, match="batch size"):
        list(batches_by_size([], batch_size=0))
