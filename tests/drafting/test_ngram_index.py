"""Suffixes that occurred before, against a search of the whole sequence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stateferry.drafting.ngram_index import RUN, NgramIndex


def longest_before(tokens: list[int]) -> int:
    for length in range(len(tokens) - 1, 0, -1):
        suffix = tokens[-length:]
        if any(tokens[i : i + length] == suffix for i in range(len(tokens) - length)):
            return length
    return 0


@given(st.lists(st.integers(0, 3), max_size=30))
def test_every_prefix(tokens: list[int]) -> None:
    index, said = NgramIndex(), []
    for token in tokens:
        index.append(token)
        said.append(token)
        longest = longest_before(said)
        assert index.repeats == (longest >= RUN) == bool(index.find())
        for length, end in index.find():
            assert RUN <= length <= longest
            assert end < len(said) and said[end - length : end] == said[-length:]
    assert index.tokens == tokens


def test_the_longest_first_then_the_latest() -> None:
    index = NgramIndex()
    for token in (9, 1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 6, 9, 1, 2, 3):
        index.append(token)
    assert index.find() == [(4, 4), (3, 12), (3, 8)]


def test_old_places_are_given_up() -> None:
    index = NgramIndex()
    for _ in range(5000):
        index.append(7)
    assert len(index._places) == 1 and len(index.find()) <= 4
