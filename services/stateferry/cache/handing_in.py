"""How what a sequence has computed gets into the cache: in the end, or while it goes on."""

from __future__ import annotations

from collections.abc import Mapping

from stateferry.cache.handles import TailHandle
from stateferry.cache.headroom import Headroom
from stateferry.cache.held import Held
from stateferry.cache.hybrid_cache import HybridCache, PageCopy
from stateferry.cache.insertion import Computed, Inserted
from stateferry.cache.kv_pool import KvPool
from stateferry.cache.lease import SequenceLease
from stateferry.core.errors import InvariantViolation


class HandingIn:
    """Copies that are due go to ``copies``: they must be made before the next launch."""

    def __init__(
        self,
        prefixes: HybridCache,
        kv: KvPool,
        headroom: Headroom,
        copies: list[PageCopy],
    ) -> None:
        self._prefixes = prefixes
        self._kv = kv
        self._headroom = headroom
        self._copies = copies
        self._grid = prefixes.grid
        self._stamp = 0

    def leave(self, held: Held) -> None:
        """All of ``[0, position)``, as it lies: the sequence has ended, and takes no more steps."""
        lease = held.lease
        states = dict(lease.snapshots)
        if lease.state_slot in held.slots:
            states[self._boundary(lease)] = lease.state_slot
        whole, last = self._pages(lease)
        rows = lease.position % self._grid
        tail = self._prefixes.tail_handle(lease.tail_page, lease.position) if rows else None
        self._insert(held, states, (*whole, *last), tail, goes_on=False)

    def share(self, held: Held) -> None:
        """The same of a sequence that goes on: it reads the cache's places from then on and writes
        to its own. Its last state and its tail need another of the kind, and stay out of the cache
        where there is none."""
        lease = held.lease
        states = dict(lease.snapshots)
        spare = None
        if lease.state_slot in held.slots and self._boundary(lease) not in states:
            spare = self._spare_slot(held)
            if spare is not None:
                states[self._boundary(lease)] = lease.state_slot
        pages, last = self._pages(lease)
        tail = None
        if lease.position % self._grid:
            copied = self._copy_end(held, last)
            if copied is not None:
                tail, pages = copied[0], (*pages, *copied[1])
        result = self._insert(held, states, pages, tail, goes_on=True)
        # The tail is a copy, which the sequence does not read.
        self._prefixes.release_tail(held.hold)
        self._go_on(held, result, spare)

    def _insert(
        self,
        held: Held,
        states: Mapping[int, int],
        pages: tuple[int, ...],
        tail: TailHandle | None,
        *,
        goes_on: bool,
    ) -> Inserted:
        lease, cache = held.lease, self._prefixes
        if lease.tokens is None:
            raise InvariantViolation(f"{held.request_id} has computed nobody knows what")
        self._stamp += 1
        new = Computed(
            namespace=held.namespace,
            key=lease.tokens[: lease.position].tobytes(),
            owner=held.request_id,
            kv_pages=pages,
            states=[
                cache.state_handle(slot, position).written(self._stamp)
                for position, slot in sorted(states.items())
            ],
            tail=None if tail is None else tail.written(self._stamp),
            final=lease.final,
        )
        result = cache.insert(new, hold=held.hold if goes_on else None)
        held.settle(tail, result)
        return result

    def _boundary(self, lease: SequenceLease) -> int:
        return lease.position // self._grid * self._grid

    def _pages(self, lease: SequenceLease) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """KV pages of the whole grid intervals, and those of the tail."""
        whole = self._kv.pages_for(self._boundary(lease))
        return lease.kv_pages[:whole], lease.kv_pages[whole : self._kv.pages_for(lease.position)]

    def _spare_slot(self, held: Held) -> int | None:
        """The extra buffer: taken before the state is given away."""
        grant = None
        if self._headroom.slots:
            grant = self._prefixes.allocate(held.request_id, state_slots=1)
        if grant is None:
            self._prefixes.counters.snapshots_skipped += 1
            return None
        [slot] = grant.state_slots
        held.slots.add(slot)
        return slot

    def _copy_end(
        self, held: Held, last: tuple[int, ...]
    ) -> tuple[TailHandle, tuple[int, ...]] | None:
        """Copies of the tail and of its KV pages, which the sequence will go on writing to; None
        when there is no room for them."""
        lease, cache = held.lease, self._prefixes
        grant = None
        if self._headroom.tails:
            grant = cache.allocate(held.request_id, tail_pages=1, kv_pages=len(last))
        if grant is None:
            cache.counters.snapshots_skipped += 1
            return None
        [tail_page] = grant.tail_pages
        held.tails.add(tail_page)
        held.pages.update(grant.kv_pages)
        rows = lease.position % self._grid
        self._copies += cache.end_copies(rows, lease.tail_page, tail_page, last, grant.kv_pages)
        return cache.tail_handle(tail_page, lease.position), grant.kv_pages

    def _go_on(self, held: Held, result: Inserted, spare: int | None) -> None:
        """Point the lease at the cache's places, and give back what it has no use for."""
        lease = held.lease
        lease.state_slot = result.states.get(self._boundary(lease), lease.state_slot)
        own = [slot for slot in (*lease.slots, spare) if slot in held.slots]
        lease.slots = (own[0], own[1])
        lease.snapshot_slots, lease.snapshots = {}, {}
        lease.kv_pages = (*result.kv_pages, *lease.kv_pages[len(result.kv_pages) :])
        idle_slots = held.slots - set(lease.slots)
        idle_tails = held.tails - {lease.tail_page}
        idle_pages = held.pages - set(lease.kv_pages)
        held.slots -= idle_slots
        held.tails -= idle_tails
        held.pages -= idle_pages
        self._prefixes.free(state_slots=idle_slots, tail_pages=idle_tails, kv_pages=idle_pages)
