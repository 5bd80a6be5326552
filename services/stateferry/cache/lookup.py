"""How much of a prompt is cached, and what it takes to go on from there."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.cache.cached_prefixes import CachedPrefixes
from stateferry.cache.entries import (
    CacheNode,
    Pages,
    Point,
    Tail,
    common_tokens,
    longest_match,
    tails_covering,
)
from stateferry.cache.handles import StateHandle
from stateferry.prefix.prefix_hash import TOKEN_BYTES
from stateferry.prefix.radix_tree import Walk


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache knows of a prompt of ``num_tokens``. Good until the cache changes.

    ``position`` tokens need no forward: the state is in ``state`` (None: the zero state), the
    inputs of the last ``tail_rows`` of them in ``tail_page``, keys and values of all of them in
    ``kv_pages``, in order, those of the tail at the end. ``final`` is what the token after the
    whole prompt follows from; only with it is ``position`` all of the prompt.

    ``kv_tokens`` have keys and values here. ``shared_tokens`` are in the tree: to the token within
    a node and its tails, in whole grid intervals where paths fork. ``branch_position`` is the last
    grid point of what is shared, if there is no state but should be: somebody has been there
    before.
    """

    num_tokens: int
    position: int = 0
    state: StateHandle | None = None
    tail_page: int | None = None
    tail_rows: int = 0
    kv_pages: Pages = ()
    kv_tokens: int = 0
    shared_tokens: int = 0
    branch_position: int | None = None
    final: object | None = None
    point: Point | None = None
    tail: Tail | None = None


def look_up(prefixes: CachedPrefixes, namespace: bytes, key: bytes) -> Match:
    """The deepest place of ``key`` (``encode_tokens`` of the prompt) to go on from. Mutates
    nothing."""
    num_tokens = len(key) // TOKEN_BYTES
    root = prefixes.tree.root(namespace)
    if root is None:
        return Match(num_tokens)
    grid = prefixes.grid
    walk = prefixes.tree.walk(root, key, num_tokens // grid)
    point, tail, rows, final = _deepest(walk, key, num_tokens, grid)
    position = point.position + rows
    shared = max(_shared_tokens(walk, key, grid), position)
    kv_tokens = max(walk.units * grid, position) if prefixes.pages_per_unit else 0
    return Match(
        num_tokens=num_tokens,
        position=position,
        state=point.state,
        tail_page=tail.page if tail is not None else None,
        tail_rows=rows,
        kv_pages=_kv_pages(prefixes, walk.path, point.position // grid, tail, rows),
        kv_tokens=kv_tokens,
        shared_tokens=shared,
        branch_position=_branch_position(walk, grid),
        final=final,
        point=point,
        tail=tail,
    )


def _deepest(
    walk: Walk[Pages, Point], key: bytes, num_tokens: int, grid: int
) -> tuple[Point, Tail | None, int, object | None]:
    """The deepest point, a tail of it, how many of its rows, and the prompt's final."""
    for point in _points_from_below(walk):
        if point.position == num_tokens:
            if point.final is not None:
                return point, None, 0, point.final
            # One token must be computed, or nothing says what comes next.
            continue
        start = point.position * TOKEN_BYTES
        rest = key[start : start + grid * TOKEN_BYTES]
        left = num_tokens - point.position
        if left < grid:
            for tail in tails_covering(point.tails, rest):
                if left in tail.finals:
                    return point, tail, left, tail.finals[left]
        best, rows = longest_match(point.tails, rest)
        rows = min(rows, left - 1)
        return point, best if rows else None, rows, None
    raise AssertionError("the root has a point")


def _points_from_below(walk: Walk[Pages, Point]) -> list[Point]:
    """At most two: whatever lies above the second cannot be deeper, and the first may be unfit."""
    found: list[Point] = []
    for node in reversed(walk.path):
        units = sorted((unit for unit in node.points if unit <= walk.units), reverse=True)
        found += [node.points[unit] for unit in units[:2]]
        if len(found) >= 2:
            break
    return found


def _shared_tokens(walk: Walk[Pages, Point], key: bytes, grid: int) -> int:
    node, at = walk.node, walk.units * grid * TOKEN_BYTES
    if walk.units == node.end:
        return walk.units * grid
    inside = (walk.units - node.first) * grid * TOKEN_BYTES
    unit_bytes = grid * TOKEN_BYTES
    unit = node.key[inside : inside + unit_bytes]
    return walk.units * grid + common_tokens(unit, key[at : at + unit_bytes])


def _branch_position(walk: Walk[Pages, Point], grid: int) -> int | None:
    return walk.units * grid if walk.units and walk.units not in walk.node.points else None


def _kv_pages(
    prefixes: CachedPrefixes, path: list[CacheNode], units: int, tail: Tail | None, rows: int
) -> Pages:
    """Pages of the first ``units`` units, then those with the tail's first ``rows`` rows."""
    if not prefixes.pages_per_unit:
        return ()
    spans = [span for node in path for span in node.spans[: max(units - node.first, 0)]]
    pages = [page for span in spans for page in span]
    if tail is not None and rows:
        page_tokens = prefixes.grid // prefixes.pages_per_unit
        pages += tail.kv_pages[: -(-rows // page_tokens)]
    return tuple(pages)
