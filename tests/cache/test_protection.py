"""What is evicted last: how much of it, for how long, and never at the cost of who has to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from stateferry.cache.hybrid_cache import CacheOptions
from stateferry.cache.reuse import Reuse
from stateferry.cache.state_cache import StateCache
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.prefix.state_tracking import StateStrategy, StateTracking
from support.small_cache import GRID, KV, small_cache

GREEDY = SamplingParams(0.0, 0, 1.0, 0, None)


class Clock:
    now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s


class Worker:
    """Prompts that are computed and left, one after the other."""

    def __init__(
        self,
        *,
        sequences: int = 1,
        cache_bytes: int = 200_000,
        strategy: StateStrategy = StateStrategy.EXTRA_BUFFER,
        **options: object,
    ) -> None:
        plain = small_cache(sequences, kv=KV, max_context_tokens=8 * GRID, cache_bytes=cache_bytes)
        tracking = StateTracking(strategy, GRID, GRID)
        wanted = CacheOptions(eviction="lru", **options)  # type: ignore[arg-type]
        reuse = Reuse(True, "w", "l", tracking, options=wanted)
        self.cache = StateCache(plain.pools, plain.sizes, reuse)
        self.clock = Clock()
        self.cache.prefixes.protection._now_s = self.clock.monotonic_s
        self._number = 0

    def ask(self, ids: tuple[int, ...], session: str = "", salt: str = "t/") -> GenerationRequest:
        self._number += 1
        stop = StopConditions(4, 0, frozenset())
        return GenerationRequest(
            f"r{self._number}", ids, GREEDY, stop, cache_salt=salt, session=session
        )

    def begin(self, request: GenerationRequest) -> bool:
        known = self.cache.resume(request, request.total_tokens)
        if known is None:
            return False
        self.cache.lease(request.request_id).advance(request.prompt_len - known, GRID)
        return True

    def run(self, ids: tuple[int, ...], session: str = "", salt: str = "t/") -> None:
        request = self.ask(ids, session, salt)
        assert self.begin(request)
        self.cache.release(request.request_id)
        self.cache.check_conserved()

    def flood(self, count: int = 150) -> None:
        for number in range(count):
            self.run(tuple(range(1000 + 40 * number, 1040 + 40 * number)))

    def known(self, ids: tuple[int, ...], salt: str = "t/") -> int:
        return self.cache.resumable_tokens(self.ask((*ids, 9), salt=salt))

    @property
    def counts(self) -> Mapping[str, int]:
        c = self.cache.prefixes.counters
        return {
            "begun": c.protections_begun,
            "ended": c.protections_ended,
            "expired": c.protections_expired,
            "over": c.protections_over_budget,
            "evicted": c.protected_evicted,
        }


def words(first: int, length: int = 2 * GRID + 5) -> tuple[int, ...]:
    return tuple(range(first, first + length))


def test_a_sessions_last_turn_outlives_a_flood_and_others_do_not() -> None:
    worker = Worker()
    worker.run(words(100), "chat")
    worker.run(words(200))
    worker.run(words(300), "chat", salt="t/other")
    worker.flood()
    assert worker.known(words(100)) == len(words(100))
    assert worker.known(words(200)) == 0
    assert worker.known(words(300), "t/other") == len(words(300)), "another session of that name"
    assert worker.counts["evicted"] == 0 and worker.cache.prefixes.counters.states_evicted > 20


def test_a_turn_takes_the_place_of_the_one_before() -> None:
    worker = Worker()
    worker.run(words(100), "chat")
    worker.run(words(500), "chat")
    assert len(worker.cache.prefixes.protection) == 1 and worker.counts["ended"] == 1
    worker.flood()
    assert worker.known(words(100)) == 0 and worker.known(words(500))


def test_it_becomes_too_old() -> None:
    worker = Worker(session_ttl_s=100.0)
    worker.run(words(100), "old")
    worker.clock.now_s = 50.0
    worker.run(words(200), "young")
    worker.clock.now_s = 120.0
    worker.flood()
    assert worker.known(words(100)) == 0 and worker.known(words(200))
    assert worker.counts["expired"] == 1
    # The same prompt again computes nothing, and makes it young again.
    worker.run(words(200), "young")
    worker.clock.now_s = 190.0
    worker.flood()
    assert worker.known(words(200)) and worker.counts["expired"] == 1


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_of_more_than_the_budget_the_newest_stay(share: float) -> None:
    worker = Worker(session_share=share)
    total = worker.cache.prefixes.pools.state_slots.total
    for number in range(20):
        worker.run(words(100 * number + 20_000), f"s{number}")
    kept = len(worker.cache.prefixes.protection)
    assert worker.counts["over"] == 20 - kept
    assert kept <= share * total and bool(kept) == bool(share)
    worker.flood()
    known = [worker.known(words(100 * number + 20_000)) for number in range(20)]
    assert [bool(tokens) for tokens in known] == [False] * (20 - kept) + [True] * kept
    # Tail pages are fewer: the oldest have kept the state before theirs alone.
    assert sorted(known) == known
    assert not share or {2 * GRID, 2 * GRID + 5} == set(known) - {0}


def test_who_has_to_run_gets_what_is_protected() -> None:
    worker = Worker(sequences=2, cache_bytes=0, session_share=1.0)
    worker.run(words(100, 7 * GRID), "chat")
    assert len(worker.cache.prefixes.protection) == 1
    requests = [worker.ask(words(1000 * n, 7 * GRID)) for n in (1, 2)]
    for request in requests:
        assert worker.begin(request), "kept waiting for what is only cached"
    assert worker.counts["evicted"] and worker.known(words(100, 7 * GRID)) == 0
    for request in requests:
        worker.cache.release(request.request_id)
    worker.cache.check_conserved()


def test_a_snapshot_that_need_not_be_takes_no_protected_place() -> None:
    """The copy of a prompt's end, for which a page was to be had, but for the session."""
    for session, is_kept in (("chat", True), ("", False)):
        worker = Worker(session_share=1.0)
        pages = worker.cache.prefixes.pools.tail_pages.total
        for number in range(pages):
            worker.run(words(1000 * number + 100, 5), f"{session}{number}" if session else "")
        request = worker.ask(words(50_000, 5))
        assert worker.begin(request)
        before = worker.cache.prefixes.counters.tails_evicted
        worker.cache.publish(request.request_id)
        assert (worker.cache.prefixes.counters.tails_evicted == before) == is_kept
        worker.cache.release(request.request_id)
        worker.cache.check_conserved()


