"""Leases by request: all or nothing, conserved."""

from __future__ import annotations

from stateferry.cache.lease import SequenceLease
from stateferry.cache.slots import SlotPool
from stateferry.cache.state_pool import StatePool
from stateferry.core.errors import InvariantViolation
from stateferry.core.worker import PoolCount

SLOTS_PER_SEQUENCE = 2
PAGES_PER_SEQUENCE = 1


def num_slots(max_sequences: int) -> int:
    """State slots that a pool needs for this many sequences, ZERO_SLOT included."""
    return 1 + max_sequences * SLOTS_PER_SEQUENCE


def num_pages(max_sequences: int) -> int:
    """Tail pages that a pool needs for this many sequences."""
    return max_sequences * PAGES_PER_SEQUENCE


class StateCache:
    """Gives each sequence its slots at admission, so that a running one can never lack them."""

    def __init__(self, pool: StatePool, max_sequences: int) -> None:
        self.pool = pool
        self._state_slots = SlotPool("state slot", max_sequences * SLOTS_PER_SEQUENCE, first=1)
        self._tail_pages = SlotPool("tail page", max_sequences * PAGES_PER_SEQUENCE)
        self._leases: dict[str, SequenceLease] = {}

    def reserve(self, request_id: str) -> bool:
        """Lease memory for a sequence; False, and nothing taken, when some pool is empty."""
        if request_id in self._leases:
            raise InvariantViolation(f"{request_id} already holds a lease")
        if self._state_slots.num_free < SLOTS_PER_SEQUENCE or not self._tail_pages.num_free:
            return False
        slots = (
            self._allocate(self._state_slots, request_id),
            self._allocate(self._state_slots, request_id),
        )
        page = self._allocate(self._tail_pages, request_id)
        self._leases[request_id] = SequenceLease(tail_page=page, slots=slots)
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
        for slot in lease.slots:
            self._state_slots.free(slot)
        self._tail_pages.free(lease.tail_page)

    @property
    def state_slots(self) -> PoolCount:
        return PoolCount(self._state_slots.num_free, self._state_slots.total)

    @property
    def tail_pages(self) -> PoolCount:
        return PoolCount(self._tail_pages.num_free, self._tail_pages.total)

    def check_conserved(self) -> None:
        """Raises InvariantViolation naming ids that are lost, doubled or leased to nobody."""
        for pool in (self._state_slots, self._tail_pages):
            pool.check_conserved()
            strays = {s: owner for s, owner in pool.owners().items() if owner not in self._leases}
            if strays:
                raise InvariantViolation(f"{pool.name}s without a lease: {strays}")

    @staticmethod
    def _allocate(pool: SlotPool, owner: str) -> int:
        slot = pool.allocate(owner)
        if slot is None:
            raise InvariantViolation(f"no {pool.name} left after it was counted")
        return slot
