"""Prefixes that can be resumed: ``match -> lock -> insert -> unlock -> evict``.

One event loop calls everything here; nothing blocks and nothing touches a tensor. What has to be
copied is left in a list, or returned as one, for whoever owns the stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from stateferry.cache.cache_checks import check_cache
from stateferry.cache.cache_counters import CacheCounters
from stateferry.cache.cached_prefixes import CachedPrefixes, CachePools
from stateferry.cache.entries import CacheNode, Pages, Point, Tail
from stateferry.cache.eviction import EvictionPolicy, LruPolicy, ValuePolicy
from stateferry.cache.handles import StateHandle, TailHandle
from stateferry.cache.host_tier import HostOffload, HostStore, PlaceBytes
from stateferry.cache.insertion import Computed, Inserted, insert
from stateferry.cache.lookup import Match, look_up
from stateferry.cache.page_copy import PageCopy
from stateferry.cache.protection import PROTECTED_TICKS, Protection, ProtectionLimits
from stateferry.cache.restore import restore
from stateferry.cache.slots import Occupancy
from stateferry.core.clock import Clock, SystemClock
from stateferry.core.errors import InvariantViolation
from stateferry.prefix.snapshot_plan import SnapshotPlan

_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"value": ValuePolicy, "lru": LruPolicy}


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """``eviction`` is "value" or "lru". ``max_states_per_path`` bounds the states from the root to
    any leaf, 0 does not. The last snapshot of a session, one of ``max_sessions``, goes
    ``session_pin_ticks`` lookups and inserts later than it would, by default after all others: of
    ``session_share`` of each pool, and for ``session_ttl_s`` after the turn. What is evicted lives
    on in ``host_bytes`` of host memory."""

    eviction: str = "value"
    max_states_per_path: int = 0
    max_sessions: int = 4096
    session_pin_ticks: int = PROTECTED_TICKS
    session_share: float = 0.5
    session_ttl_s: float = math.inf
    host_bytes: int = 0


@dataclass(slots=True)
class Hold:
    """What a running sequence keeps from being evicted: all keys and values of its prefix, and the
    one snapshot that it reads."""

    node: CacheNode | None
    point: Point | None
    tail: Tail | None
    is_open: bool = True


@dataclass(frozen=True, slots=True)
class Grant:
    """Ids that belong to whoever asked."""

    state_slots: tuple[int, ...]
    tail_pages: tuple[int, ...]
    kv_pages: tuple[int, ...]


class HybridCache:
    """Over pools that running sequences are leased from as well. ``page_tokens`` is how much of a
    sequence one KV page holds, None for a model without attention. What moves to host memory and
    back is asked for in ``copies``, behind what is there; ``sizes`` say what it takes there."""

    def __init__(
        self,
        pools: CachePools,
        *,
        grid: int,
        page_tokens: int | None,
        layout: str,
        options: CacheOptions | None = None,
        copies: list[PageCopy] | None = None,
        sizes: PlaceBytes | None = None,
        clock: Clock | None = None,
    ) -> None:
        options = options or CacheOptions()
        copies = [] if copies is None else copies
        self.pools = pools
        self.grid = grid
        self.layout = layout
        self.counters = CacheCounters()
        self.host: HostStore | None = None
        offload = None
        if options.host_bytes and sizes is not None:
            self.host = HostStore(options.host_bytes, self.counters)
            offload = HostOffload(self.host, copies, sizes, page_tokens, self.counters)
        self._copies = copies
        self._page_tokens = page_tokens
        self._options = options
        self._prefixes = CachedPrefixes(
            pools,
            grid=grid,
            pages_per_unit=grid // page_tokens if page_tokens else 0,
            layout=layout,
            new_policy=_POLICIES[options.eviction],
            pin_ticks=options.session_pin_ticks,
            counters=self.counters,
            offload=offload,
        )
        limits = ProtectionLimits(
            options.session_share, options.session_ttl_s, options.max_sessions
        )
        clock = clock or SystemClock()
        self.protection = Protection(self._prefixes, limits, clock.monotonic_s)

    # -- handles --------------------------------------------------------------------------------

    def state_handle(self, slot: int, position: int) -> StateHandle:
        """What will be written to an allocated slot; ``written`` once it is."""
        return StateHandle(slot, self.pools.state_slots.generation(slot), position, self.layout)

    def tail_handle(self, page: int, position: int) -> TailHandle:
        """The rows of a sequence's tail page at ``position`` tokens, off the grid."""
        begin = position // self.grid * self.grid
        generation = self.pools.tail_pages.generation(page)
        return TailHandle(page, generation, begin, position - begin, self.layout)

    # -- memory ---------------------------------------------------------------------------------

    @property
    def obtainable_slots(self) -> int:
        """State slots that are free or could be evicted now."""
        return self._prefixes.obtainable_slots

    @property
    def obtainable_tails(self) -> int:
        """Likewise tail pages."""
        return self._prefixes.obtainable_tails

    @property
    def obtainable_kv_pages(self) -> int:
        """Likewise KV pages."""
        return self._prefixes.obtainable_kv_pages

    @property
    def unprotected_slots(self) -> int:
        """As ``obtainable_slots``, for what is not needed: what is protected stays."""
        return self._prefixes.obtainable_slots - self._prefixes.pinned_states

    @property
    def unprotected_tails(self) -> int:
        """Likewise tail pages."""
        return self._prefixes.obtainable_tails - self._prefixes.pinned_tails

    def allocate(
        self, owner: str, *, state_slots: int = 0, tail_pages: int = 0, kv_pages: int = 0
    ) -> Grant | None:
        """Ids for ``owner``, evicting what it takes; None, and nothing taken or evicted, when that
        is not enough."""
        self.protection.expire()
        if not self._prefixes.make_room(state_slots, tail_pages, kv_pages):
            return None
        slots = self.pools.state_slots.allocate(state_slots, owner)
        tails = self.pools.tail_pages.allocate(tail_pages, owner)
        pages = self.pools.kv_pages.allocate(kv_pages, owner)
        if slots is None or tails is None or pages is None:
            raise InvariantViolation("room was made, and is not there")
        return Grant(slots, tails, pages)

    def free(
        self,
        *,
        state_slots: Iterable[int] = (),
        tail_pages: Iterable[int] = (),
        kv_pages: Iterable[int] = (),
    ) -> None:
        """Take back ids that somebody other than the cache owns."""
        for pool, ids in zip(self.pools, (state_slots, tail_pages, kv_pages), strict=True):
            pool.free(ids)

    def restore(self, namespace: bytes, key: bytes) -> int:
        """Bring back from host memory what lets a prompt resume deeper; to be called before
        ``match``. Returns how many tokens deeper."""
        if self.host is None:
            return 0
        return restore(self._prefixes, self.host, self._copies, namespace, key)

    # -- match, lock, unlock --------------------------------------------------------------------

    def match(self, namespace: bytes, key: bytes) -> Match:
        """What is cached of the prompt whose ``encode_tokens`` is ``key``. Changes nothing: lock
        it before anything else is called."""
        return look_up(self._prefixes, namespace, key)

    def lock(self, match: Match) -> Hold:
        """Keep what was matched. Raises InvariantViolation for a match that the
        cache has changed under."""
        prefixes, point, tail = self._prefixes, match.point, match.tail
        if point is not None and not (point.alive and (tail is None or tail.alive)):
            raise InvariantViolation("what was matched is gone: match again before locking")
        prefixes.tick += 1
        if point is None:
            return Hold(None, None, None)
        node = self._node_of(point)
        prefixes.touch(tail or point)
        if tail is not None:
            prefixes.lock_snapshot(tail)
        prefixes.lock_snapshot(point)
        prefixes.lock_path(node)
        return Hold(node, point, tail)

    def copies(self, match: Match, tail_page: int, kv_pages: Pages) -> tuple[PageCopy, ...]:
        """What a sequence must copy before it goes on from ``match``, because it will write where
        the tail ends: into its own ``tail_page`` and, with attention, its own first KV pages after
        the shared ones. Nothing at a grid point."""
        if not match.tail_rows or match.tail_page is None:
            return ()
        last = match.kv_pages[self.shared_kv_pages(match) :]
        return self.end_copies(match.tail_rows, match.tail_page, tail_page, last, kv_pages)

    def end_copies(
        self, rows: int, tail_page: int, to_tail_page: int, kv_pages: Pages, to_kv_pages: Pages
    ) -> tuple[PageCopy, ...]:
        """Of the first ``rows`` of a tail, and of their keys and values in ``kv_pages``; of
        ``to_kv_pages`` as many as it takes."""
        made = [PageCopy("tail", tail_page, to_tail_page, rows)]
        for number, (source, target) in enumerate(zip(kv_pages, to_kv_pages, strict=False)):
            assert self._page_tokens is not None
            left = rows - number * self._page_tokens
            made.append(PageCopy("kv", source, target, min(left, self._page_tokens)))
        self.counters.tail_copies += 1
        self.counters.kv_copies += len(made) - 1
        return tuple(made)

    def shared_kv_pages(self, match: Match) -> int:
        """How many of a match's first KV pages a sequence reads in place: all but its tail's."""
        begin = match.position - match.tail_rows
        return begin // self._page_tokens if self._page_tokens else 0

    def release_tail(self, hold: Hold) -> None:
        """The tail's rows have been copied: it may go."""
        if hold.tail is not None:
            self._prefixes.unlock_snapshot(hold.tail)
            hold.tail = None

    def release_snapshot(self, hold: Hold) -> None:
        """The sequence has passed a grid point of its own and reads the state no more; its keys
        and values it still does."""
        self.release_tail(hold)
        if hold.point is not None:
            self._prefixes.unlock_snapshot(hold.point)
            hold.point = None

    def unlock(self, hold: Hold) -> None:
        """Let go of everything. No step that reads it may be in flight."""
        if not hold.is_open:
            raise InvariantViolation("a hold was let go twice")
        hold.is_open = False
        self.release_snapshot(hold)
        if hold.node is not None:
            self._prefixes.unlock_path(hold.node)

    # -- insert ---------------------------------------------------------------------------------

    def insert(
        self, new: Computed, *, hold: Hold | None = None, session: Hashable | None = None
    ) -> Inserted:
        """Take over what ``new`` has and the cache has not; see ``Computed`` and ``Inserted``.

        ``hold`` is for a sequence that goes on, or is still to be sent: it is moved to the end of
        ``new``, to its deepest state if it has any, and to its tail if that was taken over.
        ``session`` names whose last snapshot this is.
        """
        prefixes = self._prefixes
        prefixes.tick += 1
        result = insert(prefixes, new)
        points = [s for s in result.snapshots if isinstance(s, Point)]
        if hold is not None:
            tail = result.snapshots[-1] if result.taken_tail else None
            assert tail is None or isinstance(tail, Tail)
            self._move(hold, result.node, points[-1] if points else None, tail)
        if session is not None and result.snapshots:
            self.protection.protect(session, result.snapshots[-1])
        if points and self._options.max_states_per_path:
            self._cap_path(points[-1])
        return result

    def clear(self) -> None:
        """Evict whatever is not locked."""
        prefixes = self._prefixes
        prefixes.make_room(
            prefixes.obtainable_slots, prefixes.obtainable_tails, prefixes.obtainable_kv_pages
        )

    # -- reports --------------------------------------------------------------------------------

    def count_plan(self, plan: SnapshotPlan) -> None:
        """Note what was planned for a prompt that is now being computed."""
        self.counters.snapshots_planned += len(plan.boundaries) + (plan.tail_rows > 0)
        self.counters.snapshots_skipped += plan.num_skipped

    def occupancy(self) -> dict[str, Occupancy]:
        """Ids by kind of owner, by pool."""
        return {pool.name: pool.occupancy for pool in self.pools}

    def check_conservation(self) -> None:
        """Raises InvariantViolation naming ids that are lost, doubled or leaked, and whatever else
        in the tree is not as it must be. O(everything): for tests and idle moments."""
        check_cache(self._prefixes)

    def count_hit(self, match: Match) -> None:
        """Once for every prompt that goes on from its match."""
        used, c = match.tail or match.point, self.counters
        if used is not None:
            # Not when locking: a request that waits for memory locks again and again.
            self._prefixes.count_use(used)
        c.lookups += 1
        c.prompt_tokens += match.num_tokens
        c.boundary_hit_tokens += match.position - match.tail_rows
        c.tail_hit_tokens += match.tail_rows
        c.repeated_prompts += match.position == match.num_tokens
        c.kv_only_tokens += max(match.kv_tokens - match.position, 0)

    def _node_of(self, point: Point) -> CacheNode:
        """The node that ends at a point, cut off if there is none."""
        unit, node = point.position // self.grid, point.node
        if unit < node.end:
            node = self._prefixes.tree.split(node, unit)
            for moved in node.points.values():
                moved.node = node
        return node

    def _move(
        self, hold: Hold, node: CacheNode | None, point: Point | None, tail: Tail | None
    ) -> None:
        prefixes = self._prefixes
        if not hold.is_open:
            raise InvariantViolation("a hold that was let go cannot be moved")
        if tail is not None:
            point = tail.point
        if point is not None and (hold.point is None or point.position > hold.point.position):
            prefixes.lock_snapshot(point)
            self.release_snapshot(hold)
            hold.point = point
        if tail is not None:
            self.release_tail(hold)
            prefixes.lock_snapshot(tail)
            hold.tail = tail
        # Never up: without attention, ``new`` reaches no further than its deepest state.
        if node is not None and (hold.node is None or node.end > hold.node.end):
            prefixes.lock_path(node)
            if hold.node is not None:
                prefixes.unlock_path(hold.node)
            hold.node = node

    def _cap_path(self, deepest: Point) -> None:
        """Drop the shallowest states beyond the cap, but those at forks, locked or with tails."""
        node: CacheNode | None = deepest.node
        states: list[Point] = []
        while node is not None:
            here = [point for unit, point in sorted(node.points.items()) if unit]
            states = here + states
            node = node.parent
        excess = len(states) - self._options.max_states_per_path
        for point in states:
            if excess <= 0:
                return
            owner, unit = point.node, point.position // self.grid
            is_fork = unit == owner.end and len(owner.children) != 1
            if point is deepest or point.locks or point.tails or is_fork:
                continue
            self.counters.states_dropped += 1
            self._prefixes.drop_point(point)
            excess -= 1
