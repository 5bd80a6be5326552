"""What goes first, what stays, and how the queue keeps order without looking at everything."""

from __future__ import annotations

import random

import pytest

from stateferry.cache.entries import Origin
from stateferry.cache.eviction import EvictionQueue, LruPolicy, ValuePolicy
from stateferry.prefix.prefix_hash import encode_tokens
from support.cache_user import SPACE, CacheUser, make_cache

KINDS = pytest.mark.parametrize("page_tokens", [None, 4])


def test_the_queue_gives_the_earliest_date_after_any_changes() -> None:
    rng, queue, dates = random.Random(2), EvictionQueue[str](), dict[str, float]()
    pops = 0
    for _ in range(5000):
        name, action = rng.choice("abcdefghij"), rng.random()
        if action < 0.6:
            dates[name] = rng.random()
            queue.put(name, dates[name])
        elif action < 0.8:
            dates.pop(name, None)
            queue.discard(name)
        else:
            item = queue.pop()
            assert (item is None) == (not dates)
            if item is not None:
                assert dates[item] == min(dates.values())
                del dates[item]
                pops += 1
        assert len(queue) == len(dates) and set(queue) == set(dates)
        # Ten names, and a bounded rest of what was changed.
        assert len(queue._heap) <= 2 * 10 + 66
    assert pops > 100


def test_the_queue_is_in_order() -> None:
    rng, queue = random.Random(3), EvictionQueue[int]()
    for number in range(100):
        queue.put(number, rng.random())
    dates = {number: rng.random() for number in range(100)}
    for number, date in dates.items():
        queue.put(number, date)
    assert [queue.pop() for _ in range(101)] == [*sorted(dates, key=dates.__getitem__), None]


def test_lru_looks_at_nothing_but_the_last_use() -> None:
    policy = LruPolicy()
    policy.evicted(100, 5, 0, Origin.TURN)
    policy.used(3, Origin.TURN)
    assert policy.date(7, 1000, 9, Origin.TURN) == policy.date(7, 1, 0, Origin.INTERVAL) == 7


def test_value_learns_what_memory_is_worth() -> None:
    """Before anything had to go it is LRU; then what saves more stays longer."""
    policy, origin = ValuePolicy(), Origin.PROMPT
    assert policy.date(7, 1000, 0, origin) == 7
    for _ in range(200):
        # As many are used as have to go.
        policy.used(0, origin)
        policy.evicted(age=50, saved_tokens=100, hits=0, origin=origin)
    assert policy.date(7, 100, 0, origin) == pytest.approx(57, abs=3)
    assert policy.date(7, 1000, 0, origin) > policy.date(7, 100, 0, origin) > 7
    before = policy.date(7, 100, 0, Origin.HINT)
    policy.evicted(age=10**9, saved_tokens=0, hits=0, origin=origin)
    assert policy.date(7, 100, 0, Origin.HINT) == before


def test_value_learns_which_kinds_are_used_again() -> None:
    policy = ValuePolicy()
    for _ in range(200):
        policy.evicted(50, 100, 0, Origin.INTERVAL)
        policy.used(0, Origin.BRANCH)
        # Turns go on once.
        policy.used(0, Origin.TURN)
        policy.evicted(50, 100, 1, Origin.TURN)
    dates = {
        (origin, hits): policy.date(0, 100, hits, origin)
        for origin in (Origin.INTERVAL, Origin.BRANCH, Origin.TURN)
        for hits in (0, 1)
    }
    assert dates[Origin.BRANCH, 0] > 10 * dates[Origin.INTERVAL, 0] > 0
    assert dates[Origin.TURN, 0] > 10 * dates[Origin.TURN, 1] > 0
    # Nothing is known of these yet.
    assert dates[Origin.TURN, 1] < dates[Origin.BRANCH, 1] < dates[Origin.BRANCH, 0]


