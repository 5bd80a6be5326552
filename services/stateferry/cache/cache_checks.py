"""The rules of the cache, checked one by one from what is really there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from stateferry.cache.cached_prefixes import CachedPrefixes
from stateferry.cache.entries import CacheNode, Point, Tail
from stateferry.cache.handles import check_handle
from stateferry.cache.slots import CACHE_OWNER, SlotPool
from stateferry.core.errors import InvariantViolation
from stateferry.prefix.prefix_hash import TOKEN_BYTES


def check_cache(prefixes: CachedPrefixes) -> None:
    """Raises InvariantViolation that names what is wrong."""
    prefixes.tree.check_structure()
    nodes = list(prefixes.tree)
    points = [point for node in nodes for point in node.points.values()]
    tails = [tail for point in points for tail in point.tails]
    pools = prefixes.pools
    slots = [point.state.slot for point in points if point.state is not None]
    pages = [page for node in nodes for span in node.spans for page in span]
    pages += [page for tail in tails for page in tail.kv_pages]
    _check_pool(pools.state_slots, slots)
    _check_pool(pools.tail_pages, [tail.page for tail in tails])
    _check_pool(pools.kv_pages, pages)
    for node in nodes:
        _check_node(prefixes, node)
    for tail in tails:
        _check_tail(prefixes, tail)
    _check_locks(prefixes, nodes, points, tails)
    _check_queues(prefixes, nodes, points, tails)


def _check_pool(pool: SlotPool, in_tree: list[int]) -> None:
    pool.check_conserved()
    doubled = sorted(place for place, count in Counter(in_tree).items() if count > 1)
    cached = {place for place, owner in pool.owners().items() if owner == CACHE_OWNER}
    leaked, strays = sorted(cached - set(in_tree)), sorted(set(in_tree) - cached)
    if doubled or leaked or strays:
        raise InvariantViolation(
            f"{pool.name}s: twice in the tree {doubled}, cached but not in the tree {leaked}, "
            f"in the tree but not cached {strays}"
        )


def _check_node(prefixes: CachedPrefixes, node: CacheNode) -> None:
    name, k = f"node [{node.first}, {node.end})", prefixes.pages_per_unit
    if len(node.spans) != (node.num_units if k else 0) or any(len(s) != k for s in node.spans):
        raise InvariantViolation(f"{name} has no keys and values of some unit")
    if node.parent is None and set(node.points) != {0}:
        raise InvariantViolation("a root has a point at 0 and no other")
    is_leaf = node.parent is not None and not node.children
    if not k and is_leaf and not node.locks and node.end not in node.points:
        raise InvariantViolation(f"{name} leads to no state")
    if node.parent is not None and node.last_used > node.parent.last_used:
        raise InvariantViolation(f"{name} was used after its parent")
    for unit, point in node.points.items():
        where = f"the point at unit {unit} of {name}"
        if point.node is not node or not point.alive:
            raise InvariantViolation(f"{where} does not know where it is")
        if (point.state is None) != (unit == 0):
            raise InvariantViolation(f"{where} has no state")
        if point.state is not None:
            check_handle(point.state, prefixes.pools.state_slots, prefixes.layout)
            if point.position != unit * prefixes.grid:
                raise InvariantViolation(f"{where} has a state at {point.position}")
        tokens = [tail.tokens for tail in point.tails]
        if tokens != sorted(set(tokens)):
            raise InvariantViolation(f"{where}: its tails are out of order")


def _check_tail(prefixes: CachedPrefixes, tail: Tail) -> None:
    k = prefixes.pages_per_unit
    wanted = -(-tail.rows // (prefixes.grid // k)) if k else 0
    if (
        not tail.alive
        or not 0 < len(tail.tokens) < prefixes.grid * TOKEN_BYTES
        or len(tail.kv_pages) != wanted
        or any(not 0 < rows <= tail.rows for rows in tail.finals)
        or tail.last_used > tail.point.last_used
        or (tail.locks and not tail.point.locks)
    ):
        raise InvariantViolation(f"a tail of {tail.rows} rows at {tail.point.position} is wrong")


def _check_locks(
    prefixes: CachedPrefixes, nodes: list[CacheNode], points: list[Point], tails: list[Tail]
) -> None:
    k = prefixes.pages_per_unit
    locked_pages = sum(node.num_units * k for node in nodes if node.locks)
    locked_pages += sum(len(tail.kv_pages) for tail in tails if tail.locks)
    found = (
        sum(point.locks > 0 and point.state is not None for point in points),
        sum(tail.locks > 0 for tail in tails),
        locked_pages,
    )
    counted = (prefixes.locked_states, prefixes.locked_tails, prefixes.locked_kv_pages)
    pinned = (
        sum(p.pinned > 0 and not p.locks and p.state is not None for p in points),
        sum(tail.pinned > 0 and not tail.locks for tail in tails),
    )
    if pinned != (prefixes.pinned_states, prefixes.pinned_tails):
        raise InvariantViolation(f"protected states and tails: {pinned} are counted wrong")
    if found != counted:
        raise InvariantViolation(f"locked states, tails and KV pages: {found}, not {counted}")
    if any(point.locks and not point.node.locks for point in points):
        raise InvariantViolation("a state is locked, and the way to it is not")


def _check_queues(
    prefixes: CachedPrefixes, nodes: list[CacheNode], points: list[Point], tails: list[Tail]
) -> None:
    kv: list[CacheNode | Tail] = []
    if prefixes.pages_per_unit:
        kv += [n for n in nodes if n.parent is not None and not n.children and not n.locks]
        kv += [tail for tail in tails if not tail.locks]
    _check_queue("state", prefixes.state_queue, [p for p in points if p.state and not p.locks])
    _check_queue("tail", prefixes.tail_queue, [tail for tail in tails if not tail.locks])
    _check_queue("KV", prefixes.kv_queue, kv)


def _check_queue(name: str, queue: Iterable[object], wanted: Iterable[object]) -> None:
    if set(map(id, queue)) != set(map(id, wanted)):
        raise InvariantViolation(f"the {name} queue holds other things than can be evicted")
