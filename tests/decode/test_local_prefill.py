"""Prompts that run on a decode worker: which ones, and what may reach the cache through them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import pytest
import pytest_asyncio

from stateferry.cache.state_cache import StateCache
from stateferry.core.clock import SystemClock
from stateferry.core.errors import InvariantViolation
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.decode.local_prefill import LocalPrefill
from stateferry.decode.loop import DecodeLoop
from stateferry.scheduler.decode import DecodeScheduler
from support.running_decode import entered, extended_tokens, reusing_cache, running_loop
from support.scripted_runner import Gate, NullMeter, ScriptedRunner
from support.small_cache import GRID

LIMIT = 10
FIRST = 5


def ask(name: str, ids: tuple[int, ...], salt: str = "", max_tokens: int = 4) -> GenerationRequest:
    stop = StopConditions(max_tokens, 0, frozenset())
    return GenerationRequest(name, ids, SamplingParams(0.0, 0, 1.0, 0, None), stop, cache_salt=salt)


@dataclass
class Bench:
    loop: DecodeLoop
    prompts: LocalPrefill
    scheduler: DecodeScheduler
    runner: ScriptedRunner
    cache: StateCache

    async def hand_in(
        self, request: GenerationRequest, *, until_end: bool = True
    ) -> tuple[int, ...]:
        """As when a prefill worker sends the state of the prompt; what was consumed in the end."""
        name, taken = request.request_id, []
        self.loop.admit(name, request.total_tokens)
        try:
            await self.loop.reserved(name)
            self.cache.lease(name).adopt(request.prompt_len, GRID)
            if not until_end:
                return request.prompt_ids
            self.cache.adopt(name, request)
            async for step in self.loop.decode(request.continuation, FIRST):
                taken.append(step.token.token_id)
        finally:
            self.loop.abort(name)
        self.cache.check_conserved()
        return (*request.prompt_ids, FIRST, *taken[:-1])

    async def run(self, request: GenerationRequest) -> int:
        """A prompt that runs here, to its end; how much of it was known."""
        name = request.request_id
        assert self.prompts.begin(request)
        try:
            ran = await self.prompts.run(request)
            self.prompts.hand_over(name)
            steps = self.loop.take_over(request.continuation, ran.token.token_id)
            assert [s.index async for s in steps] == list(range(1, request.stop.max_tokens))
            return ran.resumed_tokens
        finally:
            self.prompts.abort(name)
            self.loop.abort(name)
            self.cache.check_conserved()

    def known(self, ids: tuple[int, ...], salt: str = "") -> int:
        return self.cache.resumable_tokens(ask("?", ids, salt))


@pytest_asyncio.fixture(params=[1, 2])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    async with running_bench(request.param, max_sequences=3, cache_bytes=200_000) as made:
        yield made


@contextlib.asynccontextmanager
async def running_bench(
    max_in_flight: Literal[1, 2], *, max_sequences: int, cache_bytes: int
) -> AsyncIterator[Bench]:
    cache = reusing_cache(max_sequences, max_context_tokens=8 * GRID, cache_bytes=cache_bytes)
    runner = ScriptedRunner()
    scheduler = DecodeScheduler(cache, max_waiting=3, max_in_flight=max_in_flight)
    async with running_loop(scheduler, cache, runner, NullMeter()) as loop:
        prompts = LocalPrefill(
            cache,
            runner,  # type: ignore[arg-type]
            loop,
            scheduler,
            SystemClock(),
            NullMeter(),
            limit_tokens=LIMIT,
        )
        yield Bench(loop, prompts, scheduler, runner, cache)
    assert not prompts._held


def fresh(length: int, first: int = 100) -> tuple[int, ...]:
    return tuple(range(first, first + length))


@pytest.mark.parametrize("length", [1, 3, GRID - 1, GRID, GRID + 1, 2 * GRID + 5])
@pytest.mark.parametrize("max_tokens", [2, 4, GRID, GRID + 3])
async def test_the_next_turn_resumes_at_the_last_token_consumed(
    bench: Bench, length: int, max_tokens: int
) -> None:
    consumed = await bench.hand_in(ask("a", fresh(length), max_tokens=max_tokens))
    assert len(consumed) == length + max_tokens - 1
    # The last token was sampled and never consumed: no state has seen it.
    turn = (*consumed, 7, 9)
    assert bench.known(turn) == len(consumed)
    if len(consumed) < 2:
        return
    assert await bench.run(ask("b", turn)) == len(consumed)
    assert extended_tokens(bench.runner) == [2]
    assert bench.known((*turn, 7, 7, 7, 1)) == len(turn) + 3


async def test_the_prompt_itself_is_known_as_soon_as_it_is_here(bench: Bench) -> None:
    gate = Gate()
    bench.runner.before = gate
    ids = fresh(GRID + 5)
    running = asyncio.ensure_future(bench.hand_in(ask("a", ids)))
    await entered(gate)
    assert bench.known((*ids, 1)) == len(ids)
    gate.open()
    await running


async def test_a_state_that_never_came_is_not_known(bench: Bench) -> None:
    """Reserved and given up before, or while, it arrives."""
    ids = fresh(GRID + 5)
    await bench.hand_in(ask("a", ids), until_end=False)
    assert bench.known((*ids, 1)) == 0


async def test_nobody_knows_what_was_sent_with_another_salt(bench: Bench) -> None:
    consumed = await bench.hand_in(ask("a", fresh(GRID + 5), salt="t/1"))
    assert bench.known((*consumed, 1), "t/1") == len(consumed)
    assert bench.known((*consumed, 1), "t/2") == 0 == bench.known((*consumed, 1))
    assert not bench.prompts.begin(ask("b", (*consumed, 1), salt="t/2"))


async def test_a_step_without_a_trusted_token_leaves_nothing_of_it(bench: Bench) -> None:
    bench.runner.broken_indices = {3}
    ids = fresh(GRID + 2)
    with pytest.raises(InvariantViolation, match="not finite"):
        await bench.hand_in(ask("a", ids, max_tokens=9))
    # The prompt arrived sound, and stays; what was decoded is not kept.
    assert bench.known((*ids, FIRST, 7, 7, 7)) == len(ids)


async def test_only_what_is_known_for_the_most_part_runs_here(bench: Bench) -> None:
    consumed = await bench.hand_in(ask("a", fresh(5), max_tokens=2))
    assert len(consumed) == 6
    assert not bench.prompts.begin(ask("b", fresh(6, first=300)))
    assert not bench.prompts.begin(ask("b", (*consumed, *fresh(7, first=300))))
    assert await bench.run(ask("b", (*consumed, *fresh(6, first=300)))) == 6


async def test_no_more_than_the_limit_runs_at_a_time(bench: Bench) -> None:
    consumed = await bench.hand_in(ask("a", fresh(2 * GRID), max_tokens=2))
    assert not bench.prompts.begin(ask("b", (*consumed, *fresh(LIMIT + 1, first=300))))
    assert bench.prompts.begin(ask("b", (*consumed, *fresh(LIMIT - 2, first=300))))
    assert not bench.prompts.begin(ask("c", (*consumed, *fresh(3, first=400))))
    assert bench.prompts.begin(ask("d", (*consumed, *fresh(2, first=400))))
    bench.prompts.abort("b")
    bench.prompts.abort("d")
    assert await bench.run(ask("c", (*consumed, *fresh(3, first=400)))) == len(consumed)


async def test_nobody_who_waits_for_memory_is_overtaken(bench: Bench) -> None:
    consumed = await bench.hand_in(ask("a", fresh(GRID), max_tokens=2))
    for name in "xyz":
        bench.loop.admit(name, GRID)
    bench.loop.admit("waits", GRID)
    bench.loop.abort("x")
    assert bench.scheduler.num_waiting == 0
    assert not bench.prompts.begin(ask("b", (*consumed, 1))), "every place is taken"
    bench.loop.admit("waits too", GRID)
    bench.loop.abort("y")
    bench.loop.admit("and this", 8 * GRID)
    assert bench.scheduler.num_waiting == 1
    assert not bench.prompts.begin(ask("b", (*consumed, 1)))
    for name in ("z", "waits", "waits too", "and this"):
        bench.loop.abort(name)
    assert await bench.run(ask("b", (*consumed, 1))) == len(consumed)


async def test_where_what_is_known_and_the_prompt_do_not_fit_it_runs_elsewhere() -> None:
    """Memory for one sequence: what it would resume from has to give way to it."""
    async with running_bench(1, max_sequences=1, cache_bytes=0) as bench:
        consumed = await bench.hand_in(ask("a", fresh(GRID + 2), max_tokens=3))
        assert bench.known((*consumed, 1)) == len(consumed)
        assert not bench.prompts.begin(ask("b", (*consumed, 1)))
        assert bench.cache.state_slots.free == bench.cache.state_slots.total
        bench.cache.check_conserved()
        assert not extended_tokens(bench.runner)


async def test_a_prompt_that_is_known_to_its_end_runs_no_forward(bench: Bench) -> None:
    consumed = await bench.hand_in(ask("a", fresh(GRID), max_tokens=2))
    turn = (*consumed, 1, 2)
    assert await bench.run(ask("b", turn)) == len(consumed)
    assert await bench.run(ask("c", turn)) == len(turn)
    assert extended_tokens(bench.runner) == [2, 0]


async def test_a_prompt_without_a_trusted_token_leaves_nothing(bench: Bench) -> None:
    consumed = await bench.hand_in(ask("a", fresh(GRID), max_tokens=2))
    bench.runner.broken_indices = {0}
    turn = (*consumed, 1, 2)
    with pytest.raises(InvariantViolation, match="not finite"):
        await bench.run(ask("b", turn))
    bench.runner.broken_indices = set()
    assert bench.known((*turn, 3)) == len(consumed)


async def test_a_launch_that_fails_hurts_its_request_alone(bench: Bench) -> None:
    consumed = await bench.hand_in(ask("a", fresh(GRID), max_tokens=2))

    def explode() -> None:
        bench.runner.before = lambda: None
        raise RuntimeError("bad weather")

    bench.runner.before = explode
    with pytest.raises(InvariantViolation, match="bad weather"):
        await bench.run(ask("b", (*consumed, 1, 2)))
    assert bench.known((*consumed, 1, 2, 3)) == len(consumed)
    assert await bench.run(ask("c", (*consumed, 1, 2))) == len(consumed)


async def test_cancelled_in_a_launch_that_shows_nothing_is_to_be_trusted(bench: Bench) -> None:
    """Nobody hears of it any more, and yet nothing of it may be found later."""
    consumed = await bench.hand_in(ask("a", fresh(GRID), max_tokens=2))
    gate = Gate()
    bench.runner.before = gate
    bench.runner.broken_indices = {0}
    running = asyncio.ensure_future(bench.run(ask("b", (*consumed, 1, 2))))
    await entered(gate)
    running.cancel()
    await asyncio.sleep(0.02)
    assert not running.done(), "its memory is written yet"
    bench.runner.before = lambda: None
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await running
    bench.runner.broken_indices = set()
    assert bench.known((*consumed, 1, 2, 3)) == len(consumed)


async def test_it_runs_behind_the_steps_in_flight_and_others_go_on(bench: Bench) -> None:
    consumed = await bench.hand_in(ask("a", fresh(GRID), max_tokens=2))
    gate = Gate()
    bench.runner.before = gate
    long = asyncio.ensure_future(bench.hand_in(ask("long", fresh(3, first=500), max_tokens=30)))
    await entered(gate)
    turn = asyncio.ensure_future(bench.run(ask("b", (*consumed, 1))))
    await asyncio.sleep(0.02)
    assert extended_tokens(bench.runner) == [1] and bench.runner.steps == 2, "planned, and not run"
    bench.runner.before = lambda: None
    gate.open()
    assert await turn == len(consumed)
    await long
