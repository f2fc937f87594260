"""The runner's own part of the rule and of the protocol, in this process."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ramctl.scorers.deqa import runner

MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def message(header: dict[str, Any], payload: bytes = b"") -> bytes:
    data = json.dumps(header).encode()
    return struct.pack(">I", len(data)) + data + payload


def answers(requests: bytes) -> list[dict[str, Any]]:
    replies = io.BytesIO()
    runner.serve(io.BytesIO(requests), replies)
    replies.seek(0)
    found = []
    while replies.tell() < len(replies.getvalue()):
        found.append(runner.read_header(replies))
    return found


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 120, 250)])
@pytest.mark.parametrize("side", [1, 64, 448, 1000])
def test_a_plain_square_picture_keeps_its_colour(side: int, colour: tuple[int, int, int]) -> None:
    picture = np.full((side, side, 3), colour, dtype=np.uint8)
    pixels = runner.preprocess(picture)
    assert pixels.shape == (3, 448, 448) and pixels.dtype == np.float32
    expected = (np.array(colour) / 255 - MEAN) / STD
    np.testing.assert_allclose(pixels, np.broadcast_to(expected[:, None, None], pixels.shape), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(448, 224), (224, 448)])
def test_other_pictures_stand_in_the_middle_of_clips_mean_colour(height: int, width: int) -> None:
    pixels = runner.preprocess(np.full((height, width, 3), 255, dtype=np.uint8))
    if height < width:
        pixels = pixels.transpose(0, 2, 1)
    border = (np.array([122, 116, 104]) / 255 - MEAN) / STD
    white = (1 - MEAN) / STD
    for part, colour in ((pixels[:, :, :112], border), (pixels[:, :, 112:336], white), (pixels[:, :, 336:], border)):
        np.testing.assert_allclose(part, np.broadcast_to(colour[:, None, None], part.shape), atol=1e-6)


def test_the_prompt_leaves_room_for_one_picture() -> None:
    # 92 positions with the picture's 65 (64 queries and an end token).
    assert len(runner.BEFORE_IMAGE) + 65 + len(runner.AFTER_IMAGE) == 92
    assert runner.BEFORE_IMAGE[0] == 1 and 1 not in runner.AFTER_IMAGE
    assert len(set(runner.LEVEL_IDS)) == 5


def test_all_of_a_folders_modules_are_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 4.36.1 copies the model's module and its direct imports only.
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "deqa").mkdir()
    for name in ("model.py", "first.py", "second.py", "notes.txt"):
        (tmp_path / "deqa" / name).write_text(name)
    runner._lay_out_code(tmp_path / "deqa")
    place = tmp_path / "modules" / "transformers_modules" / "deqa"
    assert sorted(path.name for path in place.iterdir()) == ["first.py", "model.py", "second.py"]


def test_a_refused_batch_leaves_nothing_in_the_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    batch = message({"do": "score", "shape": [1, 2, 2, 3]}, bytes(12))
    replies = answers(batch + message({"do": "dance"}) + batch)
    assert [reply["ok"] for reply in replies] == [False] * 3
    assert [reply["kind"] for reply in replies] == ["error"] * 3
    assert replies[0]["error"] == "ValueError: asked to score before load"
    assert "dance" in replies[1]["error"]
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("cut", [0, 2, 10, -1])
def test_it_ends_quietly_when_its_input_ends(cut: int) -> None:
    whole = message({"do": "score", "shape": [1, 2, 2, 3]}, bytes(12))
    assert answers(whole[:cut]) == []


def test_what_is_no_header_is_not_waited_for() -> None:
    with pytest.raises(ValueError, match="header of"):
        answers(b"GET / HTTP/1.1\r\n")
