"""Leases by request, over pools that are shared with what is cached.

A sequence gets all its memory at admission, so that a running one can never lack any. A prompt
resumes from what is cached of it; what it computed is left to the cache when it ends, and as it
goes where that costs a slot that can be had::

    resume -> (steps) -> publish -> (steps, consumed) -> release
    reserve -> (state arrives from elsewhere) -> adopt -> (steps, consumed) -> release

These are books only, and may be kept while launches run. It holds together because all that reads
or writes the pools runs in the order in which it was planned, one after the other: what is freed
is written again by launches alone that come after all that could still read it.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass, field

from stateferry.cache.cached_prefixes import CachePools
from stateferry.cache.entries import Origin
from stateferry.cache.handing_in import HandingIn
from stateferry.cache.headroom import Headroom
from stateferry.cache.held import Held
from stateferry.cache.host_tier import PlaceBytes
from stateferry.cache.hybrid_cache import Hold, HybridCache
from stateferry.cache.insertion import Inserted
from stateferry.cache.lease import SequenceLease
from stateferry.cache.lookup import Match
from stateferry.cache.page_copy import PageCopy
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


@dataclass(slots=True)
class StateCache:
    """Everything is called by one event loop. The page copies that are due are to be made before
    the next launch, whosever it is (``take_copies``)."""

    pools: SequencePools
    sizes: PoolSizes
    reuse: Reuse = NO_REUSE
    prefixes: HybridCache = field(init=False)
    _held: dict[str, Held] = field(init=False, default_factory=dict)
    _headroom: Headroom = field(init=False)
    _handing_in: HandingIn = field(init=False)
    _copies: list[PageCopy] = field(init=False, default_factory=list)

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
            copies=self._copies,
            sizes=self._place_bytes(),
        )
        self._headroom = Headroom(self.prefixes, self.sizes.sequences, self._held)
        self._handing_in = HandingIn(self.prefixes, self.pools.kv, self._headroom, self._copies)

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
        if not self._headroom.seats:
            return None
        key = encode_tokens(request.prompt_ids)
        namespace = self.reuse.namespace(request.cache_salt)
        # Every row's logits are wanted where the prompt is scored.
        looks = self.reuse.is_on and request.scores is None
        match = Match(request.prompt_len)
        if looks:
            match = self._restored_match(namespace, key, num_tokens)
        hold = self.prefixes.lock(match)
        if not self._lease(request.request_id, num_tokens, match, hold):
            self.prefixes.unlock(hold)
            if self._held:
                return None
            # Nobody is there to wait for: what it would resume from takes the room that it needs.
            match = Match(request.prompt_len)
            hold = self.prefixes.lock(match)
            if not self._lease(request.request_id, num_tokens, match, hold):
                return None
        if looks:
            self.prefixes.count_hit(match)
        held = self._held[request.request_id]
        held.namespace = namespace
        held.prompt_len = request.prompt_len
        held.resumed_tokens = match.position
        held.lease.final = match.final
        held.session = request.session
        # It is back, if it was preempted.
        self.forget(request.request_id)
        if self.reuse.is_on:
            held.lease.tokens = array("I", request.prompt_ids)
            self._plan_snapshots(held, request, match)
        return match.position

    def resumable_tokens(self, request: GenerationRequest) -> int:
        """How many tokens of a prompt ``resume`` would find now, for all of its sequence. Brings
        them back from host memory."""
        if not self.reuse.is_on:
            return 0
        namespace, key = self.reuse.namespace(request.cache_salt), encode_tokens(request.prompt_ids)
        return self._restored_match(namespace, key, request.total_tokens).position

    def match(self, namespace: bytes, key: bytes) -> Match:
        """What is cached of the prompt whose ``encode_tokens`` is ``key``."""
        return self.prefixes.match(namespace, key)

    def resumed_tokens(self, request_id: str) -> int:
        """How many tokens of the request's prompt needed no forward."""
        return self._of(request_id).resumed_tokens

    def lease(self, request_id: str) -> SequenceLease:
        """The sequence's lease. Raises InvariantViolation when it holds none."""
        return self._of(request_id).lease

    def adopt(self, request_id: str, prompt: GenerationRequest) -> None:
        """The state of a reserved sequence's prompt has come from elsewhere and is in place: leave
        it to the cache, and from now on what follows it as well."""
        if not self.reuse.is_on:
            return
        held = self._of(request_id)
        if held.lease.position != prompt.prompt_len:
            raise InvariantViolation(f"{prompt.prompt_len} tokens made {held.lease.position}")
        held.namespace = self.reuse.namespace(prompt.cache_salt)
        held.prompt_len = prompt.prompt_len
        held.session = prompt.session
        held.lease.tokens = array("I", prompt.prompt_ids)
        self.publish(request_id)

    def publish(self, request_id: str) -> None:
        """Leave a computed prompt to the cache, while its sequence goes on."""
        held = self._of(request_id)
        if held.is_kept:
            self._handing_in.share(held, Origin.PROMPT)
        held.lease.final = None

    def consumed(self, request_id: str, token_id: int) -> None:
        """A decode step has consumed the sequence's next token: leave the state to the cache if it
        is one to be kept."""
        held = self._of(request_id)
        if held.lease.tokens is None:
            return
        held.lease.tokens.append(token_id)
        position = held.num_known
        if position % self.pools.grid:
            return
        if held.is_kept and self.reuse.tracking.keeps_boundary(position):
            self._handing_in.share(held, Origin.TRACKED)
        if held.lease.state_slot in held.slots:
            # The cached state that it began with is read no more.
            self.prefixes.release_snapshot(held.hold)

    def spoil(self, request_id: str) -> None:
        """Nothing that the request computed is to be trusted, and none of it kept."""
        self._of(request_id).is_spoilt = True

    def release(self, request_id: str) -> None:
        """Leave what the sequence computed to the cache and return the rest. No step that touches
        the lease may be in flight."""
        # What decode leaves is a matter of the strategy; prompts are always left.
        is_prompt = self._of(request_id).lease.final is not None
        self._give_back(request_id, leaves_end=self.reuse.tracking.keeps_end() or is_prompt)

    def park(self, request_id: str) -> None:
        """Release a sequence that will come back: its end is left whatever the strategy is, and
        protected until ``resume`` or ``forget``."""
        left = self._give_back(request_id, leaves_end=True)
        if left is not None and left.snapshots:
            self.prefixes.protection.protect(request_id, left.snapshots[-1])

    def forget(self, request_id: str) -> None:
        """A parked sequence needs what it left no longer."""
        self.prefixes.protection.end(request_id)

    def fits_without(self, num_tokens: int, request_ids: Collection[str]) -> bool:
        """Whether a sequence of at most ``num_tokens`` would have room once these had given theirs
        back. What they share may come free with them and is counted as little as can be."""
        leaving = [self._of(request_id) for request_id in request_ids]
        prefixes, num_pages = self.prefixes, self.pools.kv.pages_for(num_tokens)
        kept = sum(
            len(held.lease.kv_pages) + len(held.hold.tail.kv_pages if held.hold.tail else ())
            for held in self._held.values()
            if held.request_id not in request_ids
        )
        own = sum(len(held.pages) for held in leaving)
        kv_pages = max(prefixes.obtainable_kv_pages + own, prefixes.pools.kv_pages.total - kept)
        slots = prefixes.obtainable_slots + sum(len(held.slots) for held in leaving)
        tails = prefixes.obtainable_tails + sum(len(held.tails) for held in leaving)
        return (
            self._headroom.seats + len(leaving) > 0
            and slots >= SLOTS_PER_SEQUENCE
            and tails >= TAIL_PAGES_PER_SEQUENCE
            and kv_pages >= num_pages
        )

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

    def _give_back(self, request_id: str, *, leaves_end: bool) -> Inserted | None:
        held = self._of(request_id)
        held.lease.rewind(held.num_known, self.pools.grid)
        left = None
        if leaves_end and held.is_kept and held.num_known > held.resumed_tokens:
            left = self._handing_in.leave(held)
        elif held.protects is not None:
            self.prefixes.protection.refresh(held.protects)
        del self._held[request_id]
        self.prefixes.unlock(held.hold)
        self.prefixes.free(state_slots=held.slots, tail_pages=held.tails, kv_pages=held.pages)
        return left

    def _of(self, request_id: str) -> Held:
        try:
            return self._held[request_id]
        except KeyError:
            raise InvariantViolation(f"{request_id} holds no lease") from None

    def _lease(self, request_id: str, num_tokens: int, match: Match, hold: Hold) -> bool:
        if request_id in self._held:
            raise InvariantViolation(f"{request_id} already holds a lease")
        num_pages = self.pools.kv.pages_for(num_tokens)
        if num_pages > self.pools.kv.num_pages:
            # Whoever waits for this would wait for ever: limits must have refused it.
            raise InvariantViolation(f"{request_id}: {num_tokens} tokens can never be held")
        if not self._headroom.seats:
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
        self._held[request_id] = Held(
            request_id, lease, {first, second}, {tail_page}, set(grant.kv_pages), hold
        )
        return True

    def _restored_match(self, namespace: bytes, key: bytes, num_tokens: int) -> Match:
        if self._has_room_to_restore(num_tokens):
            self.prefixes.restore(namespace, key)
        return self.match(namespace, key)

    def _has_room_to_restore(self, num_tokens: int) -> bool:
        """Whether a sequence of ``num_tokens`` fits beside a state and a tail that it reads."""
        num_pages = self.pools.kv.pages_for(num_tokens) + self.pools.kv.pages_for(self.pools.grid)
        return (
            self.prefixes.obtainable_slots > SLOTS_PER_SEQUENCE
            and self.prefixes.obtainable_tails > TAIL_PAGES_PER_SEQUENCE
            and self.prefixes.obtainable_kv_pages >= num_pages
        )

    def _place_bytes(self) -> PlaceBytes:
        sizes = self.sizes
        return PlaceBytes(
            state=sizes.state_slot_bytes,
            tail_row=sizes.tail_page_bytes // self.pools.grid,
            kv_row=sizes.kv_page_bytes // sizes.kv_page_tokens,
        )

    def _plan_snapshots(self, held: Held, request: GenerationRequest, match: Match) -> None:
        """Slots for the states to keep on the way, as far as there are any."""
        keeps_some = self.reuse.max_snapshots > 0
        plan = plan_snapshots(
            request.prompt_len,
            match.position,
            self.pools.grid,
            spare_slots=self._headroom.slots,
            branch_position=match.branch_position if keeps_some else None,
            hints=request.snapshot_hints if keeps_some else (),
            interval=self.reuse.spread(self.reuse.interval, request.prompt_len),
            free_slots=self._headroom.free_slots,
            free_interval=self.reuse.spread(self.reuse.free_interval, request.prompt_len),
        )
        self.prefixes.count_plan(plan)
        grant = self.prefixes.allocate(request.request_id, state_slots=len(plan.optional))
        if grant is None:
            raise InvariantViolation(f"{len(plan.optional)} slots were to be had, and are not")
        held.lease.snapshot_slots = dict(zip(plan.optional, grant.state_slots, strict=True))
        held.origins = dict.fromkeys(plan.optional, Origin.INTERVAL)
        for hint in request.snapshot_hints:
            position = hint // self.pools.grid * self.pools.grid
            if position in held.origins:
                held.origins[position] = Origin.HINT
        if match.branch_position in held.origins:
            held.origins[match.branch_position] = Origin.BRANCH
        held.slots.update(grant.state_slots)
