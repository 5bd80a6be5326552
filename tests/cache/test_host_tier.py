"""What was evicted comes back from host memory, whole, and only as much as there is a place for."""

from __future__ import annotations

import random

import pytest

from stateferry.cache.cache_counters import CacheCounters
from stateferry.cache.host_tier import HostEntry, HostKey, HostStore
from stateferry.cache.page_copy import PageCopy
from stateferry.prefix.prefix_hash import encode_tokens, namespace_of
from support.cache_user import SPACE, CacheUser, make_cache

KINDS = pytest.mark.parametrize("page_tokens", [None, 4, 2])
GRID = 4


def user(page_tokens: int | None, budget: int = 1 << 20, **sizes: int) -> CacheUser:
    due: list[PageCopy] = []
    cache = make_cache(grid=GRID, page_tokens=page_tokens, copies=due, host_bytes=budget, **sizes)
    return CacheUser(cache, due)


def evict_all(worker: CacheUser) -> None:
    """And poison what is free now."""
    worker.cache.clear()
    worker.make_copies()
    worker.memory.slots.clear()
    worker.memory.tails.clear()
    worker.memory.pages.clear()
    assert worker.cache.match(SPACE, encode_tokens([1])).point is None


@KINDS
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 11, 30])
def test_a_prompt_that_was_evicted_comes_back_to_its_last_token(
    page_tokens: int | None, length: int
) -> None:
    worker = user(page_tokens)
    prompt = tuple(range(length))
    worker.run(prompt, final="end")
    evict_all(worker)
    assert worker.cache.restore(SPACE, encode_tokens(prompt)) == length
    worker.cache.check_conservation()
    # ``run`` looks at every byte of what is matched.
    match = worker.run(prompt)
    assert (match.position, match.final) == (length, "end")
    longer = (*prompt, 99)
    assert worker.cache.restore(SPACE, encode_tokens(longer)) == 0
    assert worker.run(longer).position == length


