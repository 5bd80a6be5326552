"""Long prompts cost what their length says, not its square."""

from __future__ import annotations

import random
import time

import pytest

from stateferry.cache.insertion import Computed
from stateferry.prefix.prefix_hash import encode_tokens
from stateferry.prefix.radix_tree import RadixTree
from support.cache_user import SPACE, make_cache

GRID = 64


class CountedBytes(bytes):
    """Counts the bytes that anybody looks at in it."""

    seen = 0

    def __getitem__(self, item: object) -> bytes:  # type: ignore[override]
        part = bytes.__getitem__(self, item)  # type: ignore[index]
        type(self).seen += len(part)
        return part

    def startswith(self, prefix: bytes, at: int = 0) -> bool:  # type: ignore[override]
        type(self).seen += len(prefix)
        return bytes.startswith(self, prefix, at)


@pytest.mark.parametrize("units", [1000, 4000])
def test_a_walk_looks_at_every_byte_a_few_times(units: int) -> None:
    """Also where it ends in the middle of a node."""
    tree: RadixTree[int, int] = RadixTree(GRID * 4)
    rng = random.Random(1)
    key = encode_tokens([rng.randrange(1 << 20) for _ in range(units * GRID)])
    tree.grow(tree.plant(SPACE), key)
    root = tree.plant(SPACE)
    for end in (units, units - 1, units // 2 + 7, 1):
        other = CountedBytes(key[: end * GRID * 4] + b"\xff" * GRID * 4)
        CountedBytes.seen = 0
        assert tree.walk(root, other, units).units == end
        assert CountedBytes.seen <= 3 * len(other) + 100 * GRID * 4


@pytest.mark.parametrize("page_tokens", [None, GRID])
def test_four_times_the_tokens_take_about_four_times_as_long(page_tokens: int | None) -> None:
    """Best of five; sixteen times would be quadratic."""
    took = {}
    for units in (400, 1600):
        cache = make_cache(grid=GRID, page_tokens=page_tokens, pages=4000, slots=64)
        grant = cache.allocate("r", state_slots=1, kv_pages=units if page_tokens else 0)
        assert grant is not None
        key = encode_tokens(random.Random(1).choices(range(50_000), k=units * GRID))
        state = cache.state_handle(grant.state_slots[0], units * GRID).written(1)
        cache.insert(Computed(SPACE, key, "r", grant.kv_pages, (state,)))
        times = []
        for _ in range(5):
            began = time.perf_counter()
            match = cache.match(SPACE, key + b"more")
            cache.unlock(cache.lock(match))
            times.append(time.perf_counter() - began)
            assert match.position == units * GRID
        took[units] = min(times)
    assert took[1600] < 10 * took[400], took
