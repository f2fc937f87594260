"""Choices by hash, and patterns filled from word lists."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from ramctl.errors import DataError
from ramctl.promptsets.choosing import Words, article, first_by_hash, pick, plain, repeated_evenly, shares


def test_choices_do_not_depend_on_the_order_they_come_in() -> None:
    options = [f"option {n}" for n in range(200)]
    chosen = first_by_hash(options, 50, 1, "purpose")
    assert chosen == first_by_hash(reversed(options), 50, 1, "purpose")
    assert chosen != first_by_hash(options, 50, 2, "purpose")
    assert chosen != first_by_hash(options, 50, 1, "other")
    assert chosen != sorted(chosen)


def test_choices_are_the_same_for_ever() -> None:
    # The rule worked out here once more: a change of it would change every shipped set.
    def sha(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    for n in range(8):
        assert pick("abcdefg", 7, "x", n) == "abcdefg"[int(sha(f"7/x/{n}")[:8].hex(), 16) % 7]
    assert first_by_hash("abcdefgh", 4, 7, "x") == sorted("abcdefgh", key=lambda option: sha(f"7/x/{option}"))[:4]


def test_choices_are_even() -> None:
    seen = Counter(pick(range(10), 3, "even", n) for n in range(10_000))
    assert min(seen.values()) > 880
    assert max(seen.values()) < 1120


def test_shares_sum_to_the_total() -> None:
    assert shares(50_000, {"a": 7, "b": 5, "c": 3, "d": 1, "e": 1}) == {
        "a": 20588,
        "b": 14706,
        "c": 8824,
        "d": 2941,
        "e": 2941,
    }
    assert shares(2, {"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 0}


def test_repeats_come_out_even() -> None:
    assert repeated_evenly(["a", "b", "c"], 8) == ["a", "b", "c", "a", "b", "c", "a", "b"]
    assert repeated_evenly(["a", "b", "c"], 2) == ["a", "b"]


@pytest.mark.parametrize(
    "first, second", [("Café", "CAFE"), ("Today’s", "today's"), ("½ Cup", "1/2 cup"), ("H₂O", "h2o"), ("A - B", "ab")]
)
def test_plain_ignores_case_punctuation_and_typography(first: str, second: str) -> None:
    assert plain(first) == plain(second)


def test_articles_follow_the_sound() -> None:
    phrases = {"owl": "an", "Elephant": "an", "bear": "a", "hourglass": "an", "unicorn": "a", "one-way street": "a"}
    assert {phrase: article(phrase) for phrase in phrases} == phrases


def test_slots_are_filled_from_their_lists() -> None:
    words = Words({"fruit": "apple, pear", "number": "2..4", "thing": "@fruit, box of {number}", "one": "a, b | c"})
    assert words["number"] == ("2", "3", "4")
    assert words["thing"] == ("apple", "pear", "box of {number}")
    assert words["one"] == ("a, b", "c")
    texts = {words.fill("{A:fruit} and {a:fruit}, {thing}", 1, n) for n in range(200)}
    assert all(
        re.fullmatch(r"(An apple and a pear|A pear and an apple), (apple|pear|box of [234])", text) for text in texts
    )
    assert len(texts) == 10


def test_an_unknown_list_is_named() -> None:
    with pytest.raises(DataError, match="'fruits'"):
        Words({"fruit": "apple"}).fill("{fruits}", 1)
