"""The tree of what is cached, and the three pools it is cached in.

Keeps the rules that everything above relies on:

- each id in the tree belongs to the cache in its pool, and the other way round;
- a point's state has all KV before it in the tree, where the model has attention, and a unit's KV
  that of all units before it;
- a tail hangs at a point that has a state, or at the root;
- what is locked stays; all else can be evicted to the last id, in the policy's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from stateferry.cache.cache_counters import CacheCounters
from stateferry.cache.entries import (
    CacheNode,
    CacheTree,
    Origin,
    Pages,
    Point,
    Snapshot,
    Tail,
    remove_sorted,
)
from stateferry.cache.eviction import EvictionPolicy, EvictionQueue
from stateferry.cache.slots import SlotPool
from stateferry.core.errors import InvariantViolation
from stateferry.prefix.prefix_hash import TOKEN_BYTES
from stateferry.prefix.radix_tree import Walk


@dataclass(frozen=True, slots=True)
class CachePools:
    """Who owns which id. Shared with whoever leases memory to running sequences."""

    state_slots: SlotPool
    tail_pages: SlotPool
    kv_pages: SlotPool

    def __iter__(self) -> Iterator[SlotPool]:
        return iter((self.state_slots, self.tail_pages, self.kv_pages))


class Offload(Protocol):
    """Told of what is about to be evicted, while it can still be copied."""

    def state(self, point: Point, chain_hash: bytes) -> None: ...

    def tail(self, tail: Tail, chain_hash: bytes) -> None: ...

    def kv_unit(self, pages: Pages, chain_hash: bytes) -> None: ...


class CachedPrefixes:
    """See the module. ``pages_per_unit`` KV pages hold one grid interval; 0: no attention."""

    def __init__(
        self,
        pools: CachePools,
        *,
        grid: int,
        pages_per_unit: int,
        layout: str,
        new_policy: Callable[[], EvictionPolicy],
        pin_ticks: int,
        counters: CacheCounters,
        offload: Offload | None = None,
    ) -> None:
        self.pools = pools
        self.grid = grid
        self.pages_per_unit = pages_per_unit
        self.layout = layout
        self.counters = counters
        self.offload = offload
        self.tree: CacheTree = CacheTree(grid * TOKEN_BYTES)
        self.tick = 0
        self._pin_ticks = pin_ticks
        # What memory is worth differs between pools, so each has a policy that learns alone.
        self._state_policy, self._tail_policy, self._kv_policy = (new_policy() for _ in range(3))
        self.state_queue: EvictionQueue[Point] = EvictionQueue()
        self.tail_queue: EvictionQueue[Tail] = EvictionQueue()
        self.kv_queue: EvictionQueue[CacheNode | Tail] = EvictionQueue()
        self.locked_states = 0
        self.locked_tails = 0
        self.locked_kv_pages = 0
        # Of those that are not locked: what snapshots that need not be may not take.
        self.pinned_states = 0
        self.pinned_tails = 0

    # -- what can be had ------------------------------------------------------------------------

    @property
    def obtainable_slots(self) -> int:
        """State slots that are free or can be evicted."""
        pool = self.pools.state_slots
        return pool.num_free + pool.occupancy.cached - self.locked_states

    @property
    def obtainable_tails(self) -> int:
        pool = self.pools.tail_pages
        return pool.num_free + pool.occupancy.cached - self.locked_tails

    @property
    def obtainable_kv_pages(self) -> int:
        pool = self.pools.kv_pages
        return pool.num_free + pool.occupancy.cached - self.locked_kv_pages

    def make_room(self, slots: int, tails: int, kv_pages: int) -> bool:
        """Evict until so many ids are free in each pool; False, and nothing evicted, when that
        cannot be."""
        if (
            slots > self.obtainable_slots
            or tails > self.obtainable_tails
            or kv_pages > self.obtainable_kv_pages
        ):
            return False
        self._evict_kv(kv_pages)
        while self.pools.state_slots.num_free < slots:
            self._evict_state()
        while self.pools.tail_pages.num_free < tails:
            self._evict_tail()
        return True

    # -- use and locks --------------------------------------------------------------------------

    def plant(self, namespace: bytes) -> CacheNode:
        root = self.tree.plant(namespace)
        if not root.points:
            root.points[0] = Point(root, None)
        return root

    def end_at(self, walk: Walk[Pages, Point], unit: int) -> CacheNode:
        """The node of a fresh walk's path that ends at ``unit``, cut off if there is none."""
        node = self.tree.node_at(walk, unit)
        for point in node.points.values():
            point.node = node
        return node

    def touch(self, snapshot: Snapshot) -> None:
        """Note a use, of all that it takes to use it: its point and its keys and values."""
        snapshot.last_used = self.tick
        point = snapshot.point if isinstance(snapshot, Tail) else snapshot
        point.last_used = self.tick
        node: CacheNode | None = point.node
        while node is not None:
            node.last_used = self.tick
            node = node.parent
        self.consider(point.node)
        self.date(point)
        self.date(snapshot)

    def date(self, snapshot: Snapshot) -> None:
        """Find out anew when a snapshot should go, unless it is locked."""
        if not snapshot.alive or snapshot.locks:
            return
        pinned = self._pin_ticks * bool(snapshot.pinned)
        used, hits, origin = snapshot.last_used, snapshot.hits, snapshot.origin
        if isinstance(snapshot, Point):
            if snapshot.state is not None:
                saved = self._saved_by(snapshot)
                date = self._state_policy.date(used, saved, hits, origin)
                self.state_queue.put(snapshot, pinned + date)
            return
        saved = self._saved_by(snapshot)
        self.tail_queue.put(snapshot, pinned + self._tail_policy.date(used, saved, hits, origin))
        if snapshot.kv_pages:
            self.kv_queue.put(snapshot, pinned + self._kv_policy.date(used, saved, hits, origin))

    def consider(self, node: CacheNode) -> None:
        """Keys and values go from the leaves up: make a node a candidate if it is one."""
        if not self.pages_per_unit or node.parent is None:
            return
        if node.children or node.locks:
            self.kv_queue.discard(node)
            return
        point = node.points.get(node.end)
        saved = hits = pinned = 0
        origin = Origin.PROMPT
        if point is not None:
            # Without a state at its end nobody can use a leaf's keys and values. With one, each
            # page saves the tokens that it holds, whatever the length of the leaf.
            saved, hits, origin = self.grid, point.hits, point.origin
            pinned = self._pin_ticks * bool(point.pinned)
        self.kv_queue.put(node, pinned + self._kv_policy.date(node.last_used, saved, hits, origin))

    def lock_path(self, node: CacheNode) -> None:
        self.locked_kv_pages += self.tree.lock(node) * self.pages_per_unit
        self.kv_queue.discard(node)

    def unlock_path(self, node: CacheNode) -> None:
        self.locked_kv_pages -= self.tree.unlock(node) * self.pages_per_unit
        self.consider(node)
        self._prune(node)
        self.forget_if_empty(node)

    def lock_snapshot(self, snapshot: Snapshot) -> None:
        snapshot.locks += 1
        if snapshot.locks > 1:
            return
        self._count_pinned(snapshot, -1)
        if isinstance(snapshot, Point):
            self.state_queue.discard(snapshot)
            self.locked_states += snapshot.state is not None
        else:
            self.tail_queue.discard(snapshot)
            self.kv_queue.discard(snapshot)
            self.locked_tails += 1
            self.locked_kv_pages += len(snapshot.kv_pages)

    def unlock_snapshot(self, snapshot: Snapshot) -> None:
        if snapshot.locks < 1:
            raise InvariantViolation("a snapshot was unlocked more often than locked")
        snapshot.locks -= 1
        if snapshot.locks:
            return
        self._count_pinned(snapshot, 1)
        if isinstance(snapshot, Point):
            self.locked_states -= snapshot.state is not None
        else:
            self.locked_tails -= 1
            self.locked_kv_pages -= len(snapshot.kv_pages)
        self.date(snapshot)
        if isinstance(snapshot, Point):
            self.forget_if_empty(snapshot.node)

    def pin(self, snapshot: Snapshot, by: int) -> None:
        """A snapshot, and what it takes to use it, is protected by one more or one less."""
        point = snapshot.point if isinstance(snapshot, Tail) else snapshot
        for entry in {snapshot, point}:
            if not entry.alive:
                continue
            if not entry.locks:
                self._count_pinned(entry, -1)
            entry.pinned += by
            if not entry.locks:
                self._count_pinned(entry, 1)
            self.date(entry)
        if point.alive:
            self.consider(point.node)

    def _count_pinned(self, snapshot: Snapshot, by: int) -> None:
        if not snapshot.pinned:
            return
        if isinstance(snapshot, Tail):
            self.pinned_tails += by
        elif snapshot.state is not None:
            self.pinned_states += by

    def count_use(self, snapshot: Snapshot) -> None:
        """A prompt goes on from it."""
        if isinstance(snapshot, Tail):
            self._tail_policy.used(snapshot.hits, snapshot.origin)
            snapshot.hits += 1
            snapshot = snapshot.point
        if snapshot.state is not None:
            self._state_policy.used(snapshot.hits, snapshot.origin)
            if self.pages_per_unit:
                self._kv_policy.used(snapshot.hits, snapshot.origin)
            snapshot.hits += 1

    # -- taking away ----------------------------------------------------------------------------

    def drop_tail(self, tail: Tail) -> None:
        """Free an unlocked tail."""
        assert tail.alive and not tail.locks
        self._count_pinned(tail, -1)
        tail.alive = False
        remove_sorted(tail.point.tails, tail)
        self.tail_queue.discard(tail)
        self.kv_queue.discard(tail)
        self.pools.tail_pages.free((tail.page,))
        self.pools.kv_pages.free(tail.kv_pages)

    def drop_point(self, point: Point) -> None:
        """Free an unlocked state and the tails that nobody can use without it."""
        assert point.alive and point.state is not None and not point.locks
        for tail in tuple(point.tails):
            self.drop_tail(tail)
        self._count_pinned(point, -1)
        point.alive = False
        self.state_queue.discard(point)
        del point.node.points[point.position // self.grid]
        self.pools.state_slots.free((point.state.slot,))
        self._prune(point.node)

    def _evict_state(self) -> None:
        point = self.state_queue.pop()
        if point is None:
            raise InvariantViolation("no state to evict, though some were counted")
        age, saved = self.tick - point.last_used, self._saved_by(point)
        self._state_policy.evicted(age, saved, point.hits, point.origin)
        self._evict_point(point)

    def _evict_point(self, point: Point) -> None:
        unit = point.position // self.grid
        if self.offload is not None:
            chain_hash = self.tree.hash_at(point.node, unit)
            for tail in point.tails:
                self.offload.tail(tail, chain_hash)
            self.offload.state(point, chain_hash)
        self.counters.states_evicted += 1
        self.counters.protected_evicted += bool(point.pinned)
        self.counters.tails_evicted += len(point.tails)
        self.counters.kv_pages_evicted += sum(len(tail.kv_pages) for tail in point.tails)
        self.drop_point(point)

    def _evict_tail(self, tail: Tail | None = None) -> None:
        tail = tail or self.tail_queue.pop()
        if tail is None:
            raise InvariantViolation("no tail to evict, though some were counted")
        age, saved = self.tick - tail.last_used, self._saved_by(tail)
        self._tail_policy.evicted(age, saved, tail.hits, tail.origin)
        node = tail.point.node
        if self.offload is not None:
            self.offload.tail(tail, self.tree.hash_at(node, tail.point.position // self.grid))
        self.counters.tails_evicted += 1
        self.counters.protected_evicted += bool(tail.pinned)
        self.counters.kv_pages_evicted += len(tail.kv_pages)
        self.drop_tail(tail)
        self.forget_if_empty(node)

    def _evict_kv(self, pages: int) -> None:
        pool = self.pools.kv_pages
        while (missing := pages - pool.num_free) > 0:
            item = self.kv_queue.pop()
            if item is None:
                raise InvariantViolation("no KV page to evict, though some were counted")
            if isinstance(item, Tail):
                self._evict_tail(item)
            else:
                self._evict_units(item, -(-missing // self.pages_per_unit))

    def _evict_units(self, node: CacheNode, most: int) -> None:
        """Cut up to ``most`` units off a leaf, and none before a state that is inside it."""
        point = node.points.get(node.end)
        if point is not None:
            age = self.tick - node.last_used
            self._kv_policy.evicted(age, self.grid, point.hits, point.origin)
            self._evict_point(point)
        stop = max(node.points, default=node.first)
        end = max(stop, node.end - most)
        if self.offload is not None:
            for unit in range(end, node.end):
                pages = node.spans[unit - node.first]
                self.offload.kv_unit(pages, self.tree.hash_at(node, unit + 1))
        self._trim(node, end)

    def _trim(self, node: CacheNode, end: int) -> None:
        pages = [page for unit in node.spans[end - node.first :] for page in unit]
        parent = node.parent
        assert parent is not None
        self.tree.trim(node, end)
        self.pools.kv_pages.free(pages)
        self.counters.kv_pages_evicted += len(pages)
        if end > node.first:
            self.consider(node)
        else:
            self.kv_queue.discard(node)
            self.consider(parent)
            self.forget_if_empty(parent)

    def _prune(self, node: CacheNode) -> None:
        """Without attention, tokens that lead to no state are of no use."""
        if self.pages_per_unit:
            return
        while node.parent is not None and not node.children and not node.locks:
            parent = node.parent
            end = max(node.points, default=node.first)
            self.tree.trim(node, end)
            if end > node.first:
                return
            node = parent
        self.forget_if_empty(node)

    def forget_if_empty(self, node: CacheNode) -> None:
        """Forget a namespace that has nothing left."""
        if node.parent is not None or node.children or node.locks:
            return
        point, namespace = node.points[0], node.hashes[0]
        if not point.tails and not point.locks and self.tree.root(namespace) is node:
            self.tree.uproot(namespace)
            point.alive = False

    def _saved_by(self, snapshot: Snapshot) -> int:
        """Tokens that must be computed again without it."""
        if isinstance(snapshot, Tail):
            # A known last token saves a whole forward.
            return snapshot.rows + (self.grid if snapshot.finals else 0)
        unit = snapshot.position // self.grid
        node: CacheNode | None = snapshot.node
        while node is not None:
            before = [other for other in node.points if other < unit]
            if before:
                return (unit - max(before)) * self.grid
            node = node.parent
        return snapshot.position
