"""Bringing back from the host tier what a prompt can use.

It enters the tree at once, and its bytes come with the next launch: before anybody can read them.
"""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.cache.cached_prefixes import CachedPrefixes
from stateferry.cache.entries import (
    CacheNode,
    Pages,
    Point,
    Tail,
    common_tokens,
    tails_covering,
)
from stateferry.cache.handles import StateHandle, TailHandle
from stateferry.cache.host_tier import HostEntry, HostKey, HostStore, page_rows
from stateferry.cache.insertion import Computed, Inserted, insert
from stateferry.cache.lookup import Match, look_up
from stateferry.cache.page_copy import Kind, PageCopy
from stateferry.cache.slots import in_transfer
from stateferry.core.errors import InvariantViolation
from stateferry.prefix.prefix_hash import TOKEN_BYTES, chain_hashes

_OWNER = in_transfer("restore")


@dataclass(frozen=True, slots=True)
class _Found:
    """A state in host memory, and the units of keys and values that the tree lacks before it."""

    unit: int
    state: HostEntry
    kv: list[HostEntry]


def restore(
    prefixes: CachedPrefixes, host: HostStore, copies: list[PageCopy], namespace: bytes, key: bytes
) -> int:
    """Bring back the deepest state of a prompt that is only in host memory, with the keys and
    values before it, and the tail after it; evicts what it takes, and does nothing where that is
    not enough. Returns how many tokens more can be resumed. What is to be copied is added to
    ``copies``."""
    hashes = chain_hashes(namespace, key, prefixes.grid)
    before = look_up(prefixes, namespace, key)
    match = before
    found = _find_state(prefixes, host, hashes, match)
    if found is not None and _restore_state(prefixes, copies, namespace, key, found):
        match = look_up(prefixes, namespace, key)
    unit = (match.position - match.tail_rows) // prefixes.grid
    link = hashes[unit - 1] if unit else namespace
    if _restore_tail(prefixes, host, copies, namespace, key, link, match):
        match = look_up(prefixes, namespace, key)
    return match.position - before.position


def _find_state(
    prefixes: CachedPrefixes, host: HostStore, hashes: list[bytes], match: Match
) -> _Found | None:
    grid = prefixes.grid
    have = (match.position - match.tail_rows) // grid
    kv_have = match.kv_tokens // grid
    reach = len(hashes)
    if prefixes.pages_per_unit:
        reach = kv_have
        while reach < len(hashes) and host.has(HostKey("kv", hashes[reach])):
            reach += 1
    for unit in range(reach, have, -1):
        state = host.get(HostKey("state", hashes[unit - 1]))
        if state is None or (unit * grid == match.num_tokens and not state.finals):
            continue
        kv: list[HostEntry] = []
        if prefixes.pages_per_unit:
            entries = [host.get(HostKey("kv", link)) for link in hashes[kv_have:unit]]
            kv = [entry for entry in entries if entry is not None]
        return _Found(unit, state, kv)
    return None


