"""Prompt files: JSON lines, plain text, compressed; what is wrong with a file is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from ramctl.errors import DataError
from ramctl.prompts import Prompt, read_prompts, spread_by_tag, write_prompts

PROMPTS = [
    Prompt("a photo of a bench", {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}),
    Prompt('a sign that says "Café ½"', {"tag": "ocr", "target": "Café ½"}),
    Prompt("no metadata"),
]


@pytest.mark.parametrize("name", ["set.jsonl", "set.jsonl.gz"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    write_prompts(tmp_path / "new" / name, PROMPTS)
    assert read_prompts(tmp_path / "new" / name) == PROMPTS


def test_a_compressed_file_holds_the_plain_files_lines_and_no_time(tmp_path: Path) -> None:
    write_prompts(tmp_path / "a.jsonl", PROMPTS)
    write_prompts(tmp_path / "a.jsonl.gz", PROMPTS)
    packed = (tmp_path / "a.jsonl.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "a.jsonl").read_bytes()
    assert packed[4:8] == b"\0\0\0\0"  # the time field of the gzip header


def test_plain_text_may_be_compressed_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n\n  two \n"))
    assert read_prompts(tmp_path / "a.txt.gz") == [Prompt("one"), Prompt("two")]


def test_a_caption_may_hold_a_unicode_line_separator(tmp_path: Path) -> None:
    prompts = [Prompt("two\u2028lines\x85and more", {"target": "x\x0by"}), Prompt("next")]
    write_prompts(tmp_path / "a.jsonl", prompts)
    assert read_prompts(tmp_path / "a.jsonl") == prompts


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "one"}\r\n{"prompt": "two"}\r\n')
    assert read_prompts(tmp_path / "a.jsonl") == [Prompt("one"), Prompt("two")]


def test_a_broken_line_of_a_compressed_file_is_named_by_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "one"}\n\n{"prompt": }\n'))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz, line 3: not valid JSON"):
        read_prompts(tmp_path / "a.jsonl.gz")


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    good = gzip.compress(b'{"prompt": "one"}\n' * 50)
    damaged = bytearray(good)
    damaged[-6] ^= 0xFF  # in the checksum
    bad_stream = bytearray(good)
    bad_stream[10:14] = b"\xff\xff\xff\xff"
    cases = {
        "plain.jsonl.gz": b'{"prompt": "one"}\n',
        "cut.jsonl.gz": good[:-9],
        "checksum.jsonl.gz": bytes(damaged),
        "stream.jsonl.gz": bytes(bad_stream),
        "latin.jsonl": '{"prompt": "é"}'.encode("latin-1"),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            read_prompts(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        read_prompts(tmp_path / "absent.jsonl.gz")
    (tmp_path / "empty.jsonl.gz").write_bytes(gzip.compress(b"\n"))
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl.gz")


@pytest.mark.parametrize(
    "line", ["[]", '"text"', '{"text": "x"}', '{"prompt": ""}', '{"prompt": "  "}', '{"prompt": 3}']
)
def test_a_line_without_a_prompt_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2"):
        read_prompts(tmp_path / "a.jsonl")


def test_a_short_selection_takes_the_tags_in_turn() -> None:
    prompts = [Prompt(f"{tag}{n}", {"tag": tag}) for tag in "aabbbc" for n in (1,)]
    assert [p.tag for p in spread_by_tag(prompts, 4)] == ["a", "b", "c", "a"]
    assert len(spread_by_tag(prompts, 99)) == len(prompts)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt", "prompts.txt.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path, name: str) -> None:
    text = "a red star" if ".txt" in name else '{"prompt": "a red star"}'
    data = f"{text}\n".encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["a red star"]


@pytest.mark.parametrize("line", [r'{"prompt": "a \ud83d star"}', r'{"prompt": "a star", "target": "\uD83D"}'])
def test_half_a_character_is_refused_where_it_stands(tmp_path: Path, line: str) -> None:
    """No tokenizer takes it and no file can hold it, so it would break a run much later."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(r'{"prompt": "a whole one \ud83d\ude00"}' + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2: not valid Unicode"):
        read_prompts(file)
