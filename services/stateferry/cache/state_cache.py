"""Leases by request: all or nothing, conserved."""

from __future__ import annotations

from stateferry.cache.lease import SequenceLease
from stateferry.cache.pools import SequencePools
from stateferry.cache.sizing import SLOTS_PER_SEQUENCE, TAIL_PAGES_PER_SEQUENCE
from stateferry.cache.slots import SlotPool
from stateferry.core.errors import InvariantViolation
from stateferry.core.worker import PoolCount


class StateCache:
    """Gives each sequence all its memory at admission, so that a running one can never lack any."""

    def __init__(self, pools: SequencePools, max_sequences: int) -> None:
        self.pools = pools
        self._state_slots = SlotPool("state slot", max_sequences * SLOTS_PER_SEQUENCE, first=1)
        self._tail_pages = SlotPool("tail page", max_sequences * TAIL_PAGES_PER_SEQUENCE)
        self._kv_pages = SlotPool("KV page", pools.kv.num_pages)
        self._leases: dict[str, SequenceLease] = {}

    def reserve(self, request_id: str, num_tokens: int) -> bool:
        """Lease memory for a sequence that will hold at most ``num_tokens``; False, and nothing
        taken, when some pool has too little left."""
        if request_id in self._leases:
            raise InvariantViolation(f"{request_id} already holds a lease")
        num_kv_pages = self.pools.kv.pages_for(num_tokens)
        if num_kv_pages > self._kv_pages.total:
            # Whoever waits for this would wait for ever: limits must have refused it.
            raise InvariantViolation(f"{request_id}: {num_tokens} tokens can never be held")
        slots = self._state_slots.allocate(SLOTS_PER_SEQUENCE, request_id)
        tail = self._tail_pages.allocate(TAIL_PAGES_PER_SEQUENCE, request_id)
        pages = self._kv_pages.allocate(num_kv_pages, request_id)
        if slots is None or tail is None or pages is None:
            self._give_back(slots or (), tail or (), pages or ())
            return False
        self._leases[request_id] = SequenceLease(
            tail_page=tail[0], slots=(slots[0], slots[1]), kv_pages=pages
        )
        return True

    def lease(self, request_id: str) -> SequenceLease:
        """The sequence's lease. Raises InvariantViolation when it holds none."""
        try:
            return self._leases[request_id]
        except KeyError:
            raise InvariantViolation(f"{request_id} holds no lease") from None

    def release(self, request_id: str) -> None:
        """Return everything. No step that touches the lease may be in flight."""
        lease = self.lease(request_id)
        del self._leases[request_id]
        self._give_back(lease.slots, (lease.tail_page,), lease.kv_pages)

    @property
    def state_slots(self) -> PoolCount:
        return self._state_slots.count

    @property
    def tail_pages(self) -> PoolCount:
        return self._tail_pages.count

    @property
    def kv_pages(self) -> PoolCount:
        return self._kv_pages.count

    def check_conserved(self) -> None:
        """Raises InvariantViolation naming ids that are lost, doubled or leased to nobody."""
        for pool in (self._state_slots, self._tail_pages, self._kv_pages):
            pool.check_conserved()
            strays = {s: owner for s, owner in pool.owners().items() if owner not in self._leases}
            if strays:
                raise InvariantViolation(f"{pool.name}s without a lease: {strays}")

    def _give_back(
        self, slots: tuple[int, ...], tail: tuple[int, ...], pages: tuple[int, ...]
    ) -> None:
        self._state_slots.free(slots)
        self._tail_pages.free(tail)
        self._kv_pages.free(pages)
