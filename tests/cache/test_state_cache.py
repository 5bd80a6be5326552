"""Leases are all or nothing, hold places for every token, and come back whole."""

from __future__ import annotations

import random

import pytest

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import InvariantViolation
from stateferry.core.worker import PoolCount
from support.small_cache import GRID, KV, small_cache


def free(cache: StateCache) -> tuple[int, int, int]:
    cache.check_conserved()
    return cache.state_slots.free, cache.tail_pages.free, cache.kv_pages.free


@pytest.mark.parametrize(
    ("num_tokens", "pages"),
    [(1, 1), (GRID - 1, 1), (GRID, 1), (GRID + 1, 2), (4 * GRID, 4)],
)
def test_a_lease_has_pages_for_every_token(num_tokens: int, pages: int) -> None:
    cache = small_cache(kv=KV)
    assert cache.reserve("a", num_tokens)
    lease = cache.lease("a")
    assert len(set(lease.kv_pages)) == len(lease.kv_pages) == pages
    assert free(cache) == (2, 1, 8 - pages)
    cache.release("a")
    assert free(cache) == (4, 2, 8)


def test_a_model_without_attention_costs_no_pages() -> None:
    cache = small_cache()
    assert cache.reserve("a", 1 << 40)
    assert cache.lease("a").kv_pages == ()
    assert cache.kv_pages == PoolCount(0, 0) and cache.pools.kv.size_bytes == 0


def test_too_few_pages_is_false_and_takes_nothing() -> None:
    """Slots are there, pages are not: they had been taken already when that was found."""
    cache = small_cache(max_sequences=3, kv=KV, budget_bytes=80_000)
    assert cache.state_slots.total == 6
    most = cache.kv_pages.total * GRID
    assert cache.reserve("a", most - GRID)
    before = free(cache)
    assert not cache.reserve("b", GRID + 1)
    assert free(cache) == before
    assert cache.reserve("b", GRID)
    cache.release("a")
    assert cache.reserve("c", most - GRID)


def test_too_few_slots_is_false_and_takes_nothing() -> None:
    cache = small_cache(max_sequences=1, kv=KV)
    assert cache.reserve("a", 1)
    before = free(cache)
    assert not cache.reserve("b", 1)
    assert free(cache) == before


def test_what_can_never_fit_is_a_violation_and_not_a_wait() -> None:
    cache = small_cache(kv=KV)
    with pytest.raises(InvariantViolation, match="never"):
        cache.reserve("a", cache.kv_pages.total * GRID + 1)
    assert free(cache) == (4, 2, 8)


def test_leases_are_never_doubled() -> None:
    cache = small_cache(kv=KV)
    assert cache.reserve("a", 1)
    with pytest.raises(InvariantViolation, match="already"):
        cache.reserve("a", 1)
    cache.release("a")
    with pytest.raises(InvariantViolation, match="no lease"):
        cache.release("a")


def test_a_page_without_a_lease_is_named() -> None:
    cache = small_cache(kv=KV)
    assert cache.prefixes.pools.kv_pages.allocate(1, "stray") == (0,)
    with pytest.raises(InvariantViolation, match=r"KV pages without a lease: \{0: 'stray'\}"):
        cache.check_conserved()


@pytest.mark.parametrize("seed", range(5))
def test_random_walk_conserves_and_shares_no_page(seed: int) -> None:
    rng, refused = random.Random(seed), 0
    cache = small_cache(max_sequences=6, kv=KV, budget_bytes=120_000)
    total = free(cache)
    held: dict[str, int] = {}
    for number in range(1000):
        if held and rng.random() < 0.5:
            name = rng.choice(sorted(held))
            cache.release(name)
            del held[name]
        else:
            tokens = rng.randint(1, 4 * GRID)
            if cache.reserve(f"r{number}", tokens):
                held[f"r{number}"] = -(-tokens // GRID)
            else:
                refused += 1
        pages = [page for name in held for page in cache.lease(name).kv_pages]
        assert len(set(pages)) == len(pages) == sum(held.values())
        assert cache.kv_pages.free == total[2] - len(pages)
        assert cache.state_slots.free == total[0] - 2 * len(held)
    for name in held:
        cache.release(name)
    assert free(cache) == total and refused
