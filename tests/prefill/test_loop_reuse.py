"""What reaches the cache through the prefill loop, and what never may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from stateferry.cache.reuse import Reuse
from stateferry.cache.state_cache import StateCache
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.prefill.loop import PrefillLoop
from stateferry.prefix.state_tracking import StateStrategy, StateTracking
from support.running_prefill import running_prefill
from support.scripted_runner import Gate, ScriptedRunner
from support.small_cache import GRID, KV, small_cache

BUDGET = 2 * GRID


@dataclass
class Bench:
    loop: PrefillLoop
    runner: ScriptedRunner
    cache: StateCache

    def submit(self, name: str, length: int, first: int = 0) -> asyncio.Task[Any]:
        ids = (first, *range(1, length))
        sampling = SamplingParams(0.0, 0, 1.0, 0, None)
        stop = StopConditions(9, 0, frozenset())
        self.loop.submit(GenerationRequest(name, ids, sampling, stop))
        return asyncio.ensure_future(self.loop.computed(name))

    async def run(self, name: str, length: int, first: int = 0) -> int:
        """From submission to the end; how much was resumed."""
        computed = await self.submit(name, length, first)
        self.loop.abort(name)
        self.cache.check_conserved()
        return int(computed.resumed_tokens)


@pytest_asyncio.fixture(params=[1, 2], ids=["in turn", "overlap"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    plain = small_cache(max_sequences=6, kv=KV, max_context_tokens=8 * GRID, cache_bytes=60_000)
    tracking = StateTracking(StateStrategy.EXTRA_BUFFER, GRID, GRID)
    cache = StateCache(plain.pools, plain.sizes, Reuse(True, "w", "l", tracking))
    runner = ScriptedRunner()
    async with running_prefill(
        cache, runner, budget_tokens=BUDGET, max_waiting=9, max_in_flight=request.param
    ) as loop:
        yield Bench(loop, runner, cache)
    cache.check_conserved()


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, 5)


async def test_a_prompt_again_needs_no_tokens(bench: Bench) -> None:
    assert await bench.run("a", GRID + 5) == 0
    assert await bench.run("b", GRID + 5) == GRID + 5
    assert [copy.kind for copy in bench.runner.copies] == ["tail", "kv"]


async def test_what_is_not_finite_is_not_kept(bench: Bench) -> None:
    bench.runner.broken_indices = {0}
    with pytest.raises(Exception, match="not finite"):
        await bench.submit("a", GRID + 5)
    bench.loop.abort("a")
    bench.runner.broken_indices = set()
    assert await bench.run("b", GRID + 5) == 0


async def test_nor_is_it_when_nobody_waits_for_it_any_more(bench: Bench) -> None:
    """Cancelled while the step runs that shows it: its memory is released by the loop itself."""
    gate = Gate()
    bench.runner.before = gate
    bench.runner.broken_indices = {0}
    waiting = bench.submit("a", GRID + 5)
    await entered(gate)
    waiting.cancel()
    bench.loop.abort("a")
    bench.runner.before = lambda: None
    gate.open()
    while bench.cache.prefixes.occupancy()["state slot"].running:
        await asyncio.sleep(0.001)
    bench.runner.broken_indices = set()
    assert await bench.run("b", GRID + 5) == 0


async def test_a_failed_step_loses_no_copy_of_a_sequence_that_was_not_in_it(bench: Bench) -> None:
    """Two prompts are admitted together, and the budget lets the first one run alone."""
    assert await bench.run("seed", GRID + 5) == 0
    gate = Gate()

    def explode() -> None:
        gate()
        bench.runner.before = lambda: None
        raise RuntimeError("bad weather")

    bench.runner.before = explode
    first = bench.submit("long", 4 * GRID, first=9)
    second = bench.submit("known", GRID + 9)
    await entered(gate)
    assert bench.cache.resumed_tokens("known") == GRID + 5, "not admitted yet: nothing is shown"
    gate.open()
    with pytest.raises(Exception, match="bad weather"):
        await first
    assert (await second).resumed_tokens == GRID + 5
    assert [copy.kind for copy in bench.runner.copies] == ["tail", "kv"]
    assert bench.runner.copies[0].target == bench.cache.lease("known").tail_page
    for name in ("long", "known"):
        bench.loop.abort(name)