def hits(worker: CacheUser, prompts: dict[str, list[int]]) -> set[str]:
    """Which prompts are still there to their last token but one."""
    found = set()
    for name, prompt in prompts.items():
        match = worker.cache.match(SPACE, encode_tokens(prompt))
        if match.position == len(prompt) - 1:
            found.add(name)
    return found


@KINDS
def test_lru_keeps_what_was_used_last(page_tokens: int | None) -> None:
    """Four slots, two of them for whoever runs; the one that was hit stays."""
    worker = CacheUser(make_cache(page_tokens=page_tokens, slots=4, eviction="lru"))
    prompts = {name: [ord(name)] * 6 for name in "abcd"}
    for name in "abc":
        worker.run(prompts[name], spare=0)
    worker.run(prompts["a"], spare=0)
    worker.run(prompts["d"], spare=0)
    assert hits(worker, prompts) == set("acd")
    assert worker.cache.counters.states_evicted == 1


@KINDS
def test_value_keeps_the_long_prompt_and_lru_does_not(page_tokens: int | None) -> None:
    """One prompt of 40 tokens, then many of 6, never asked for again. The long one's keys and
    values are all there for both: what differs is its state."""
    for eviction, stays in (("value", True), ("lru", False)):
        worker = CacheUser(
            make_cache(page_tokens=page_tokens, slots=8, pages=400, eviction=eviction)
        )
        short = ([n, n + 1, 1, 2, 3, 4] for n in range(100, 400))
        # Until it is learned what memory is worth, and that such prompts seldom come again.
        for _ in range(160):
            worker.run(next(short), spare=0)
        long = list(range(42))
        worker.run(long, spare=0)
        for _ in range(12):
            worker.run(next(short), spare=0)
        assert bool(hits(worker, {"long": long})) == stays, eviction


@KINDS
def test_a_session_keeps_its_last_turn_and_only_that(page_tokens: int | None) -> None:
    for session, stays in (("chat", True), (None, False)):
        worker = CacheUser(
            make_cache(page_tokens=page_tokens, slots=6, eviction="lru", session_pin_ticks=1000)
        )
        first, second = [1] * 9, [2] * 9
        worker.run(first, session=session, spare=0)
        worker.run(second, session=session, spare=0)
        for n in range(10, 20):
            worker.run([n] * 9, spare=0)
        assert hits(worker, {"first": first}) == set()
        assert bool(hits(worker, {"second": second})) == stays


def test_sessions_are_forgotten_when_there_are_too_many() -> None:
    worker = CacheUser(make_cache(slots=8, eviction="lru", session_pin_ticks=1000, max_sessions=2))
    prompts = {str(n): [n] * 9 for n in range(5)}
    for name, prompt in prompts.items():
        worker.run(prompt, session=name, spare=0)
    for n in range(10, 20):
        worker.run([n] * 9, spare=0)
    assert hits(worker, prompts) == {"3", "4"}


@KINDS
def test_a_path_keeps_no_more_states_than_it_may(page_tokens: int | None) -> None:
    """Shallow ones go; the deepest, forks and those with tails stay."""
    worker = CacheUser(make_cache(page_tokens=page_tokens, max_states_per_path=2))
    base = list(range(40))
    worker.run(base, interval=4, spare=20)
    assert worker.cache.occupancy()["state slot"].cached == 2
    match = worker.cache.match(SPACE, encode_tokens(base[:38]))
    assert match.position == 36 and worker.cache.counters.states_dropped == 8