def _restore_state(
    prefixes: CachedPrefixes, copies: list[PageCopy], namespace: bytes, key: bytes, found: _Found
) -> bool:
    grid, pools, k = prefixes.grid, prefixes.pools, prefixes.pages_per_unit
    key = key[: found.unit * prefixes.tree.unit_bytes]
    final = found.state.finals.get(0)
    node, units, known = _path(prefixes, namespace, key)
    # The node may go on, with other tokens, behind what the key shares with it.
    point = node.points.get(found.unit) if units == found.unit else None
    if point is not None:
        # Computed again meanwhile, by somebody who did not ask for what follows.
        point.final = final
        return True
    if not _make_room(prefixes, node, None, 1, 0, len(found.kv) * k):
        return False
    slots = pools.state_slots.allocate(1, _OWNER)
    pages = pools.kv_pages.allocate(len(found.kv) * k, _OWNER)
    assert slots is not None and pages is not None
    _bring(prefixes, copies, found.state, [("state", slots[0], 0)])
    for number, entry in enumerate(found.kv):
        unit_pages = pages[number * k : (number + 1) * k]
        _bring(prefixes, copies, entry, page_rows(unit_pages, grid, grid // k))
    generation = pools.state_slots.generation(slots[0])
    state = StateHandle(slots[0], generation, found.unit * grid, prefixes.layout, found.state.stamp)
    _insert(prefixes, Computed(namespace, key, _OWNER, (*known, *pages), (state,), None, final))
    prefixes.counters.states_restored += 1
    prefixes.counters.kv_pages_restored += len(pages)
    return True


def _restore_tail(
    prefixes: CachedPrefixes,
    host: HostStore,
    copies: list[PageCopy],
    namespace: bytes,
    key: bytes,
    link: bytes,
    match: Match,
) -> bool:
    """The tail in host memory that reaches further than the one in the tree."""
    grid, pools, k = prefixes.grid, prefixes.pools, prefixes.pages_per_unit
    begin = match.position - match.tail_rows
    best = _find_tail(host, link, key[begin * TOKEN_BYTES :], match.num_tokens - begin, match)
    entry = host.get(HostKey("tail", link, best)) if best else None
    if entry is None:
        return False
    covering = tails_covering(match.point.tails, best) if match.point is not None else []
    if covering:
        # Computed again meanwhile, by somebody who did not ask for what follows.
        covering[0].finals |= entry.finals
        return True
    num_pages = len(entry.blobs) - 1
    node, _, known = _path(prefixes, namespace, key[: begin * TOKEN_BYTES])
    if not _make_room(prefixes, node, match.point, 0, 1, num_pages):
        return False
    tails = pools.tail_pages.allocate(1, _OWNER)
    pages = pools.kv_pages.allocate(num_pages, _OWNER)
    assert tails is not None and pages is not None
    rows = len(best) // TOKEN_BYTES
    places: list[tuple[Kind, int, int]] = [("tail", tails[0], rows)]
    _bring(prefixes, copies, entry, places + page_rows(pages, rows, grid // k if k else None))
    generation = pools.tail_pages.generation(tails[0])
    tail = TailHandle(tails[0], generation, begin, rows, prefixes.layout, entry.stamp)
    whole = key[: begin * TOKEN_BYTES] + best
    result = _insert(prefixes, Computed(namespace, whole, _OWNER, (*known, *pages), (), tail))
    restored = result.snapshots[-1]
    assert isinstance(restored, Tail)
    restored.finals |= entry.finals
    prefixes.counters.tails_restored += 1
    prefixes.counters.kv_pages_restored += num_pages
    return True


def _find_tail(host: HostStore, link: bytes, rest: bytes, left: int, match: Match) -> bytes:
    """The tokens of the tail that most of ``rest``, ``left`` tokens, can be resumed from; empty
    where none beats the match."""
    best, best_rows = b"", match.tail_rows
    for tokens in host.tails_at(link):
        rows = min(common_tokens(tokens, rest), left - 1)
        entry = host.get(HostKey("tail", link, tokens)) if tokens.startswith(rest) else None
        if entry is not None and left in entry.finals:
            rows = left
        if rows > best_rows:
            best, best_rows = tokens, rows
    return best


def _bring(
    prefixes: CachedPrefixes,
    copies: list[PageCopy],
    entry: HostEntry,
    places: list[tuple[Kind, int, int]],
) -> None:
    """Ask for an entry's bytes in ``places``: kind, number and filled rows of each."""
    copies += [
        PageCopy(kind, blob, number, rows)
        for (kind, number, rows), blob in zip(places, entry.blobs, strict=True)
    ]
    prefixes.counters.host_restored_bytes += entry.size_bytes


def _insert(prefixes: CachedPrefixes, new: Computed) -> Inserted:
    prefixes.tick += 1
    result = insert(prefixes, new)
    if result.duplicate_slots or result.duplicate_kv_pages:
        raise InvariantViolation("what was restored was there already")
    return result


def _path(prefixes: CachedPrefixes, namespace: bytes, key: bytes) -> tuple[CacheNode, int, Pages]:
    """The last node on the way along ``key``, how many units they share, and their KV pages."""
    root = prefixes.tree.root(namespace)
    if root is None:
        root = prefixes.plant(namespace)
    walk = prefixes.tree.walk(root, key, len(key) // prefixes.tree.unit_bytes)
    pages = [page for node in walk.path for span in node.spans for page in span]
    return walk.node, walk.units, tuple(pages[: walk.units * prefixes.pages_per_unit])


def _make_room(
    prefixes: CachedPrefixes,
    node: CacheNode,
    point: Point | None,
    slots: int,
    tails: int,
    kv_pages: int,
) -> bool:
    """Evict, but nothing of what is to be continued."""
    prefixes.lock_path(node)
    if point is not None:
        prefixes.lock_snapshot(point)
    there_is = prefixes.make_room(slots, tails, kv_pages)
    if point is not None:
        prefixes.unlock_snapshot(point)
    prefixes.unlock_path(node)
    return there_is
