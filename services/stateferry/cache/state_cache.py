"""Leases by request, over pools that are shared with what is cached.

A sequence gets all its memory at admission, so that a running one can never lack any. A prompt
resumes from what is cached of it; what it computed is left to the cache when it ends, and as it
goes where that costs a slot that can be had::

    resume -> (steps) -> publish -> (steps, track) -> release
    reserve -> (state arrives from elsewhere, steps) -> release
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from stateferry.cache.cached_prefixes import CachePools
from stateferry.cache.hybrid_cache import Hold, HybridCache, PageCopy
from stateferry.cache.insertion import Computed, Inserted
from stateferry.cache.lease import SequenceLease
from stateferry.cache.lookup import Match
from stateferry.cache.pools import SequencePools
from stateferry.cache.reuse import NO_REUSE, Reuse
from stateferry.cache.sizing import SLOTS_PER_SEQUENCE, TAIL_PAGES_PER_SEQUENCE
from stateferry.cache.slots import CACHE_OWNER, SlotPool
from stateferry.core.errors import InvariantViolation
from stateferry.core.request import GenerationRequest
from stateferry.core.worker import PoolCount, PoolSizes
from stateferry.prefix.prefix_hash import encode_tokens
from stateferry.prefix.snapshot_plan import plan_snapshots
from stateferry_kernels.layer_state import ZERO_SLOT


@dataclass(frozen=True, slots=True)
class Resumed:
    """How a prompt began: ``tokens`` needed no forward, ``kv_tokens`` had keys and values here,
    whether they were computed again or not."""

    tokens: int = 0
    kv_tokens: int = 0


@dataclass(slots=True)
class _Held:
    """What one request has. ``slots``, ``tails`` and ``pages`` are its own; the rest of what its
    lease names is the cache's, kept by ``hold``."""

    lease: SequenceLease
    slots: set[int]
    tails: set[int]
    pages: set[int]
    hold: Hold
    namespace: bytes = b""
    resumed: Resumed = Resumed()
    is_spoilt: bool = False


