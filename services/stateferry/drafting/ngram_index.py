"""Where the end of a growing sequence has occurred in it before.

A suffix automaton would find the longest such suffix, at ten microseconds a token: a twentieth of a
small model's step. Runs of three tokens are looked up in one, and the longest match is among those.
"""

from __future__ import annotations

RUN = 3
# Late occurrences are the better guesses.
_PLACES = 4
_LONGEST = 32


class NgramIndex:
    """All runs of ``RUN`` tokens, and where each was last."""

    __slots__ = ("_before", "_places", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        # Where the last run was before it was appended.
        self._before: tuple[int, ...] = ()

    def append(self, token_id: int) -> None:
        """The sequence goes on with ``token_id``."""
        tokens = self.tokens
        tokens.append(token_id)
        run = tuple(tokens[-RUN:])
        if len(run) < RUN:
            return
        places = self._places.get(run)
        if places is None:
            self._places[run] = [len(tokens)]
            self._before = ()
            return
        self._before = tuple(places)
        places.append(len(tokens))
        if len(places) > _PLACES:
            del places[0]

    @property
    def repeats(self) -> bool:
        """Whether the last run occurred before."""
        return bool(self._before)

    def find(self) -> list[tuple[int, int]]:
        """(length, end) of late occurrences of a suffix of at least ``RUN`` tokens: ``tokens[end]``
        came after it. The longest first, of equals the latest; lengths are told up to a bound."""
        found = [(self._length(end), end) for end in self._before]
        return sorted(found, reverse=True)

    def _length(self, end: int) -> int:
        tokens, last, length = self.tokens, len(self.tokens), RUN
        most = min(end, _LONGEST)
        while length < most and tokens[end - length - 1] == tokens[last - length - 1]:
            length += 1
        return length
