"""The longest suffix that occurred before, against a search of the whole sequence."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stateferry.drafting.suffix_automaton import SuffixAutomaton


def longest_before(tokens: list[int]) -> int:
    for length in range(len(tokens) - 1, 0, -1):
        suffix = tokens[-length:]
        if any(tokens[i : i + length] == suffix for i in range(len(tokens) - length)):
            return length
    return 0


@given(st.lists(st.integers(0, 3), max_size=60))
def test_every_prefix(tokens: list[int]) -> None:
    automaton, said = SuffixAutomaton(), []
    for token in tokens:
        automaton.append(token)
        said.append(token)
        length, end = automaton.find()
        assert length == longest_before(said)
        if length:
            assert end < len(said) and said[end - length : end] == said[-length:]
        automaton.renew()
    assert automaton.tokens == tokens


def test_a_late_occurrence_is_found() -> None:
    """What was said last is the better guess: 1 2 was followed by 3, then by 4."""
    automaton = SuffixAutomaton()
    for token in (1, 2, 3, 9, 1, 2, 4, 8, 1, 2):
        automaton.append(token)
        found = automaton.find()
        automaton.renew()
    assert found == (2, 6) and automaton.tokens[6] == 4


@pytest.mark.parametrize("kinds", [1, 2, 5000])
def test_its_size_is_linear(kinds: int) -> None:
    rng, automaton = random.Random(kinds), SuffixAutomaton()
    for _ in range(20_000):
        automaton.append(rng.randrange(kinds))
        automaton.find()
        automaton.renew()
    assert len(automaton._link) <= 2 * 20_000
