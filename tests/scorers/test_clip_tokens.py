"""Text to tokens: the hub's way and open_clip's, and where they part."""

from __future__ import annotations

from typing import Any

import pytest

from ramctl.errors import DataError, MissingDependencyError, ScorerError
from ramctl.scorers.clip import clip_vit_l14
from ramctl.scorers.clip_tokens import CONTEXT, hub_tokenizer, open_clip_clean, open_clip_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the official file")

PLAIN = [
    "a red circle",
    "",
    "E=mc²",
    "don't",
    'a sign that says "OPEN"',
    "🐱 and 🔴",
    "x " * 200,
    "photo photo",
    "\n a\tcat",
]


@pytest.fixture(scope="module")
def hub(clip_store: Any) -> Any:
    return hub_tokenizer("clip-vit-l14")


@pytest.fixture(scope="module")
def mended(clip_store: Any) -> Any:
    return open_clip_tokenizer("clip-vit-l14")


@pytest.mark.parametrize("text", [*PLAIN, "a “red” circle", "caf&eacute;", "ＲＥＤ", "<|endoftext|> cat"])
def test_the_hub_s_ids_are_those_of_its_own_class(clip_store: Any, hub: Any, text: str) -> None:
    from transformers import CLIPTokenizer

    official = CLIPTokenizer.from_pretrained(clip_store.root / "clip-vit-l14")
    assert hub(text) == official(text, truncation=True, max_length=77)["input_ids"]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_has_the_same_ids_either_way(hub: Any, mended: Any, text: str) -> None:
    assert hub(text) == mended(text)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a “red” circle", 'a "red" circle'),
        ("don’t", "don't"),
        ("salt &amp; pepper", "salt & pepper"),
        ("&amp;amp;quot;red&amp;amp;quot;", '"red"'),  # once by ftfy, twice more
        ("< &amp;lt; red", "< < red"),  # not by ftfy, which takes this for HTML
        ("ＲＥＤ ｃｉｒｃｌｅ", "red circle"),
        ("  A \n\t Cat  ", "a cat"),
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1
        ("&lt;b&gt;", "<b>"),
        ("", ""),
    ],
)
def test_open_clip_mends_text(hub: Any, mended: Any, text: str, clean: str) -> None:
    assert open_clip_clean(text) == clean
    assert mended(text) == hub(clean)
    if clean != " ".join(text.split()).lower():
        assert mended(text) != hub(text)  # the trap: with the other tokenizer the score is another


def test_a_long_text_keeps_its_start_and_ends_with_the_end(hub: Any, mended: Any) -> None:
    text = "red " * 200
    for tokenise in (hub, mended):
        ids = tokenise(text)
        start, end = tokenise("")
        word = tokenise("red")[1]
        assert ids == [start, *[word] * (CONTEXT - 2), end]
        assert len(tokenise("red " * 75)) == CONTEXT


def test_an_empty_text_is_start_and_end_and_the_end_is_the_highest_id(hub: Any, mended: Any) -> None:
    for tokenise in (hub, mended):
        ids = tokenise("")
        assert len(ids) == 2 and ids[1] == max(tokenise("a red cat 🐱")) == ids[0] + 1


def test_words_are_cut_as_clip_cuts_them(mended: Any) -> None:
    # One token each, but for the digits, which stand alone, and letters outside of the small vocabulary.
    assert len(mended("red circle")) == 2 + 2
    assert mended("don't")[1:-1] == mended("don 't")[1:-1]
    assert mended("12")[1:-1] == mended("1")[1:-1] + mended("2")[1:-1]
    assert mended("red,circle")[1:-1] == [*mended("red")[1:-1], *mended(",")[1:-1], *mended("circle")[1:-1]]


def test_open_clip_s_own_names_of_start_and_end_are_tokens(mended: Any) -> None:
    start, end = mended("")
    assert mended("a <end_of_text> cat") == [start, *mended("a")[1:-1], end, *mended("cat")[1:-1], end]
    # The vocabulary's names of the same are ordinary text to open_clip.
    assert end not in mended("a <|endoftext|> cat")[:-1]


def test_half_a_surrogate_pair_is_bad_data(clip_store: Any) -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        clip_vit_l14("cpu").tokens("a \ud83d cat")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("vocab.json", ""),
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", "{}"),
        ("merges.txt", "a b c"),
        ("merges.txt", "no-such pair"),
    ],
)
def test_damaged_vocabularies_are_named(clip_files: Any, file: str, content: str) -> None:
    path = clip_files.tokenizer("clip-vit-l14") / file
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ScorerError, match=file):
        open_clip_tokenizer("clip-vit-l14")


def test_missing_vocabularies_are_named(clip_files: Any) -> None:
    for file in ("vocab.json", "merges.txt"):
        (clip_files.tokenizer("clip-vit-l14") / file).unlink()
        with pytest.raises(MissingDependencyError, match=f"{file}.*download-weights clip-vit-l14"):
            open_clip_tokenizer("clip-vit-l14")
