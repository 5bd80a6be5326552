"""Drafts from what the sequence itself has said before: prompt lookup."""

from __future__ import annotations

from collections.abc import Iterable

from stateferry.drafting.suffix_automaton import SuffixAutomaton
from stateferry.drafting.tree import NO_DRAFT, DraftTree, chain, merged

# Shorter repetitions say too little of what follows.
_SHORTEST_MATCH = 2


# Of another continuation than the likeliest.
_BRANCH_TOKENS = 3


class NgramDrafter:
    """Of one sequence. Proposes what followed the longest suffix that occurred before, and what
    followed shorter ones elsewhere."""

    def __init__(self, token_ids: Iterable[int], paths: int = 1) -> None:
        """paths: most continuations of one draft."""
        self._automaton = SuffixAutomaton()
        self._paths = paths
        # (length, end) of the suffixes, the longest first.
        self._found: list[tuple[int, int]] = []
        for token_id in token_ids:
            self.observe(token_id)

    def observe(self, token_id: int) -> None:
        """The sequence goes on with ``token_id``."""
        self._automaton.append(token_id)
        # Shorter ones often went on like the longest.
        self._found = self._automaton.find_all(1 if self._paths == 1 else 4 * self._paths)
        self._automaton.renew()

    @property
    def match_length(self) -> int:
        """Tokens of the suffix that occurred before."""
        return self._found[0][0] if self._found else 0

    def propose(self, most: int) -> DraftTree:
        """At most ``most`` tokens; none where nothing is repeated."""
        if self.match_length < _SHORTEST_MATCH or most < 1:
            return NO_DRAFT
        tokens = self._automaton.tokens
        branches: dict[int, int] = {}
        for length, end in self._found:
            if length >= _SHORTEST_MATCH and len(branches) < self._paths:
                branches.setdefault(tokens[end], end)
        main, *others = branches.values()
        if not others:
            return chain(self._continuation(main, most))
        kept = max(1, most - _BRANCH_TOKENS * len(others))
        chains = [self._continuation(main, kept)]
        chains += [self._continuation(end, _BRANCH_TOKENS) for end in others]
        return merged(chains, most)

    def _continuation(self, end: int, count: int) -> list[int]:
        """What followed, which may go on where the sequence ends: then it goes round again."""
        tokens = self._automaton.tokens
        guessed = tokens[end : end + count]
        period = len(tokens) - end
        while len(guessed) < count:
            guessed.append(guessed[len(guessed) - period])
        return guessed
