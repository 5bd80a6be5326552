"""What a request's lease shares with the cache, leaves to it, and never does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stateferry.cache.lease import SequenceLease
from stateferry.cache.reuse import Reuse
from stateferry.cache.slots import CACHE_OWNER
from stateferry.cache.state_cache import StateCache
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.prefix.state_tracking import StateStrategy, StateTracking
from stateferry_kernels.kv_layer import KvGeometry
from stateferry_kernels.layer_state import ZERO_SLOT
from support.small_cache import GRID, KV, NO_KV, small_cache

FINAL = object()


def reuse(strategy: StateStrategy = StateStrategy.EXTRA_BUFFER, interval: int = 0) -> Reuse:
    return Reuse(
        is_on=True,
        weights="w",
        layout="l",
        tracking=StateTracking(strategy, GRID, GRID),
        interval=interval,
    )


def cache_of(
    kv: KvGeometry = KV,
    rules: Reuse | None = None,
    sequences: int = 4,
    cache_bytes: int = 120_000,
) -> StateCache:
    plain = small_cache(
        max_sequences=sequences, kv=kv, max_context_tokens=8 * GRID, cache_bytes=cache_bytes
    )
    return StateCache(plain.pools, plain.sizes, rules or reuse())


def prompt(name: str, length: int, salt: str = "", first: int = 0) -> GenerationRequest:
    ids = (first, *range(1, length))
    sampling = SamplingParams(0.0, 0, 1.0, 0, None)
    stop = StopConditions(1, 0, frozenset())
    return GenerationRequest(name, ids, sampling, stop, cache_salt=salt)


def compute(cache: StateCache, request: GenerationRequest) -> SequenceLease:
    """The rest of a prompt, as a runner would."""
    lease = cache.lease(request.request_id)
    lease.advance(request.prompt_len - lease.position, GRID)
    lease.final = FINAL
    return lease


def run(cache: StateCache, request: GenerationRequest) -> int:
    """From admission to the end; returns what was resumed."""
    resumed = cache.resume(request, request.prompt_len)
    assert resumed is not None
    compute(cache, request)
    cache.release(request.request_id)
    cache.check_conserved()
    return resumed


KINDS = pytest.mark.parametrize("kv", [NO_KV, KV])


@KINDS
def test_a_prompt_again(kv: KvGeometry) -> None:
    cache = cache_of(kv)
    assert run(cache, prompt("a", 2 * GRID + 5)) == 0
    assert cache.resume(prompt("b", 2 * GRID + 5), 3 * GRID) == 2 * GRID + 5
    lease = cache.lease("b")
    assert lease.final is FINAL
    # It may write from its first step on: what it reads of the end is its own copy.
    kinds = [copy.kind for copy in cache.take_copies()]
    assert kinds == ["tail", "kv"] if kv is KV else ["tail"]
    assert cache.take_copies() == ()
    # The state it reads is the cache's; the two that it writes are not.
    assert lease.state_slot not in (*lease.slots, ZERO_SLOT)
    cache.release("b")
    cache.check_conserved()


@KINDS
@pytest.mark.parametrize("change", [{"salt": "other"}, {"first": 9}])
def test_other_tenants_and_other_tokens_find_nothing(
    kv: KvGeometry, change: dict[str, object]
) -> None:
    cache = cache_of(kv)
    run(cache, prompt("a", 3 * GRID))
    assert run(cache, prompt("b", 3 * GRID, **change)) == 0  # type: ignore[arg-type]


@KINDS
def test_a_scored_prompt_is_computed_whole(kv: KvGeometry) -> None:
    cache = cache_of(kv)
    run(cache, prompt("a", 3 * GRID))
    assert cache.resume(replace(prompt("b", 3 * GRID), scores=object()), 3 * GRID) == 0
    assert cache.resumed_tokens("b") == 0


@KINDS
def test_what_is_spoilt_is_not_kept(kv: KvGeometry) -> None:
    cache = cache_of(kv)
    request = prompt("a", 3 * GRID)
    assert cache.resume(request, request.prompt_len) == 0
    compute(cache, request)
    cache.spoil("a")
    cache.publish("a")
    cache.lease("a").advance(1, GRID)
    cache.consumed("a", 7)
    cache.release("a")
    cache.check_conserved()
    assert run(cache, prompt("b", 3 * GRID)) == 0


@KINDS
def test_a_cut_off_prompt_leaves_what_was_computed(kv: KvGeometry) -> None:
    cache = cache_of(kv)
    request = prompt("a", 4 * GRID)
    assert cache.resume(request, request.prompt_len) == 0
    cache.lease("a").advance(2 * GRID, GRID)
    cache.release("a")
    cache.check_conserved()
    assert run(cache, prompt("b", 4 * GRID)) == 2 * GRID


@KINDS
def test_a_published_state_is_read_on_and_written_no_more(kv: KvGeometry) -> None:
    cache = cache_of(kv)
    request = prompt("a", 2 * GRID)
    assert cache.resume(request, 5 * GRID) == 0
    lease = compute(cache, request)
    before = lease.state_slot
    cache.publish("a")
    cache.check_conserved()
    assert lease.state_slot == before and before not in lease.slots
    # It decodes past two grid points, each tracked, and none of its places is a cached one.
    for token in range(2 * GRID):
        [*writes] = lease.writes(1, GRID)
        cached = {
            slot
            for slot, owner in cache.prefixes.pools.state_slots.owners().items()
            if owner != "a"
        }
        assert not {slot for _, slot in writes} & cached
        lease.advance(1, GRID)
        cache.consumed("a", token)
        cache.check_conserved()
    assert cache.prefixes.counters.states_inserted == 3
    cache.release("a")
    cache.check_conserved()


def test_a_shared_tail_can_be_evicted_while_its_sequence_goes_on() -> None:
    """It is a copy: the sequence does not read it, and must not keep it."""
    cache = cache_of()
    before = cache.prefixes.obtainable_tails
    request = prompt("a", 2 * GRID + 5)
    assert cache.resume(request, 5 * GRID) == 0
    compute(cache, request)
    cache.publish("a")
    assert {"a", CACHE_OWNER} == set(cache.prefixes.pools.tail_pages.owners().values())
    assert cache.prefixes.obtainable_tails == before - 1


@KINDS
@pytest.mark.parametrize("strategy", list(StateStrategy))
def test_strategies(kv: KvGeometry, strategy: StateStrategy) -> None:
    """What a sequence of 2 grid intervals that decodes 1.5 more leaves behind."""
    cache = cache_of(kv, reuse(strategy))
    request = prompt("a", 2 * GRID)
    cache.resume(request, 4 * GRID)
    lease = compute(cache, request)
    cache.publish("a")
    for token in range(GRID + GRID // 2):
        lease.advance(1, GRID)
        cache.consumed("a", 1000 + token)
    cache.release("a")
    tokens = (*request.prompt_ids, *range(1000, 1000 + GRID + GRID // 2), 7)
    longer = replace(request, request_id="b", prompt_ids=tokens)
    expected = 2 * GRID if strategy is StateStrategy.OFF else len(tokens) - 1
    assert run(cache, longer) == expected


@KINDS
@pytest.mark.parametrize("decoded", [1, GRID - 2, GRID - 1, GRID, GRID + 1, 2 * GRID - 1])
@pytest.mark.parametrize("strategy", [StateStrategy.EXTRA_BUFFER, StateStrategy.NO_BUFFER])
def test_a_step_too_many_changes_nothing_that_is_kept(
    kv: KvGeometry, decoded: int, strategy: StateStrategy
) -> None:
    """Steps overlap: each is planned before the one before it has come back, and the last one of
    them nobody wanted, whatever grid point it has passed."""
    kept = []
    for late in (0, 1):
        cache = cache_of(kv, reuse(strategy))
        request = prompt("a", 2 * GRID)
        assert cache.resume(request, 5 * GRID) == 0
        lease = compute(cache, request)
        cache.publish("a")
        lease.advance(late, GRID)
        for token in range(1000, 1000 + decoded):
            lease.advance(1, GRID)
            cache.consumed("a", token)
            cache.check_conserved()
        assert lease.position == 2 * GRID + decoded + late
        end = lease.state_slot
        cache.release("a")
        cache.check_conserved()
        tokens = (*request.prompt_ids, *range(1000, 1000 + decoded), 7)
        assert (
            cache.resume(replace(request, request_id="b", prompt_ids=tokens), 5 * GRID) is not None
        )
        again = cache.lease("b")
        assert again.position == len(tokens) - 1
        if (2 * GRID + decoded + late) % GRID == 0 and late:
            assert again.state_slot != end, "the step too many passed a grid point"
        kept.append((cache.prefixes.counters.states_inserted, cache.prefixes.occupancy()))
    assert kept[0] == kept[1]


@KINDS
@pytest.mark.parametrize("decoded", range(GRID - 3, GRID + 2))
def test_two_steps_that_nobody_wanted(kv: KvGeometry, decoded: int) -> None:
    """Cut off while two steps are in flight. Where the first of them fills the tail, the second one
    writes over its beginning: no token of that tail may be resumed from."""
    cache = cache_of(kv, reuse(StateStrategy.NO_BUFFER))
    request = prompt("a", 2 * GRID)
    assert cache.resume(request, 5 * GRID) == 0
    lease = compute(cache, request)
    cache.publish("a")
    for token in range(1000, 1000 + decoded):
        lease.advance(1, GRID)
        cache.consumed("a", token)
    lease.advance(1, GRID)
    lease.advance(1, GRID)
    cache.release("a")
    cache.check_conserved()
    tokens = (*request.prompt_ids, *range(1000, 1000 + decoded), 7)
    assert run(cache, replace(request, request_id="b", prompt_ids=tokens)) == (
        2 * GRID if decoded == GRID - 1 else 2 * GRID + decoded
    )


def test_without_room_states_are_skipped_and_counted() -> None:
    """Every slot belongs to a running sequence: nothing can be given away, nothing breaks."""
    cache = cache_of(KV, sequences=2, cache_bytes=0)
    requests = [prompt(name, 2 * GRID, first=n) for n, name in enumerate("ab")]
    for request in requests:
        assert cache.resume(request, 3 * GRID) == 0
    for request in requests:
        compute(cache, request)
        cache.publish(request.request_id)
        cache.check_conserved()
    assert cache.prefixes.counters.snapshots_skipped >= 2
    assert cache.prefixes.counters.states_inserted == 0
    for request in requests:
        cache.release(request.request_id)
    cache.check_conserved()
    assert run(cache, prompt("c", 2 * GRID + 1)) == 2 * GRID


def test_snapshots_never_keep_a_sequence_waiting() -> None:
    """A long prompt that wants many states, and as many others as there are seats."""
    rules = reuse(interval=GRID)
    for spare in (0, 3):
        cache = cache_of(KV, rules, sequences=4)
        slots = cache.prefixes.pools.state_slots
        extra = slots.total - 8 - spare
        assert cache.prefixes.allocate("somebody", state_slots=extra) is not None
        for n, name in enumerate("abcd"):
            assert cache.resume(prompt(name, 8 * GRID, first=n), 8 * GRID) == 0
        assert len(cache.lease("a").snapshot_slots) == spare
        assert cache.resume(prompt("e", GRID), GRID) is None
        assert cache.prefixes.counters.snapshots_skipped == 4 * 7 - spare


def test_a_shared_beginning_is_resumed_when_it_is_first_met_again() -> None:
    """A beginning that two prompts share, with long and different ends: while there is free memory
    nobody has to say where it ends, and once there is none, nothing goes for it."""
    rules = replace(reuse(), free_interval=2 * GRID)
    cache = cache_of(KV, rules)
    shared = tuple(range(5 * GRID + 7))

    def request(name: str, first: int) -> GenerationRequest:
        ids = (*shared, *range(first, first + 2 * GRID))
        return replace(prompt(name, 1), prompt_ids=ids)

    assert run(cache, request("a", 1000)) == 0
    assert run(cache, request("b", 2000)) == 4 * GRID
    full = cache_of(KV, rules)
    slots = full.prefixes.pools.state_slots
    assert full.prefixes.allocate("somebody", state_slots=slots.total - 8) is not None
    for number, name in enumerate("ab", start=1):
        assert full.resume(request(name, 1000 * number), 8 * GRID) == 0
        assert not full.lease(name).snapshot_slots
        compute(full, request(name, 1000 * number))
        full.release(name)
    # Where they part, which is missed, and not what was only welcome.
    assert full.prefixes.counters.snapshots_skipped == 1


def test_reuse_can_be_off() -> None:
    cache = small_cache(max_sequences=4, kv=KV, max_context_tokens=8 * GRID)
    assert run(cache, prompt("a", 3 * GRID)) == 0
    assert run(cache, prompt("b", 3 * GRID)) == 0
    assert cache.prefixes.counters.lookups == 0


@pytest.mark.parametrize(
    ("length", "interval", "most", "expected"),
    [(100, 64, 16, 64), (3200, 64, 16, 208), (100, 0, 16, 0), (100, 64, 0, 0)],
)
def test_long_prompts_get_wider_intervals(
    length: int, interval: int, most: int, expected: int
) -> None:
    rules = replace(reuse(interval=interval), max_snapshots=most)
    assert rules.spread(interval, length) == expected


@KINDS
@pytest.mark.parametrize("length", [GRID + 3, 2 * GRID, 4 * GRID])
def test_memory_for_one_sequence_is_enough_for_one_that_was_there_before(
    kv: KvGeometry, length: int
) -> None:
    """What it would resume from, and its own, are more than there is: it is computed instead of
    waiting for ever."""
    cache = cache_of(kv, sequences=1, cache_bytes=0)
    for name in ("a", "b", "c"):
        assert run(cache, prompt(name, length)) in (0, length)
        cache.check_conserved()


@KINDS
def test_without_snapshots_not_even_a_branch_is_kept(kv: KvGeometry) -> None:
    cache = cache_of(kv, replace(reuse(), max_snapshots=0))
    stem = tuple(range(2 * GRID))
    for number in range(3):
        request = prompt(f"r{number}", 4 * GRID)
        own = tuple(range(1000 * number + 500, 1000 * number + 500 + 2 * GRID))
        cache.resume(replace(request, prompt_ids=(*stem, *own)), 4 * GRID)
        assert not cache.lease(request.request_id).snapshot_slots
        compute(cache, request)
        cache.release(request.request_id)
