"""How what a sequence has computed gets into the cache: in the end, or while it goes on."""

from __future__ import annotations

from collections.abc import Mapping

from stateferry.cache.entries import Origin
from stateferry.cache.handles import TailHandle
from stateferry.cache.headroom import Headroom
from stateferry.cache.held import Held
from stateferry.cache.hybrid_cache import HybridCache
from stateferry.cache.insertion import Computed, Inserted
from stateferry.cache.kv_pool import KvPool
from stateferry.cache.page_copy import PageCopy
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

    def leave(self, held: Held) -> Inserted:
        """All that it consumed, as it lies: the sequence has ended, and takes no more steps."""
        lease, position = held.lease, held.num_known
        states = dict(lease.snapshots)
        if lease.state_slot in held.slots:
            states[self._boundary(held)] = lease.state_slot
        whole, last = self._pages(held)
        rows = position % self._grid
        tail = self._prefixes.tail_handle(lease.tail_page, position) if rows else None
        origin = Origin.TURN if position > held.prompt_len else Origin.PROMPT
        return self._insert(held, states, (*whole, *last), tail, origin, goes_on=False)

    def share(self, held: Held, origin: Origin) -> None:
        """The same of a sequence that goes on: it reads the cache's places from then on and writes
        to its own. Its last state and its tail need another of the kind, and stay out of the cache
        where there is none.

        A step of the sequence that is in flight may be past ``num_known``, but not past the next
        grid point. What is freed here it may still read: that is written by later launches only."""
        lease = held.lease
        states = dict(lease.snapshots)
        spare = None
        if lease.state_slot in held.slots and self._boundary(held) not in states:
            spare = self._spare_slot(held)
            if spare is not None:
                states[self._boundary(held)] = lease.state_slot
        pages, last = self._pages(held)
        tail = None
        if held.num_known % self._grid:
            copied = self._copy_end(held, last)
            if copied is not None:
                tail, pages = copied[0], (*pages, *copied[1])
        result = self._insert(held, states, pages, tail, origin, goes_on=True)
        # The tail is a copy, which the sequence does not read.
        self._prefixes.release_tail(held.hold)
        self._go_on(held, result, spare)

    def _insert(
        self,
        held: Held,
        states: Mapping[int, int],
        pages: tuple[int, ...],
        tail: TailHandle | None,
        origin: Origin,
        *,
        goes_on: bool,
    ) -> Inserted:
        lease, cache = held.lease, self._prefixes
        if lease.tokens is None:
            raise InvariantViolation(f"{held.request_id} has computed nobody knows what")
        self._stamp += 1
        new = Computed(
            namespace=held.namespace,
            key=lease.tokens[: held.num_known].tobytes(),
            owner=held.request_id,
            kv_pages=pages,
            states=[
                cache.state_handle(slot, position).written(self._stamp)
                for position, slot in sorted(states.items())
            ],
            tail=None if tail is None else tail.written(self._stamp),
            final=lease.final,
            origin=origin,
            origins=held.origins,
        )
        hold = held.hold if goes_on else None
        result = cache.insert(new, hold=hold, session=held.protects)
        held.settle(tail, result)
        return result

    def _boundary(self, held: Held) -> int:
        return held.num_known // self._grid * self._grid

    def _pages(self, held: Held) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """KV pages of the whole grid intervals, and those of the tail."""
        pages, whole = held.lease.kv_pages, self._kv.pages_for(self._boundary(held))
        return pages[:whole], pages[whole : self._kv.pages_for(held.num_known)]

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
        position = held.num_known
        rows = position % self._grid
        self._copies += cache.end_copies(rows, lease.tail_page, tail_page, last, grant.kv_pages)
        return cache.tail_handle(tail_page, position), grant.kv_pages

    def _go_on(self, held: Held, result: Inserted, spare: int | None) -> None:
        """Point the lease at the cache's places, and give back what it has no use for."""
        lease = held.lease
        lease.state_slot = result.states.get(self._boundary(held), lease.state_slot)
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
