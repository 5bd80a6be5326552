"""Cached snapshots that go after all others: the last of each session, and those of sequences that
were preempted and will be back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from stateferry.cache.cached_prefixes import CachedPrefixes
from stateferry.cache.entries import Snapshot, Tail

# A date that nothing else reaches; what is protected keeps its order among itself.
PROTECTED_TICKS = 1 << 40


@dataclass(frozen=True, slots=True)
class ProtectionLimits:
    """``share`` of each pool at most, for ``ttl_s`` at most, of ``most`` at a time."""

    share: float
    ttl_s: float
    most: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """What it takes to use a snapshot. What others have in common with it counts for both."""

    snapshot: Snapshot
    since_s: float
    states: int
    tails: int
    kv_pages: int


class Protection:
    """One snapshot by name. Nothing is kept from whoever needs memory to run: protected places are
    evicted as well once there are no others."""

    def __init__(
        self, prefixes: CachedPrefixes, limits: ProtectionLimits, now_s: Callable[[], float]
    ) -> None:
        self._prefixes = prefixes
        self._limits = limits
        self._now_s = now_s
        # The one that was named last is last.
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._states = self._tails = self._kv_pages = 0

    def __len__(self) -> int:
        return len(self._entries)

    def protect(self, name: Hashable, snapshot: Snapshot) -> None:
        """``snapshot`` takes the place of what ``name`` protected before. The oldest go where that
        is too much, and where it alone is, it is not protected."""
        entry = self._entry(snapshot)
        self._prefixes.pin(snapshot, 1)
        self.end(name)
        self._entries[name] = entry
        self._add(entry, 1)
        self._prefixes.counters.protections_begun += 1
        self._cut_tails()
        while self._is_too_much():
            self._prefixes.counters.protections_over_budget += 1
            self._drop(next(iter(self._entries)))

    def refresh(self, name: Hashable) -> None:
        """It was used again."""
        entry = self._entries.get(name)
        if entry is not None and entry.snapshot.alive:
            self.protect(name, entry.snapshot)

    def end(self, name: Hashable) -> None:
        """Nobody will come back for it, if it is known."""
        if name in self._entries:
            self._prefixes.counters.protections_ended += 1
            self._drop(name)

    def expire(self) -> None:
        """End what has become too old."""
        latest_s = self._now_s() - self._limits.ttl_s
        while self._entries:
            name, entry = next(iter(self._entries.items()))
            if entry.since_s > latest_s:
                return
            self._prefixes.counters.protections_expired += 1
            self._drop(name)

    def _cut_tails(self) -> None:
        """Where tail pages are what is short, the oldest keep the state before theirs alone: that
        costs the next turn less than a grid interval."""
        for name, entry in list(self._entries.items()):
            if self._tails <= self._limits.share * self._prefixes.pools.tail_pages.total:
                return
            if isinstance(entry.snapshot, Tail) and entry.snapshot.point.state is not None:
                point = replace(self._entry(entry.snapshot.point), since_s=entry.since_s)
                self._prefixes.pin(point.snapshot, 1)
                self._prefixes.pin(entry.snapshot, -1)
                self._add(entry, -1)
                self._add(point, 1)
                self._entries[name] = point

    def _entry(self, snapshot: Snapshot) -> _Entry:
        is_tail = isinstance(snapshot, Tail)
        point = snapshot.point if isinstance(snapshot, Tail) else snapshot
        kv_pages = point.position // self._prefixes.grid * self._prefixes.pages_per_unit
        return _Entry(
            snapshot,
            self._now_s(),
            states=int(point.state is not None),
            tails=int(is_tail),
            kv_pages=kv_pages + (len(snapshot.kv_pages) if isinstance(snapshot, Tail) else 0),
        )

    def _drop(self, name: Hashable) -> None:
        entry = self._entries.pop(name)
        self._add(entry, -1)
        self._prefixes.pin(entry.snapshot, -1)

    def _add(self, entry: _Entry, by: int) -> None:
        self._states += by * entry.states
        self._tails += by * entry.tails
        self._kv_pages += by * entry.kv_pages

    def _is_too_much(self) -> bool:
        pools, share = self._prefixes.pools, self._limits.share
        return (
            len(self._entries) > self._limits.most
            or self._states > share * pools.state_slots.total
            or self._tails > share * pools.tail_pages.total
            or self._kv_pages > share * pools.kv_pages.total
        )
