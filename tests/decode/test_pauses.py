"""Streams of the decode loop that have to pause: what their readers see, and what fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import InvariantViolation
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.decode.loop import DecodeLoop
from stateferry.engine.forward_batch import ExtendBatch
from stateferry.scheduler.decode import DecodeScheduler
from stateferry.scheduler.standing import Preemption
from support.running_decode import entered, extended_tokens, reusing_cache, running_loop
from support.scripted_runner import Gate, NullMeter, ScriptedRunner
from support.small_cache import GRID

FIRST = 5


class Pauses(NullMeter):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.sequences = 0
        self.recomputed_tokens = 0

    def preempted(self, sequences: int, recomputed_tokens: int) -> None:
        self.sequences += sequences
        self.recomputed_tokens += recomputed_tokens


@dataclass
class Bench:
    loop: DecodeLoop
    scheduler: DecodeScheduler
    runner: ScriptedRunner
    cache: StateCache
    meter: Pauses
    indices: dict[str, list[int]] = field(default_factory=dict)

    async def run(self, name: str, priority: int = 0, max_tokens: int = 40) -> list[int]:
        """Indices of the tokens of one request, from admission to its end."""
        stop = StopConditions(max_tokens, 0, frozenset())
        sampling = SamplingParams(0.0, 0, 1.0, 0, None)
        ids = (*range(100, 100 + GRID + 3), *map(ord, name))
        request = GenerationRequest(name, ids, sampling, stop, priority=priority)
        seen = self.indices[name] = []
        self.loop.admit(name, request.total_tokens, priority)
        try:
            await self.loop.reserved(name)
            self.cache.lease(name).adopt(request.prompt_len, GRID)
            self.cache.adopt(name, request)
            async for step in self.loop.decode(request.continuation, FIRST, request):
                seen.append(step.index)
            return seen
        finally:
            self.loop.abort(name)
            self.cache.check_conserved()

    def start(self, *args: object) -> asyncio.Task[list[int]]:
        return asyncio.ensure_future(self.run(*args))  # type: ignore[arg-type]


@pytest_asyncio.fixture(params=[1, 2], ids=["in turn", "overlap"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    cache = reusing_cache(1, max_context_tokens=12 * GRID, cache_bytes=200_000)
    runner, meter = ScriptedRunner(), Pauses()
    scheduler = DecodeScheduler(
        cache, max_waiting=9, max_in_flight=request.param, preemption=Preemption(GRID, GRID)
    )
    async with running_loop(scheduler, cache, runner, meter) as loop:
        yield Bench(loop, scheduler, runner, cache, meter)
    assert not len(cache.prefixes.protection)


async def begun(bench: Bench, name: str, tokens: int) -> None:
    async with asyncio.timeout(5):
        while len(bench.indices.get(name, ())) < tokens:
            await asyncio.sleep(0)


@pytest.mark.parametrize("at", [1, 7, 20])
async def test_both_readers_see_every_index_once(bench: Bench, at: int) -> None:
    low = bench.start("low")
    await begun(bench, "low", at)
    high = bench.start("high", 1, 6)
    assert await high == list(range(1, 6))
    assert not low.done()
    assert await low == list(range(1, 40))
    assert bench.meter.sequences == 1 and extended_tokens(bench.runner)


async def test_one_that_is_lower_waits_and_nobody_pauses(bench: Bench) -> None:
    first = bench.start("first", 1, 20)
    await begun(bench, "first", 1)
    assert len(await bench.run("second", 1, 3)) == 2
    assert first.done() and not bench.meter.sequences


async def test_a_reader_that_leaves_in_its_pause_takes_nothing_with_it(bench: Bench) -> None:
    low = bench.start("low")
    await begun(bench, "low", 4)
    high = bench.start("high", 1, 30)
    await begun(bench, "high", 1)
    low.cancel()
    with pytest.raises(asyncio.CancelledError):
        await low
    assert await high == list(range(1, 30)) and bench.meter.sequences == 1


async def test_a_reader_that_leaves_while_it_is_computed_again(bench: Bench) -> None:
    low = bench.start("low")
    await begun(bench, "low", 4)
    gate = Gate()
    planned = bench.runner.planned

    def at_extend() -> None:
        if isinstance(planned[bench.runner.steps - 1], ExtendBatch):
            gate()

    bench.runner.before = at_extend
    await bench.run("high", 1, 6)
    await entered(gate)
    low.cancel()
    with pytest.raises(asyncio.CancelledError):
        await low
    assert bench.scheduler.num_active == 1, "the extend may still write there"
    gate.open()


async def test_an_extend_that_fails_ends_its_stream_with_an_error(bench: Bench) -> None:
    low = bench.start("low")
    await begun(bench, "low", 4)

    def explode() -> None:
        if isinstance(bench.runner.planned[bench.runner.steps - 1], ExtendBatch):
            raise RuntimeError("bad weather")

    bench.runner.before = explode
    assert await bench.run("high", 1, 6) == list(range(1, 6))
    with pytest.raises(InvariantViolation, match="could not be resumed"):
        await low


async def test_a_token_that_is_not_to_be_trusted_after_a_pause(bench: Bench) -> None:
    low = bench.start("low")
    await begun(bench, "low", 4)
    high = bench.start("high", 1, 9)
    await begun(bench, "high", 1)
    bench.runner.broken_indices = {len(bench.indices["low"]) + n for n in range(40)}
    # High has shorter indices than the first broken one, or fails as well.
    with contextlib.suppress(InvariantViolation):
        await high
    with pytest.raises(InvariantViolation, match="not finite"):
        await low
