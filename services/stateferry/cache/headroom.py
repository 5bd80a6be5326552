"""How much memory nobody could be kept waiting for."""

from __future__ import annotations

from collections.abc import Sized

from stateferry.cache.hybrid_cache import HybridCache
from stateferry.cache.sizing import SLOTS_PER_SEQUENCE, TAIL_PAGES_PER_SEQUENCE


class Headroom:
    """Of a cache that shares its pools with at most ``sequences``, of which those in ``held`` have
    theirs. What a snapshot costs is taken from it: it never keeps a sequence waiting, nor takes the
    place of a protected one."""

    def __init__(self, prefixes: HybridCache, sequences: int, held: Sized) -> None:
        self._prefixes = prefixes
        self._sequences = sequences
        self._held = held

    @property
    def seats(self) -> int:
        """Sequences that may still come."""
        return self._sequences - len(self._held)

    @property
    def slots(self) -> int:
        """State slots beyond those that they will take."""
        return max(self._prefixes.unprotected_slots - SLOTS_PER_SEQUENCE * self.seats, 0)

    @property
    def free_slots(self) -> int:
        """Those among them that hold nothing."""
        free = self._prefixes.pools.state_slots.num_free
        return max(free - SLOTS_PER_SEQUENCE * self.seats, 0)

    @property
    def tails(self) -> int:
        """Likewise tail pages."""
        return max(self._prefixes.unprotected_tails - TAIL_PAGES_PER_SEQUENCE * self.seats, 0)
