"""Who is next: by priority, then by arrival, and nobody is passed over for ever."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Place(Generic[ItemT]):
    item: ItemT
    priority: int
    since_s: float
    # Tells apart those of one moment.
    number: int

    @property
    def arrival(self) -> tuple[float, int]:
        return self.since_s, self.number


_arrival = attrgetter("arrival")


class WaitingLine(Generic[ItemT]):
    """Items that wait, each of which is in the line once. Whoever has waited for ``starvation_s``
    comes before all others, the longest wait first. Has no clock: it is told the time, in seconds
    of any clock that does not go back."""

    def __init__(self, starvation_s: float = math.inf) -> None:
        self.starvation_s = starvation_s
        self._places: dict[ItemT, _Place[ItemT]] = {}
        # By priority, in order of arrival: only the first of each can be next.
        self._levels: dict[int, list[_Place[ItemT]]] = {}
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, item: ItemT) -> bool:
        return item in self._places

    def __iter__(self) -> Iterator[ItemT]:
        """In no particular order."""
        return iter(self._places)

    def add(self, item: ItemT, priority: int, since_s: float) -> None:
        """``item`` has waited since ``since_s``, which may be a while ago."""
        self._num_added += 1
        place = self._places[item] = _Place(item, priority, since_s, self._num_added)
        insort(self._levels.setdefault(priority, []), place, key=_arrival)

    def remove(self, item: ItemT) -> None:
        """``item`` waits no longer. Raises KeyError if it did not."""
        place = self._places.pop(item)
        level = self._levels[place.priority]
        level.remove(place)
        if not level:
            del self._levels[place.priority]

    def first(self, now_s: float) -> ItemT | None:
        """Who is next; None when nobody waits."""
        place = self._first(now_s)
        return None if place is None else place.item

    def in_order(self, now_s: float) -> list[ItemT]:
        """All of them, the next one first."""

        def rank(place: _Place[ItemT]) -> tuple[float, tuple[float, int]]:
            return -math.inf if self._starves(place, now_s) else -place.priority, place.arrival

        return [place.item for place in sorted(self._places.values(), key=rank)]

    def highest(self) -> ItemT | None:
        """The first of those of the highest priority, however long others have waited."""
        return self._levels[max(self._levels)][0].item if self._levels else None

    def anyone_before(self, priority: int, now_s: float) -> bool:
        """Whether a newcomer of this priority would not be next."""
        place = self._first(now_s)
        return place is not None and (place.priority >= priority or self._starves(place, now_s))

    def _first(self, now_s: float) -> _Place[ItemT] | None:
        if not self._levels:
            return None
        heads = [level[0] for level in self._levels.values()]
        longest = min(heads, key=_arrival)
        if self._starves(longest, now_s):
            return longest
        return self._levels[max(self._levels)][0]

    def _starves(self, place: _Place[ItemT], now_s: float) -> bool:
        return now_s - place.since_s >= self.starvation_s
