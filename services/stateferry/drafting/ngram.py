"""Drafts from what the sequence itself has said before: prompt lookup."""

from __future__ import annotations

from collections.abc import Iterable

from stateferry.drafting.suffix_automaton import SuffixAutomaton
from stateferry.drafting.tree import NO_DRAFT, DraftTree, chain

# Shorter repetitions say too little of what follows.
_SHORTEST_MATCH = 2


class NgramDrafter:
    """Of one sequence. Proposes what followed the longest suffix that occurred before."""

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._automaton = SuffixAutomaton()
        self._found = (0, 0)
        for token_id in token_ids:
            self.observe(token_id)

    def observe(self, token_id: int) -> None:
        """The sequence goes on with ``token_id``."""
        self._automaton.append(token_id)
        self._found = self._automaton.find()
        self._automaton.renew()

    @property
    def match_length(self) -> int:
        """Tokens of the suffix that occurred before."""
        return self._found[0]

    def propose(self, most: int) -> DraftTree:
        """At most ``most`` tokens; none where nothing is repeated."""
        length, end = self._found
        if length < _SHORTEST_MATCH or most < 1:
            return NO_DRAFT
        tokens = self._automaton.tokens
        guessed = tokens[end : end + most]
        # What follows may reach the end of what is known; then it goes round again.
        period = len(tokens) - end
        while len(guessed) < most:
            guessed.append(guessed[len(guessed) - period])
        return chain(guessed)