@KINDS
def test_what_is_still_there_is_not_copied(page_tokens: int | None) -> None:
    """Two prompts part after three intervals; only the second one's own part was evicted."""
    worker = user(page_tokens)
    base = tuple(range(12))
    worker.run(base, final="base")
    worker.run((*base, *range(50, 60)), final="end")
    worker.cache.lock(worker.cache.match(SPACE, encode_tokens([*base, 99])))
    worker.cache.clear()
    before = worker.cache.match(SPACE, encode_tokens([*base, *range(50, 60)])).position
    assert before == 12
    assert worker.cache.restore(SPACE, encode_tokens([*base, *range(50, 60)])) == 10
    c = worker.cache.counters
    assert (c.states_restored, c.tails_restored) == (1, 1)
    assert c.kv_pages_restored == (0 if not page_tokens else 10 // page_tokens + (page_tokens == 4))
    assert worker.run((*base, *range(50, 60))).final == "end"


@KINDS
def test_a_state_on_the_host_is_not_taken_for_one_of_other_tokens(page_tokens: int | None) -> None:
    """Two prompts of the same length part inside; one is on the host, the other still here, and the
    first is asked for to its end."""
    worker = user(page_tokens)
    base, length = tuple(range(6)), 16
    ours, theirs = ((*base, *range(n, n + length - 6)) for n in (100, 200))
    worker.run(ours, final="ours")
    evict_all(worker)
    worker.run(theirs, final="theirs")
    assert worker.cache.restore(SPACE, encode_tokens(ours)) == length
    assert worker.run(ours).final == "ours" and worker.run(theirs).final == "theirs"


@KINDS
def test_other_tenants_get_nothing(page_tokens: int | None) -> None:
    worker = user(page_tokens)
    worker.run(range(11))
    evict_all(worker)
    theirs = namespace_of(("other", "weights", "layout"))
    assert worker.cache.restore(theirs, encode_tokens(range(11))) == 0
    worker.cache.check_conservation()
    assert not list(worker.cache._prefixes.tree)


@KINDS
def test_without_a_place_nothing_comes_back_and_nothing_breaks(page_tokens: int | None) -> None:
    worker = user(page_tokens, slots=12, tails=2, pages=8)
    worker.run(range(11), spare=0)
    evict_all(worker)
    grant = worker.cache.allocate("busy", state_slots=12)
    assert grant is not None
    assert worker.cache.restore(SPACE, encode_tokens(range(11))) == 0
    worker.cache.check_conservation()
    worker.cache.free(state_slots=grant.state_slots)
    assert worker.cache.restore(SPACE, encode_tokens(range(11))) == 10


def entry(size_bytes: int) -> HostEntry:
    return HostEntry((), size_bytes, 1, {})


def test_a_budget_is_kept_by_dropping_what_was_used_least_recently() -> None:
    counters = CacheCounters()
    store = HostStore(10, counters)
    keys = [HostKey("state", bytes([n])) for n in range(4)]
    for key in keys[:3]:
        assert store.put(key, entry(3))
    assert store.get(keys[0]) is not None
    assert store.put(keys[3], entry(4))
    assert [store.has(key) for key in keys] == [True, False, True, True]
    assert store.used_bytes == 10
    assert not store.put(keys[1], entry(11))
    assert not store.has(keys[1]) and store.used_bytes == 10
    assert counters.host_moved_out_bytes - counters.host_dropped_bytes == store.used_bytes


def test_tails_are_found_by_where_they_begin() -> None:
    store = HostStore(2, CacheCounters())
    for tokens in (b"aaaa", b"bbbb", b"cccc"):
        assert store.put(HostKey("tail", b"h", tokens), entry(1))
    assert sorted(store.tails_at(b"h")) == [b"bbbb", b"cccc"] and not store.tails_at(b"x")


@KINDS
def test_what_moved_out_once_is_not_copied_again(page_tokens: int | None) -> None:
    worker = user(page_tokens)
    prompt = tuple(range(11))
    worker.run(prompt, final="end")
    evict_all(worker)
    before = worker.cache.counters.host_moved_out_bytes
    assert worker.cache.restore(SPACE, encode_tokens(prompt)) == 11
    worker.make_copies()
    worker.cache.clear()
    assert not worker.due
    assert worker.cache.counters.host_moved_out_bytes == before
    assert worker.cache.counters.states_moved_out == worker.cache.counters.tails_moved_out == 1


@KINDS
@pytest.mark.parametrize("length", [8, 10])
def test_what_was_computed_again_gets_back_what_follows_from_it(
    page_tokens: int | None, length: int
) -> None:
    """The prompt's end went to the host with what token comes next; a longer prompt passed it
    again and left the same place without."""
    worker = user(page_tokens)
    longer = tuple(range(11))
    worker.run(longer[:length], final="next")
    evict_all(worker)
    worker.run(longer, interval=GRID)
    assert worker.cache.match(SPACE, encode_tokens(longer[:length])).position < length
    places = worker.cache.occupancy()
    gained = worker.cache.restore(SPACE, encode_tokens(longer[:length]))
    assert gained and not worker.due and worker.cache.occupancy() == places
    worker.cache.check_conservation()
    assert worker.run(longer[:length]).final == "next"


@KINDS
@pytest.mark.parametrize("seed", range(3))
def test_random_prompts_over_little_memory(page_tokens: int | None, seed: int) -> None:
    """A device for a few prompts, a host for more: all bytes right, budgets kept."""
    rng = random.Random(seed)
    worker = user(page_tokens, budget=400, slots=6, tails=3, pages=24)
    texts: list[tuple[int, ...]] = [(0,)]
    restored = 0
    for _ in range(400):
        text = rng.choice(texts)
        cut = rng.choice((len(text), rng.randint(0, len(text))))
        suffix = tuple(rng.choices((0, 1), k=rng.choice((0, 0, 1, 3, 6))))
        prompt = (text[:cut] + suffix)[:40] or (1,)
        texts = [*texts[-30:], prompt]
        restored += worker.cache.restore(SPACE, encode_tokens(prompt))
        worker.cache.check_conservation()
        worker.run(prompt, final=("after", prompt), spare=1)
        host, counters = worker.cache.host, worker.cache.counters
        assert host is not None and host.used_bytes <= 400
        assert host.used_bytes == counters.host_moved_out_bytes - counters.host_dropped_bytes
    assert restored and counters.tails_restored and counters.states_restored
    assert counters.host_dropped_bytes