@dataclass(slots=True)
class StateCache:
    """Everything is called by one event loop, between steps. The page copies that are due are to be
    made before the next launch, whosever it is (``take_copies``)."""

    pools: SequencePools
    sizes: PoolSizes
    reuse: Reuse = NO_REUSE
    prefixes: HybridCache = field(init=False)
    _held: dict[str, _Held] = field(init=False, default_factory=dict)
    _copies: list[PageCopy] = field(init=False, default_factory=list)
    _launch: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Everything is free."""
        has_kv = self.pools.kv.num_pages > 0
        self.prefixes = HybridCache(
            CachePools(
                # Slot 0 is the zero state, and nobody's.
                SlotPool("state slot", self.sizes.state_slots - 1, first=1),
                SlotPool("tail page", self.sizes.tail_pages),
                SlotPool("KV page", self.pools.kv.num_pages),
            ),
            grid=self.pools.grid,
            page_tokens=self.pools.kv.page_tokens if has_kv else None,
            layout=self.reuse.layout,
            options=self.reuse.options,
        )

    # -- a sequence's life ----------------------------------------------------------------------

    def reserve(self, request_id: str, num_tokens: int) -> bool:
        """Lease memory for a sequence of at most ``num_tokens`` that comes from elsewhere; False,
        and nothing taken, when some pool has too little left."""
        nothing = Match(0)
        return self._lease(request_id, num_tokens, nothing, Hold(None, None, None))

    def resume(self, request: GenerationRequest, num_tokens: int) -> int | None:
        """Lease memory for a prompt that will hold at most ``num_tokens`` here, from the deepest
        place that is cached of it. Returns that place's position; None, and nothing taken, when
        some pool has too little left."""
        if self._num_seats_left == 0:
            return None
        key = encode_tokens(request.prompt_ids)
        namespace = self.reuse.namespace(request.cache_salt)
        # Every row's logits are wanted where the prompt is scored.
        looks = self.reuse.is_on and request.scores is None
        match = self.prefixes.match(namespace, key) if looks else Match(request.prompt_len)
        hold = self.prefixes.lock(match)
        if not self._lease(request.request_id, num_tokens, match, hold):
            self.prefixes.unlock(hold)
            return None
        if looks:
            self.prefixes.count_hit(match)
        held = self._held[request.request_id]
        held.namespace = namespace
        held.resumed = Resumed(match.position, match.kv_tokens)
        held.lease.final = match.final
        if self.reuse.is_on:
            held.lease.tokens = array("I", request.prompt_ids)
            self._plan_snapshots(held, request, match)
        return match.position

    def resumed(self, request_id: str) -> Resumed:
        """How the request's prompt began."""
        return self._of(request_id).resumed

    def lease(self, request_id: str) -> SequenceLease:
        """The sequence's lease. Raises InvariantViolation when it holds none."""
        return self._of(request_id).lease

    def publish(self, request_id: str) -> None:
        """Leave a computed prompt to the cache, while its sequence goes on."""
        held = self._of(request_id)
        if self._keeps(held):
            self._hand_in(request_id, held, goes_on=True, with_tail=True)
        held.lease.final = None

    def track(self, request_id: str) -> None:
        """After a decode step: leave the state to the cache if it is one to be kept."""
        held = self._of(request_id)
        position = held.lease.position
        if position % self.pools.grid:
            return
        if self._keeps(held) and self.reuse.tracking.keeps_boundary(position):
            self._hand_in(request_id, held, goes_on=True, with_tail=False)
        if held.lease.state_slot in held.slots:
            # The cached state that it began with is read no more.
            self.prefixes.release_snapshot(held.hold)

    def spoil(self, request_id: str) -> None:
        """Nothing that the request computed is to be trusted, and none of it kept."""
        self._of(request_id).is_spoilt = True

    def release(self, request_id: str) -> None:
        """Leave what the sequence computed to the cache and return the rest. No step that touches
        the lease may be in flight."""
        held = self._of(request_id)
        if self._keeps(held) and held.lease.position > held.resumed.tokens:
            ended = self.reuse.tracking.keeps_end() or held.lease.final is not None
            if ended:
                self._hand_in(request_id, held, goes_on=False, with_tail=True)
        del self._held[request_id]
        self.prefixes.unlock(held.hold)
        self.prefixes.free(state_slots=held.slots, tail_pages=held.tails, kv_pages=held.pages)

    def take_copies(self) -> tuple[PageCopy, ...]:
        """What is to be copied before the next launch; the caller sees to it."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    # -- reports --------------------------------------------------------------------------------

    @property
    def state_slots(self) -> PoolCount:
        """Free is what could be had: nobody's, or cached and not in use."""
        return PoolCount(self.prefixes.obtainable_slots, self.prefixes.pools.state_slots.total)

    @property
    def tail_pages(self) -> PoolCount:
        return PoolCount(self.prefixes.obtainable_tails, self.prefixes.pools.tail_pages.total)

    @property
    def kv_pages(self) -> PoolCount:
        return PoolCount(self.prefixes.obtainable_kv_pages, self.prefixes.pools.kv_pages.total)

    def check_conserved(self) -> None:
        """Raises InvariantViolation naming ids that are lost, doubled or leased to nobody."""
        self.prefixes.check_conservation()
        for pool in self.prefixes.pools:
            strays = {
                place: owner
                for place, owner in pool.owners().items()
                if owner != CACHE_OWNER and owner not in self._held
            }
            if strays:
                raise InvariantViolation(f"{pool.name}s without a lease: {strays}")

    # -- inside ---------------------------------------------------------------------------------

    def _of(self, request_id: str) -> _Held:
        try:
            return self._held[request_id]
        except KeyError:
            raise InvariantViolation(f"{request_id} holds no lease") from None

    def _keeps(self, held: _Held) -> bool:
        return held.lease.tokens is not None and not held.is_spoilt

    def _lease(self, request_id: str, num_tokens: int, match: Match, hold: Hold) -> bool:
        if request_id in self._held:
            raise InvariantViolation(f"{request_id} already holds a lease")
        num_pages = self.pools.kv.pages_for(num_tokens)
        if num_pages > self.pools.kv.num_pages:
            # Whoever waits for this would wait for ever: limits must have refused it.
            raise InvariantViolation(f"{request_id}: {num_tokens} tokens can never be held")
        if self._num_seats_left == 0:
            return False
        shared = match.kv_pages[: self.prefixes.shared_kv_pages(match)]
        grant = self.prefixes.allocate(
            request_id,
            state_slots=SLOTS_PER_SEQUENCE,
            tail_pages=TAIL_PAGES_PER_SEQUENCE,
            kv_pages=num_pages - len(shared),
        )
        if grant is None:
            return False
        [tail_page], [first, second] = grant.tail_pages, grant.state_slots
        self._copies += self.prefixes.copies(match, tail_page, grant.kv_pages)
        lease = SequenceLease(
            tail_page=tail_page,
            slots=(first, second),
            kv_pages=(*shared, *grant.kv_pages),
            position=match.position,
            state_slot=ZERO_SLOT if match.state is None else match.state.slot,
        )
        self._held[request_id] = _Held(
            lease, {first, second}, {tail_page}, set(grant.kv_pages), hold
        )
        return True

    @property
    def _num_seats_left(self) -> int:
        return self.sizes.sequences - len(self._held)

    @property
    def _spare_slots(self) -> int:
        """State slots that no sequence could be kept waiting for."""
        needed = SLOTS_PER_SEQUENCE * self._num_seats_left
        return max(self.prefixes.obtainable_slots - needed, 0)

    def _plan_snapshots(self, held: _Held, request: GenerationRequest, match: Match) -> None:
        """Slots for the states to keep on the way, as far as there are any."""
        plan = plan_snapshots(
            request.prompt_len,
            match.position,
            self.pools.grid,
            spare_slots=self._spare_slots,
            branch_position=match.branch_position,
            hints=request.snapshot_hints,
            interval=self.reuse.interval_for(request.prompt_len),
        )
        self.prefixes.count_plan(plan)
        slots = self._extra_slots(request.request_id, len(plan.optional))
        held.lease.snapshot_slots = dict(zip(plan.optional, slots, strict=True))
        held.slots.update(slots)

    def _extra_slots(self, request_id: str, count: int) -> tuple[int, ...]:
        grant = self.prefixes.allocate(request_id, state_slots=count)
        if grant is None:
            raise InvariantViolation(f"{count} slots were there to be had, and are not")
        return grant.state_slots

    def _hand_in(self, request_id: str, held: _Held, *, goes_on: bool, with_tail: bool) -> None:
        """Insert all of ``[0, position)``. A sequence that goes on reads the cache's places from
        then on, and writes to its own."""
        lease, grid = held.lease, self.pools.grid
        self._launch += 1
        states = dict(lease.snapshots)
        boundary = lease.position // grid * grid
        spare: int | None = None
        if lease.state_slot in held.slots and boundary not in states:
            if goes_on:
                # The extra buffer: taken before the state is given away.
                spare = self._take_if_there_is(request_id)
            if spare is not None or not goes_on:
                states[boundary] = lease.state_slot
            else:
                self.prefixes.counters.snapshots_skipped += 1
        new = self._computed(request_id, held, states, goes_on=goes_on, with_tail=with_tail)
        result = self.prefixes.insert(new, hold=held.hold if goes_on else None)
        self._settle(held, new, result)
        if goes_on:
            # The tail that was handed in is a copy, which the sequence does not read.
            self.prefixes.release_tail(held.hold)
            self._go_on(held, result, boundary, spare)

    def _take_if_there_is(self, request_id: str) -> int | None:
        if self._spare_slots < 1:
            return None
        [slot] = self._extra_slots(request_id, 1)
        self._held[request_id].slots.add(slot)
        return slot

    def _computed(
        self,
        request_id: str,
        held: _Held,
        states: Mapping[int, int],
        *,
        goes_on: bool,
        with_tail: bool,
    ) -> Computed:
        lease, cache = held.lease, self.prefixes
        assert lease.tokens is not None
        tokens = lease.tokens[: lease.position]
        rows = lease.position % self.pools.grid
        num_pages = self.pools.kv.pages_for(lease.position - rows)
        pages = lease.kv_pages[:num_pages]
        tail = None
        if rows and with_tail:
            tail_page, last_pages = lease.tail_page, lease.kv_pages[num_pages:]
            last_pages = last_pages[: self.pools.kv.pages_for(rows)]
            copied = self._copy_end(request_id, held, last_pages, rows) if goes_on else None
            if copied is not None:
                tail_page, last_pages = copied
            if copied is not None or not goes_on:
                tail = cache.tail_handle(tail_page, lease.position).written(self._launch)
                pages += last_pages
        return Computed(
            namespace=held.namespace,
            key=tokens.tobytes(),
            owner=request_id,
            kv_pages=pages,
            states=[
                cache.state_handle(slot, position).written(self._launch)
                for position, slot in sorted(states.items())
            ],
            tail=tail,
            final=lease.final,
        )

    def _copy_end(
        self, request_id: str, held: _Held, last_pages: tuple[int, ...], rows: int
    ) -> tuple[int, tuple[int, ...]] | None:
        """Copies of the tail and the last KV pages, which the sequence will go on writing to; None
        when there is no room for them."""
        grant = None
        if self.prefixes.obtainable_tails > TAIL_PAGES_PER_SEQUENCE * self._num_seats_left:
            grant = self.prefixes.allocate(request_id, tail_pages=1, kv_pages=len(last_pages))
        if grant is None:
            self.prefixes.counters.snapshots_skipped += 1
            return None
        [tail_page] = grant.tail_pages
        held.tails.add(tail_page)
        held.pages.update(grant.kv_pages)
        size = self.pools.kv.page_tokens
        self._copies.append(PageCopy("tail", held.lease.tail_page, tail_page, rows))
        for number, (source, target) in enumerate(zip(last_pages, grant.kv_pages, strict=True)):
            self._copies.append(PageCopy("kv", source, target, min(rows - number * size, size)))
        self.prefixes.counters.tail_copies += 1
        self.prefixes.counters.kv_copies += len(last_pages)
        return tail_page, grant.kv_pages

    def _settle(self, held: _Held, new: Computed, result: Inserted) -> None:
        """What was taken over is the cache's."""
        held.slots.difference_update(result.taken_slots)
        held.pages.difference_update(result.taken_kv_pages)
        if result.taken_tail and new.tail is not None:
            held.tails.discard(new.tail.page)

    def _go_on(self, held: _Held, result: Inserted, boundary: int, spare: int | None) -> None:
        """Point the lease at the cache's places, and give back what it has no use for."""
        lease = held.lease
        lease.state_slot = result.states.get(boundary, lease.state_slot)
        kept = [slot for slot in (*lease.slots, spare) if slot in held.slots]
        lease.slots = (kept[0], kept[1])
        lease.snapshot_slots, lease.snapshots = {}, {}
        idle = held.slots - set(lease.slots)
        held.slots -= idle
        idle_tails = held.tails - {lease.tail_page}
        held.tails -= idle_tails
        lease.kv_pages = (*result.kv_pages, *lease.kv_pages[len(result.kv_pages) :])
        idle_pages = held.pages - set(lease.kv_pages)
        held.pages -= idle_pages
        self.prefixes.free(state_slots=idle, tail_pages=idle_tails, kv_pages=idle_pages)
