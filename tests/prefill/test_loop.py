"""The prefill loop: steps that fail or block, and requests that leave at the wrong moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import GuideBroke, InvariantViolation, Overloaded
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SamplingParams, StopConditions
from stateferry.engine.rules import SequenceRules
from stateferry.prefill.loop import PrefillLoop
from support.running_prefill import running_prefill
from support.scripted_runner import Gate, ScriptedRunner
from support.small_cache import GRID, KV, small_cache


@dataclass
class Bench:
    loop: PrefillLoop
    runner: ScriptedRunner
    cache: StateCache

    def submit(self, name: str, length: int = 5, rules: object = None) -> asyncio.Task[Any]:
        request = GenerationRequest(
            name,
            tuple(range(length)),
            SamplingParams(0.0, 0, 1.0, 0, None),
            StopConditions(9, 0, frozenset()),
            rules=rules,
        )
        self.loop.submit(request)
        return asyncio.ensure_future(self.loop.computed(name))

    @property
    def slots_free(self) -> int:
        self.cache.check_conserved()
        return self.cache.state_slots.free


@pytest_asyncio.fixture(params=[1, 2], ids=["in turn", "overlap"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    cache, runner = small_cache(kv=KV), ScriptedRunner()
    async with running_prefill(
        cache, runner, budget_tokens=4 * GRID, max_waiting=3, max_in_flight=request.param
    ) as loop:
        yield Bench(loop, runner, cache)
    assert not loop._pending, "the loop still holds prompts"
    assert cache.kv_pages.free == cache.kv_pages.total


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, 5)


async def test_computes_and_keeps_the_lease_until_abort(bench: Bench) -> None:
    computed = await bench.submit("a")
    assert computed.token.token_id == 7 and computed.prefill_s >= 0
    assert bench.slots_free == 2
    bench.loop.abort("a")
    assert bench.slots_free == 4


async def test_a_failed_step_fails_its_requests_and_no_others(bench: Bench) -> None:
    def explode() -> None:
        bench.runner.before = lambda: None
        raise RuntimeError("bad weather")

    bench.runner.before = explode
    results = await asyncio.gather(bench.submit("a"), bench.submit("b"), return_exceptions=True)
    assert [type(r) for r in results] == [InvariantViolation] * 2
    for name in ("a", "b"):
        bench.loop.abort(name)
    assert bench.slots_free == 4
    assert (await bench.submit("c")).token.token_id == 7
    bench.loop.abort("c")


async def test_an_untrustworthy_token_is_an_error(bench: Bench) -> None:
    bench.runner.broken_indices = {0}
    with pytest.raises(InvariantViolation, match="not finite"):
        await bench.submit("a")
    bench.loop.abort("a")
    assert bench.slots_free == 4


async def test_a_guide_that_broke_is_the_reason_that_is_given(bench: Bench) -> None:
    bench.runner.broken_indices = {0}
    rules = SequenceRules(SamplingParams(0.0, 0, 1.0, 0, None), None, None)
    rules.failure = GuideBroke("too complex")
    with pytest.raises(GuideBroke):
        await bench.submit("a", rules=rules)
    bench.loop.abort("a")
    assert bench.slots_free == 4


@pytest.mark.parametrize("fails", [False, True])
async def test_abort_during_a_step_frees_after_it(bench: Bench, fails: bool) -> None:
    gate = Gate()

    def step() -> None:
        gate()
        if fails:
            raise RuntimeError("and the step fails too")

    bench.runner.before = step
    waiting = bench.submit("a")
    await entered(gate)
    waiting.cancel()
    bench.loop.abort("a")
    assert bench.slots_free == 2, "freed while the step could still write"
    bench.runner.before = lambda: None
    gate.open()
    while bench.slots_free != 4:
        await asyncio.sleep(0.001)


async def test_the_queue_is_bounded_and_a_refusal_holds_nothing(bench: Bench) -> None:
    gate = Gate()
    bench.runner.before = gate
    started = [bench.submit("a"), bench.submit("b")]
    await entered(gate)
    queued = [bench.submit(name) for name in "cde"]
    with pytest.raises(Overloaded):
        bench.submit("f")
    gate.open()
    await asyncio.gather(*started)
    for name in "abcde":
        bench.loop.abort(name)
    for task in queued:
        task.cancel()
    assert bench.slots_free == 4


async def test_a_second_request_of_one_name_does_not_hurt_the_first(bench: Bench) -> None:
    first = bench.submit("a")
    with pytest.raises(InvariantViolation, match="twice"):
        bench.submit("a")
    assert (await first).token.token_id == 7
    bench.loop.abort("a")
