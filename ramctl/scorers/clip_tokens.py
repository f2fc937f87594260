"""Text to token ids, in the two ways the CLIP scorers were published with.

Both give the ids of start, text and end, at most :data:`CONTEXT` of them; they differ in how text is cleaned before it
is split. The official numbers of PickScore and CLIPScore come from the hub's tokenizer (Unicode NFC, lower case), those
of HPSv2 from open_clip's (mended by ftfy, HTML entities resolved twice, lower case): curly quotes, ``&amp;`` and
full-width letters end as other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ramctl.errors import ScorerError
from ramctl.weights import command_for, weight_file

Tokenise = Callable[[str], list[int]]

#: Positions of every CLIP text encoder used here; longer texts lose their end and keep the end token.
CONTEXT = 77

#: How CLIP cuts text into words: contractions, runs of letters, single digits, runs of anything else but blanks.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

#: The vocabulary's names of the start and end tokens, and the names by which open_clip knows them inside a text.
_VOCABULARY_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
_OPEN_CLIP_SPECIALS = ("<start_of_text>", "<end_of_text>")

HUB_FILES = ("tokenizer.json",)
OPEN_CLIP_FILES = ("vocab.json", "merges.txt")


def hub_tokenizer(name: str) -> Tokenise:
    """The tokenizer published with the weights entry ``name`` (its ``tokenizer.json``).

    Raises:
        MissingDependencyError: the file is not there.
        ScorerError: it cannot be read.
    """
    from tokenizers import Tokenizer

    file = weight_file(name, "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain exceptions
        raise _unreadable(file, name, error) from None
    # Both may be set in the file, to other values; padding is the encoder's business.
    tokenizer.enable_truncation(CONTEXT)
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text).ids)


def open_clip_tokenizer(name: str) -> Tokenise:
    """open_clip's way of cleaning and cutting text, over the vocabulary files of the weights entry ``name``.

    Raises:
        MissingDependencyError: a file is not there.
        ScorerError: one cannot be read, or lacks the start and end tokens.
    """
    vocabulary_file, merges_file = (weight_file(name, file) for file in OPEN_CLIP_FILES)
    try:
        vocabulary: dict[str, int] = json.loads(vocabulary_file.read_text(encoding="utf-8"))
        start, end = (vocabulary.pop(special) for special in _VOCABULARY_SPECIALS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(vocabulary_file, name, error) from None
    vocabulary.update(zip(_OPEN_CLIP_SPECIALS, (start, end), strict=True))
    try:
        lines = merges_file.read_text(encoding="utf-8").split("\n")
        splits = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
        tokenizer = _word_tokenizer(vocabulary, [(left, right) for left, right in splits])
    except Exception as error:  # the package raises plain exceptions
        raise _unreadable(merges_file, name, error) from None

    def tokenise(text: str) -> list[int]:
        ids = tokenizer.encode(open_clip_clean(text)).ids
        return [start, *ids[: CONTEXT - 2], end]

    return tokenise


def open_clip_clean(text: str) -> str:
    """Text as open_clip reads it: ftfy, HTML entities resolved twice, single blanks, lower case."""
    import html

    import ftfy

    mended = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(mended.split()).lower()


def _word_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """Byte-pair encoding of cleaned text, without start and end."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix="")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(special, normalized=False) for special in _OPEN_CLIP_SPECIALS])
    return tokenizer


def _unreadable(file: Path, name: str, error: Exception) -> ScorerError:
    return ScorerError(f"{file} cannot be read as a CLIP tokenizer ({error}): {command_for(name)} --verify")
