"""Only what was written, is still there and is the caller's own gets into the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from stateferry.cache.handles import StateHandle
from stateferry.cache.insertion import Computed
from stateferry.cache.slots import CACHE_OWNER, SlotPool, in_transfer, quarantined
from stateferry.core.errors import InvariantViolation
from stateferry.prefix.prefix_hash import encode_tokens
from support.cache_user import SPACE, CacheUser, make_cache

TOKENS = tuple(range(10))
Spoil = Callable[[CacheUser, Computed], Computed]


def computed(worker: CacheUser) -> Computed:
    """A prompt of ten tokens on a grid of four, ready to hand in."""
    cache = worker.cache
    grant = cache.allocate("r", state_slots=2, tail_pages=1, kv_pages=3)
    assert grant is not None
    states = [
        cache.state_handle(slot, position).written(1)
        for slot, position in zip(grant.state_slots, (4, 8), strict=True)
    ]
    tail = cache.tail_handle(grant.tail_pages[0], 10).written(1)
    return Computed(SPACE, encode_tokens(TOKENS), "r", grant.kv_pages, states, tail, "final")


def state(new: Computed, **changes: object) -> Computed:
    first: StateHandle = dataclasses.replace(new.states[0], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(new, states=[first, *new.states[1:]])


def tail(new: Computed, **changes: object) -> Computed:
    assert new.tail is not None
    return dataclasses.replace(new, tail=dataclasses.replace(new.tail, **changes))  # type: ignore[arg-type]


def recycle(worker: CacheUser, new: Computed) -> Computed:
    worker.cache.free(state_slots=[new.states[0].slot])
    assert worker.cache.allocate("r", state_slots=1) is not None
    return new


def test_all_in_order_is_taken_over() -> None:
    worker = CacheUser(make_cache())
    new = computed(worker)
    result = worker.cache.insert(new)
    assert len(result.taken_slots) == 2 and result.taken_tail and len(result.taken_kv_pages) == 3
    worker.cache.check_conservation()
    match = worker.cache.match(SPACE, encode_tokens(TOKENS))
    assert (match.position, match.final, match.kv_pages) == (10, "final", new.kv_pages)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w, n: state(n, stamp=None), "never written"),
        (lambda w, n: tail(n, stamp=None), "never written"),
        (lambda w, n: state(n, layout="other"), "layout other"),
        (lambda w, n: tail(n, layout="other"), "layout other"),
        (lambda w, n: state(n, generation=5), "recycled"),
        (recycle, "recycled"),
        (lambda w, n: state(n, position=5), "a state at 5"),
        (lambda w, n: state(n, position=12), "a state at 12"),
        (lambda w, n: state(n, position=8), "one position"),
        (lambda w, n: state(n, slot=n.states[1].slot), "one slot"),
        (lambda w, n: tail(n, rows=1), "a tail of rows"),
        (lambda w, n: tail(n, position=4), "a tail of rows"),
        (lambda w, n: dataclasses.replace(n, owner="s"), "is not s's"),
        (lambda w, n: dataclasses.replace(n, kv_pages=n.kv_pages[:2]), "2 KV pages"),
        (lambda w, n: dataclasses.replace(n, kv_pages=(n.kv_pages[0],) * 3), "twice"),
        (lambda w, n: dataclasses.replace(n, kv_pages=(*n.kv_pages[:2], 200)), "is not r's"),
    ],
)
def test_anything_else_is_refused_before_anything_changes(spoil: Spoil, message: str) -> None:
    worker = CacheUser(make_cache())
    new = spoil(worker, computed(worker))
    with pytest.raises(InvariantViolation, match=message):
        worker.cache.insert(new)
    worker.cache.check_conservation()
    assert not list(worker.cache._prefixes.tree)
    assert all(pool.occupancy.cached == 0 for pool in worker.cache.pools)


def test_what_was_matched_must_still_be_there_when_it_is_locked() -> None:
    worker = CacheUser(make_cache())
    worker.run(TOKENS)
    match = worker.cache.match(SPACE, encode_tokens(TOKENS))
    worker.cache.clear()
    with pytest.raises(InvariantViolation, match="gone"):
        worker.cache.lock(match)
    worker.cache.check_conservation()


def test_a_hold_is_let_go_once() -> None:
    worker = CacheUser(make_cache())
    worker.run(TOKENS)
    hold = worker.cache.lock(worker.cache.match(SPACE, encode_tokens(TOKENS)))
    worker.cache.unlock(hold)
    with pytest.raises(InvariantViolation, match="twice"):
        worker.cache.unlock(hold)


def test_leaks_are_named() -> None:
    worker = CacheUser(make_cache())
    worker.run(TOKENS)
    slots = worker.cache.pools.state_slots
    assert slots.allocate(1, CACHE_OWNER) is not None
    leaked = max(i for i, owner in slots.owners().items() if owner == CACHE_OWNER)
    with pytest.raises(InvariantViolation, match=rf"cached but not in the tree \[{leaked}\]"):
        worker.cache.check_conservation()


def test_ids_move_between_owners_and_are_counted_by_kind() -> None:
    pool = SlotPool("slot", 10, first=1)
    taken = pool.allocate(6, "r")
    assert taken is not None
    pool.move(taken[:2], "r", CACHE_OWNER)
    pool.move(taken[2:3], "r", in_transfer("r"))
    pool.move(taken[3:5], "r", quarantined("r"))
    o = pool.occupancy
    assert (o.free, o.running, o.cached, o.in_transfer, o.quarantined) == (4, 1, 2, 1, 2)
    with pytest.raises(InvariantViolation, match="r's, not x's"):
        pool.move(taken[5:], "x", "y")
    with pytest.raises(InvariantViolation, match="nobody's"):
        pool.move([*taken[5:], 10], "r", "y")
    assert pool.owner(taken[5]) == "r" and pool.occupancy == o
    generation = pool.generation(taken[0])
    pool.free(taken)
    assert pool.generation(taken[0]) == generation + 1 and pool.occupancy.free == 10
