"""Which cached thing goes first when memory is short.

Priorities are dates, in ticks of the cache's own clock (one per lookup or insert): what has the
earliest date goes first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from stateferry.cache.entries import Origin

T = TypeVar("T")

# How fast values are learned: the share of each eviction, or use, in the running means.
_LEARNING_RATE = 0.05
# Entries that were used more often are taken for one kind.
_MAX_HITS = 4
# Before anything is known of a kind; and the least that it can fall to, so that it gets a chance.
_FIRST_CHANCE, _LEAST_CHANCE = 0.5, 0.01


class EvictionPolicy(Protocol):
    """Turns what is known of an entry into its date."""

    def date(self, last_used: int, saved_tokens: int, hits: int, origin: Origin) -> float:
        """``saved_tokens`` are those that somebody would have to compute again without the
        entry, which was used ``hits`` times."""

    def used(self, hits: int, origin: Origin) -> None:
        """Learn from an entry that is used again, after ``hits`` times before."""

    def evicted(self, age: int, saved_tokens: int, hits: int, origin: Origin) -> None:
        """Learn from what had to go, ``age`` ticks after it was last used."""


class LruPolicy:
    """The date of the last use, whatever it is worth."""

    def date(self, last_used: int, saved_tokens: int, hits: int, origin: Origin) -> float:
        return float(last_used)

    def used(self, hits: int, origin: Origin) -> None:
        pass

    def evicted(self, age: int, saved_tokens: int, hits: int, origin: Origin) -> None:
        pass


class ValuePolicy:
    """Recency and compute saved per byte (the idea of Marconi, arXiv 2411.19379), times the chance
    that an entry is used at all.

    That chance is learned by why an entry was made and how often it was used: of those that came
    so far, the share that was used once more before it had to go. It tells the end of a turn, which
    the next turn goes on from once, from a preamble that everybody begins with.

    What an entry still promises falls with the time since its last use: it is ``value / age``; all
    entries of one pool have the same bytes. It goes when that falls below what memory is worth now,
    ``1 / ticks_per_value``, which is learned from what was evicted: at the date ``last_used +
    ticks_per_value * value``. Time passing changes no date, so a heap can keep them.
    """

    def __init__(self) -> None:
        self._ticks_per_value = 0.0
        self._chances: dict[tuple[Origin, int], float] = {}

    def date(self, last_used: int, saved_tokens: int, hits: int, origin: Origin) -> float:
        return last_used + self._ticks_per_value * self._value(saved_tokens, hits, origin)

    def used(self, hits: int, origin: Origin) -> None:
        self._learn(hits, origin, 1.0)

    def evicted(self, age: int, saved_tokens: int, hits: int, origin: Origin) -> None:
        value = self._value(saved_tokens, hits, origin)
        self._learn(hits, origin, 0.0)
        if value:
            self._ticks_per_value += _LEARNING_RATE * (age / value - self._ticks_per_value)

    def _value(self, saved_tokens: int, hits: int, origin: Origin) -> float:
        # Long prompts are asked for again less often than short ones, so twice the tokens are less
        # than twice the promise: the root did best of {none, log, root, linear} on a recorded
        # trace.
        return math.sqrt(saved_tokens) * self._chance(hits, origin)

    def _chance(self, hits: int, origin: Origin) -> float:
        return self._chances.get((origin, min(hits, _MAX_HITS)), _FIRST_CHANCE)

    def _learn(self, hits: int, origin: Origin, outcome: float) -> None:
        chance = self._chance(hits, origin)
        chance += _LEARNING_RATE * (outcome - chance)
        self._chances[origin, min(hits, _MAX_HITS)] = max(chance, _LEAST_CHANCE)


class EvictionQueue(Generic[T]):
    """Candidates by date. Adding, changing and taking cost O(log n).

    A date that moves away, the common case, only marks the entry in the heap as too early; it is
    put right when it comes up.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._dates: dict[T, tuple[float, int]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._dates)

    def __iter__(self) -> Iterator[T]:
        return iter(self._dates)

    def put(self, item: T, date: float) -> None:
        """Make ``item`` a candidate, or change its date."""
        known = self._dates.get(item)
        if known is not None and date >= known[0]:
            self._dates[item] = (date, known[1])
            return
        self._push(item, date)

    def discard(self, item: T) -> None:
        """``item`` is no candidate any more."""
        self._dates.pop(item, None)

    def pop(self) -> T | None:
        """Take the candidate with the earliest date; None when there is none."""
        while self._heap:
            date, number, item = heapq.heappop(self._heap)
            known = self._dates.get(item)
            if known is None or known[1] != number:
                continue
            if known[0] > date:
                self._push(item, known[0])
                continue
            del self._dates[item]
            return item
        return None

    def _push(self, item: T, date: float) -> None:
        # Entries of what was discarded come up in the end, or are swept when they are most.
        if len(self._heap) > 2 * len(self._dates) + 64:
            live = {number for _, number in self._dates.values()}
            self._heap = [entry for entry in self._heap if entry[1] in live]
            heapq.heapify(self._heap)
        number = next(self._numbers)
        self._dates[item] = (date, number)
        heapq.heappush(self._heap, (date, number, item))
