"""Where the end of a growing sequence has occurred in it before."""

from __future__ import annotations

# Ends of occurrences are renewed for so many suffixes of a new token, the longest first. Without a
# bound a run of one token would cost its length squared.
_RENEWED = 8


class SuffixAutomaton:
    """All runs of a sequence, built as it grows: amortised constant time and memory a token.

    A state is a set of runs that end at the same places; ``link`` leads to the longest of its
    suffixes that also ends elsewhere.
    """

    __slots__ = ("_end", "_last", "_length", "_link", "_next", "tokens")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        # Tokens up to and including one occurrence's last, a late one if not always the last.
        self._end = [0]
        self._last = 0

    def append(self, token_id: int) -> None:
        """The sequence goes on with ``token_id``."""
        self.tokens.append(token_id)
        count = len(self.tokens)
        new = self._add({}, self._length[self._last] + 1, count)
        state = self._last
        while state != -1 and token_id not in self._next[state]:
            self._next[state][token_id] = new
            state = self._link[state]
        if state == -1:
            self._link[new] = 0
        else:
            self._link[new] = self._split(state, token_id)
        self._last = new

    def renew(self) -> None:
        """From now on ``find`` gives occurrences that end here. To be called after ``find``, which
        would find the end itself."""
        count, state = len(self.tokens), self._link[self._last]
        for _ in range(_RENEWED):
            if state <= 0:
                return
            self._end[state] = count
            state = self._link[state]

    def find(self) -> tuple[int, int]:
        """(length, end): the longest suffix that occurred before, and where that occurrence ends:
        ``tokens[end]`` came after it. (0, 0) where there is none."""
        state = self._link[self._last]
        if state <= 0:
            return 0, 0
        return self._length[state], self._end[state]

    def find_all(self, most: int) -> list[tuple[int, int]]:
        """As ``find``, and the same for shorter suffixes that occurred elsewhere as well, the
        longest first; at most ``most``."""
        found: list[tuple[int, int]] = []
        state = self._link[self._last]
        while state > 0 and len(found) < most:
            found.append((self._length[state], self._end[state]))
            state = self._link[state]
        return found

    def _split(self, state: int, token_id: int) -> int:
        """The state that ``state`` with ``token_id`` leads to, for runs of no more than that."""
        target = self._next[state][token_id]
        length = self._length[state] + 1
        if self._length[target] == length:
            return target
        clone = self._add(dict(self._next[target]), length, self._end[target])
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state != -1 and self._next[state].get(token_id) == target:
            self._next[state][token_id] = clone
            state = self._link[state]
        return clone

    def _add(self, following: dict[int, int], length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(-1)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1
