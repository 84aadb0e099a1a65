"""The index of a text's past against brute force."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdraft.drafting import suffix_index as occurrences
from selfdraft.drafting.suffix_index import BORDER, REACH, Match, SuffixIndex

few = st.integers(0, 2)
ids = st.lists(few, max_size=40)
references = st.lists(ids, max_size=3)
prompts = st.lists(few, min_size=1, max_size=40)


def everywhere(index: SuffixIndex) -> set[Match]:
    """All places whose context ends like the text, with the length of what is shared."""
    text, found = index.ids, set()
    for place in range(1, len(text)):
        length = 0
        while length < REACH and text[place - 1 - length] == text[-1 - length] != BORDER:
            length += 1
        if length and text[place] != BORDER:
            found.add(Match(place, length))
    return found


@given(references, prompts, ids)
def test_finds_what_brute_force_finds(given: list[list[int]], prompt: list[int], text: list[int]) -> None:
    index = SuffixIndex(given, prompt)
    index.extend(text)
    found = index.find(10**6)
    assert len(found) == len(set(found))
    assert set(found) == everywhere(index)
    assert [m.length for m in found] == sorted((m.length for m in found), reverse=True)


@given(references, prompts, st.integers(1, 4))
def test_with_little_room_the_longest_contexts_stay(
    given: list[list[int]], prompt: list[int], most: int
) -> None:
    index = SuffixIndex(given, prompt)
    found, all_of_them = index.find(most), everywhere(index)
    assert len(found) <= most
    assert set(found) <= all_of_them
    assert max((m.length for m in found), default=0) == max((m.length for m in all_of_them), default=0)


def test_long_contexts_and_many_tokens() -> None:
    """Beyond REACH all lengths are equal; 8 bytes a token, whatever the text."""
    dice = np.random.default_rng(0)
    reference = dice.integers(0, 50, 5000).tolist()
    index = SuffixIndex([reference], reference[1000:1100])
    assert index.find(1) == [Match(1101, REACH)]
    assert (len(index.ids) + len(index.order)) * 4 <= 8.1 * 5100
    same = SuffixIndex([[7] * 3000], [7] * 100)
    assert [m.length for m in same.find(4)] == [REACH] * 4


def last_token_only(text: Sequence[int]) -> array[int]:
    places = [p for p in range(1, len(text)) if text[p] != BORDER and text[p - 1] != BORDER]
    return array("i", sorted(places, key=lambda place: text[place - 1]))


def test_a_shallow_order_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occurrences, "_sorted", last_token_only)
    with pytest.raises(AssertionError):
        test_finds_what_brute_force_finds()


def test_contexts_that_cross_a_border_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Any, place: int, length: int) -> int:
        return min(REACH, place)

    monkeypatch.setattr(SuffixIndex, "_common", careless)
    with pytest.raises(AssertionError):
        test_finds_what_brute_force_finds()