@pytest.mark.parametrize("strategy", list(StateStrategy))
def test_a_parked_sequence_finds_its_end_again(strategy: StateStrategy) -> None:
    """Whatever decode leaves otherwise; protected until it is back, or is never to come back."""
    worker = Worker(strategy=strategy)
    request = worker.ask(words(100))
    assert worker.begin(request)
    worker.cache.publish(request.request_id)
    worker.cache.lease(request.request_id).advance(1, GRID)
    worker.cache.consumed(request.request_id, 7)
    worker.cache.park(request.request_id)
    worker.flood()
    again = replace(request, prompt_ids=(*request.prompt_ids, 7, 8), num_output_ids=2)
    assert worker.cache.resume(again, again.total_tokens) == request.prompt_len + 1
    assert not len(worker.cache.prefixes.protection)
    worker.cache.lease(request.request_id).advance(1, GRID)
    worker.cache.park(request.request_id)
    assert len(worker.cache.prefixes.protection) == 1
    worker.cache.forget(request.request_id)
    assert not len(worker.cache.prefixes.protection)
    worker.cache.check_conserved()


def test_room_is_seen_that_those_who_leave_would_give() -> None:
    worker = Worker(sequences=2, cache_bytes=0)
    whole = 8 * GRID
    long = [replace(worker.ask(words(1000 * n, whole - 4))) for n in (1, 2)]
    assert worker.begin(long[0])
    cache, first = worker.cache, long[0].request_id
    has_both = worker.begin(long[1])
    names = {request.request_id for request in long[: 1 + has_both]}
    assert not cache.fits_without(whole, set()) or not has_both
    assert cache.fits_without(whole, names) and cache.fits_without(whole, {first})
    for name in names:
        cache.release(name)
    cache.check_conserved()