@KINDS
def test_what_is_locked_stays_whatever_is_asked_for(page_tokens: int | None) -> None:
    worker = CacheUser(make_cache(page_tokens=page_tokens, slots=6, tails=4, pages=12))
    prompt = list(range(14))
    worker.run(prompt, spare=0)
    cache = worker.cache
    match = cache.match(SPACE, encode_tokens([*prompt, 1]))
    hold = cache.lock(match)
    assert match.position == 14
    assert cache.allocate("x", state_slots=6) is None
    assert cache.allocate("x", tail_pages=4) is None
    grant = cache.allocate("x", state_slots=5, tail_pages=3, kv_pages=8 if page_tokens else 0)
    assert grant is not None
    worker.check_match(cache.match(SPACE, encode_tokens([*prompt, 1])), (*prompt, 1))
    cache.release_tail(hold)
    assert cache.allocate("x", tail_pages=1) is not None
    assert cache.match(SPACE, encode_tokens([*prompt, 1])).position == 12
    cache.unlock(hold)
    assert cache.allocate("x", state_slots=1) is not None
    assert cache.match(SPACE, encode_tokens([*prompt, 1])).position == 0
    cache.check_conservation()


def test_a_state_may_go_while_its_keys_and_values_stay_but_not_the_other_way_round() -> None:
    worker = CacheUser(make_cache(slots=3, pages=8))
    prompt = list(range(20))
    worker.run(prompt, spare=0)
    cache = worker.cache
    grant = cache.allocate("x", state_slots=3)
    assert grant is not None
    match = cache.match(SPACE, encode_tokens([*prompt, 1]))
    assert (match.position, match.kv_tokens, match.branch_position) == (0, 20, 20)
    cache.free(state_slots=grant.state_slots)
    worker.run(prompt, spare=0)
    assert cache.match(SPACE, encode_tokens([*prompt, 1])).position == 20
    assert cache.allocate("x", kv_pages=4) is not None
    match = cache.match(SPACE, encode_tokens([*prompt, 1]))
    assert (match.position, match.kv_tokens) == (0, 16)
    assert cache.occupancy()["state slot"].cached == 0


def test_the_way_to_a_state_that_went_stays_while_somebody_is_on_it() -> None:
    """Without attention: the state that a sequence read is evicted after it read on; when the
    sequence ends, the tokens that lead nowhere now are forgotten."""
    worker = CacheUser(make_cache(page_tokens=None, slots=6))
    worker.run(range(8), spare=0)
    cache = worker.cache
    hold = cache.lock(cache.match(SPACE, encode_tokens([*range(8), 1])))
    cache.release_snapshot(hold)
    cache.clear()
    cache.check_conservation()
    worker.run(range(40, 48), spare=0)
    cache.unlock(hold)
    cache.check_conservation()
    cache.clear()
    assert not list(cache._prefixes.tree)


def test_pages_that_are_locked_are_not_counted_on() -> None:
    worker = CacheUser(make_cache(slots=20, pages=10))
    worker.run(range(16), spare=0)
    worker.run(range(50, 62), spare=0)
    cache = worker.cache
    hold = cache.lock(cache.match(SPACE, encode_tokens([*range(16), 1])))
    assert cache.occupancy()["KV page"].cached == 7
    assert cache.allocate("x", kv_pages=7) is None
    assert cache.occupancy()["KV page"].cached == 7
    assert cache.allocate("x", kv_pages=6) is not None
    assert cache.occupancy()["KV page"].cached == 4
    cache.unlock(hold)
    cache.check_conservation()


def test_handing_in_less_than_before_lets_go_of_nothing() -> None:
    """Found by the random machine. Without attention, a sequence that has no new state hands in no
    more than the root; what it reads is still locked, and so is the way to it."""
    worker = CacheUser(make_cache(page_tokens=None))
    _, sequence = worker.begin(range(10), spare=2)
    assert sequence is not None
    worker.compute(sequence, [4, 8])
    deep, shallow = sequence.states[1:], sequence.states[:1]
    for states in (deep, [], shallow, []):
        sequence.states = states
        worker.insert(sequence, goes_on=True)
        worker.cache.check_conservation()
        point = sequence.hold.point
        assert point is not None and point.position == 8
        worker.cache.clear()
        worker.cache.check_conservation()
        assert point.alive
    worker.cache.unlock(sequence.hold)
    worker.free_own(sequence)
    worker.cache.clear()
    assert all(pool.num_free == pool.total for pool in worker.cache.pools)
