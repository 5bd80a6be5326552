"""How computed prefixes enter the tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stateferry.cache.cached_prefixes import CachedPrefixes
from stateferry.cache.entries import (
    CacheNode,
    Origin,
    Pages,
    Point,
    Snapshot,
    Tail,
    add_sorted,
    tails_covering,
    tails_within,
)
from stateferry.cache.handles import StateHandle, TailHandle, check_handle
from stateferry.cache.slots import CACHE_OWNER
from stateferry.core.errors import InvariantViolation
from stateferry.prefix.prefix_hash import TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Computed:
    """What ``owner`` has of the tokens in ``key`` and would leave to the cache.

    ``kv_pages`` holds the keys and values of all of ``key``, in order (empty: no attention); pages
    that came from the cache are in their place. ``tail``, and the page its keys and values are in,
    may only be handed in by who will not write to them again. ``final`` belongs to the end of
    ``key``. ``origin`` says why that end is kept, ``origins`` why other positions are.
    """

    namespace: bytes
    key: bytes
    owner: str
    kv_pages: Sequence[int] = ()
    states: Sequence[StateHandle] = ()
    tail: TailHandle | None = None
    final: object | None = None
    origin: Origin = Origin.PROMPT
    origins: Mapping[int, Origin] = field(default_factory=dict)


@dataclass(slots=True)
class Inserted:
    """What became of it. Ids that were taken over belong to the cache; all others are still their
    owner's, duplicates too, to be freed once no step in flight can touch them.

    ``states`` maps the position of each state handed in to the slot that the cache has for it,
    ``kv_pages`` are the cache's pages of the whole intervals of ``key``: where these are not the
    caller's own, its bytes are the same and its own are duplicates.
    """

    states: dict[int, int] = field(default_factory=dict)
    kv_pages: Pages = ()
    taken_slots: tuple[int, ...] = ()
    taken_kv_pages: Pages = ()
    taken_tail: bool = False
    duplicate_slots: tuple[int, ...] = ()
    duplicate_kv_pages: Pages = ()
    # Where the states handed in are now, deepest last; then the tail.
    snapshots: list[Snapshot] = field(default_factory=list)
    node: CacheNode | None = None


def insert(prefixes: CachedPrefixes, new: Computed) -> Inserted:
    """Take over what is not there yet. Raises InvariantViolation, before anything changes, for a
    handle that was not written, is stale or lies outside ``key``, and for pages of a third
    party."""
    grid = prefixes.grid
    num_units = len(new.key) // (grid * TOKEN_BYTES)
    _check_handles(prefixes, new, num_units)
    if not prefixes.pages_per_unit:
        # Without keys and values there is nothing to keep between the last state and the end.
        num_units = max((state.position // grid for state in new.states), default=0)
        at_end = len(new.key) // (grid * TOKEN_BYTES)
        if num_units < at_end and _has_point(prefixes, new, at_end):
            num_units = at_end
    result = Inserted()
    path = _insert_path(prefixes, new, num_units, result)
    result.node = path[-1]
    for state in sorted(new.states, key=lambda handle: handle.position):
        _insert_state(prefixes, new, state, path, result)
    _insert_end(prefixes, new, path, result)
    prefixes.forget_if_empty(path[-1])
    if prefixes.tree.root(new.namespace) is None:
        result.node = None
    return result


def _has_point(prefixes: CachedPrefixes, new: Computed, unit: int) -> bool:
    """Whether the cache has the state that a tail alone would hang at."""
    root = prefixes.tree.root(new.namespace)
    if root is None:
        return False
    walk = prefixes.tree.walk(root, new.key, unit)
    return walk.units == unit and unit in walk.node.points


def _check_handles(prefixes: CachedPrefixes, new: Computed, num_units: int) -> None:
    grid, k, pools = prefixes.grid, prefixes.pages_per_unit, prefixes.pools
    num_tokens, layout = len(new.key) // TOKEN_BYTES, prefixes.layout
    for state in new.states:
        check_handle(state, pools.state_slots, layout)
        if state.position % grid or not 0 < state.position <= num_tokens:
            raise InvariantViolation(f"a state at {state.position} of {num_tokens} tokens")
        if pools.state_slots.owner(state.slot) != new.owner:
            raise InvariantViolation(f"state slot {state.slot} is not {new.owner}'s")
    if len({state.slot for state in new.states}) != len(new.states):
        raise InvariantViolation("two states in one slot")
    if len({state.position for state in new.states}) != len(new.states):
        raise InvariantViolation("two states of one position")
    tail = new.tail
    if tail is not None:
        check_handle(tail, pools.tail_pages, layout)
        rows = num_tokens - num_units * grid
        if tail.position != num_units * grid or not 0 < tail.rows == rows:
            raise InvariantViolation(
                f"a tail of rows [{tail.position}, {tail.position + tail.rows}) at the end of "
                f"{num_tokens} tokens"
            )
        if pools.tail_pages.owner(tail.page) != new.owner:
            raise InvariantViolation(f"tail page {tail.page} is not {new.owner}'s")
    if k:
        page_tokens = grid // k
        needed = num_units * k + (-(-tail.rows // page_tokens) if tail is not None else 0)
        if len(new.kv_pages) < needed:
            raise InvariantViolation(f"{len(new.kv_pages)} KV pages for {num_tokens} tokens")
        if len(set(new.kv_pages)) != len(new.kv_pages):
            raise InvariantViolation("a KV page is there twice")


def _insert_path(
    prefixes: CachedPrefixes, new: Computed, num_units: int, result: Inserted
) -> list[CacheNode]:
    """Make the nodes exist; the path from the root to a node that ends at ``num_units``."""
    tree, k = prefixes.tree, prefixes.pages_per_unit
    root = prefixes.plant(new.namespace)
    walk = tree.walk(root, new.key, num_units)
    if k:
        known = [page for node in walk.path for span in node.spans for page in span]
        known = known[: walk.units * k]
        ours = list(new.kv_pages[: num_units * k])
        duplicates = [p for p, q in zip(ours, known, strict=False) if p != q]
        fresh = ours[walk.units * k :]
        for page in (*duplicates, *fresh, *new.kv_pages[num_units * k :]):
            if prefixes.pools.kv_pages.owner(page) != new.owner:
                prefixes.forget_if_empty(root)
                raise InvariantViolation(f"KV page {page} is not {new.owner}'s")
        result.kv_pages = (*known, *fresh)
        result.duplicate_kv_pages, result.taken_kv_pages = tuple(duplicates), tuple(fresh)
        prefixes.counters.kv_pages_inserted += len(fresh)
        prefixes.counters.kv_pages_duplicate += len(duplicates)
        prefixes.pools.kv_pages.move(fresh, new.owner, CACHE_OWNER)
    node = prefixes.end_at(walk, walk.units)
    if walk.units < num_units:
        size = tree.unit_bytes
        spans = [tuple(fresh[i : i + k]) for i in range(0, len(fresh), k)] if k else []
        parent = node
        node = tree.grow(node, new.key[walk.units * size : num_units * size], spans)
        prefixes.consider(parent)
    at: CacheNode | None = node
    path = []
    while at is not None:
        at.last_used = prefixes.tick
        path.append(at)
        at = at.parent
    prefixes.consider(node)
    return path[::-1]


def _insert_state(
    prefixes: CachedPrefixes,
    new: Computed,
    state: StateHandle,
    path: list[CacheNode],
    result: Inserted,
) -> None:
    unit = state.position // prefixes.grid
    node = next(node for node in path if node.first < unit <= node.end)
    point = node.points.get(unit)
    if point is None:
        origin = new.origins.get(state.position, new.origin)
        point = node.points[unit] = Point(node, state, origin)
        prefixes.pools.state_slots.move((state.slot,), new.owner, CACHE_OWNER)
        prefixes.counters.states_inserted += 1
        result.taken_slots += (state.slot,)
    else:
        if not point.hits:
            point.origin = new.origins.get(state.position, new.origin)
        prefixes.counters.states_duplicate += 1
        result.duplicate_slots += (state.slot,)
    prefixes.touch(point)
    assert point.state is not None
    result.states[state.position] = point.state.slot
    result.snapshots.append(point)


def _insert_end(
    prefixes: CachedPrefixes, new: Computed, path: list[CacheNode], result: Inserted
) -> None:
    """The tail, and what is known of the token after the whole key."""
    unit_bytes = prefixes.tree.unit_bytes
    unit, rest = divmod(len(new.key), unit_bytes)
    point = path[-1].points.get(unit)
    if point is None:
        # Nothing to hang it at: the tail stays its owner's.
        return
    if not rest:
        if new.final is not None:
            point.final = new.final
        return
    tokens = new.key[-rest:]
    covering = tails_covering(point.tails, tokens)
    tail = covering[0] if covering else None
    if tail is not None and new.tail is not None:
        prefixes.counters.tails_duplicate += 1
    if tail is None and new.tail is not None:
        tail = _add_tail(prefixes, new, new.tail, point, tokens)
        result.taken_tail = True
        result.taken_kv_pages += tail.kv_pages
    if tail is None:
        return
    if new.final is not None:
        tail.finals[rest // TOKEN_BYTES] = new.final
    prefixes.touch(tail)
    result.snapshots.append(tail)


def _add_tail(
    prefixes: CachedPrefixes, new: Computed, handle: TailHandle, point: Point, tokens: bytes
) -> Tail:
    """Hang a tail at ``point``; it takes the place of those that it begins with."""
    kv_pages: Pages = ()
    if prefixes.pages_per_unit:
        page_tokens = prefixes.grid // prefixes.pages_per_unit
        first = handle.position // page_tokens
        kv_pages = tuple(new.kv_pages[first : first + -(-handle.rows // page_tokens)])
        prefixes.pools.kv_pages.move(kv_pages, new.owner, CACHE_OWNER)
        prefixes.counters.kv_pages_inserted += len(kv_pages)
    prefixes.pools.tail_pages.move((handle.page,), new.owner, CACHE_OWNER)
    prefixes.counters.tails_inserted += 1
    tail = Tail(point, tokens, handle.page, kv_pages, handle.stamp, new.origin)
    for shorter in tails_within(point.tails, tokens):
        tail.finals |= shorter.finals
        tail.hits = max(tail.hits, shorter.hits)
        if not shorter.locks:
            prefixes.counters.tails_dropped += 1
            prefixes.drop_tail(shorter)
    add_sorted(point.tails, tail)
    return tail
