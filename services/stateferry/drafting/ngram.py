"""Drafts from what the sequence itself has said before: prompt lookup."""

from __future__ import annotations

from collections.abc import Iterable

from stateferry.drafting.ngram_index import NgramIndex
from stateferry.drafting.tree import NO_DRAFT, DraftTree, chain, merged

# Of another continuation than the likeliest.
_BRANCH_TOKENS = 3


class NgramDrafter:
    """Of one sequence. Proposes what followed the longest suffix that occurred before, and maybe
    what followed it elsewhere."""

    def __init__(self, token_ids: Iterable[int], paths: int = 1) -> None:
        """paths: most continuations of one draft."""
        self._index = NgramIndex()
        self._paths = paths
        for token_id in token_ids:
            self._index.append(token_id)

    def observe(self, token_id: int) -> None:
        """The sequence goes on with ``token_id``."""
        self._index.append(token_id)

    @property
    def match_length(self) -> int:
        """Tokens of the suffix that occurred before; 0 where too few did."""
        return self._index.find()[0][0] if self._index.repeats else 0

    def propose(self, most: int) -> DraftTree:
        """At most ``most`` tokens; none where nothing is repeated."""
        if not self._index.repeats or most < 1:
            return NO_DRAFT
        tokens = self._index.tokens
        branches: dict[int, int] = {}
        for _, end in self._index.find():
            if len(branches) < self._paths:
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
        tokens = self._index.tokens
        guessed = tokens[end : end + count]
        period = len(tokens) - end
        while len(guessed) < count:
            guessed.append(guessed[len(guessed) - period])
        return guessed
