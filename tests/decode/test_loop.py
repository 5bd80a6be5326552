"""The decode loop: steps that fail or block, and requests that leave at the wrong moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import pytest_asyncio

from stateferry.cache.state_cache import StateCache
from stateferry.core.clock import SystemClock
from stateferry.core.errors import GuideBroke, InvariantViolation, Overloaded
from stateferry.core.request import Continuation
from stateferry.core.sampling import FinishReason, SamplingParams, StopConditions
from stateferry.decode.loop import DecodeLoop
from stateferry.engine.rules import SequenceRules
from stateferry.scheduler.decode import DecodeScheduler
from support.scripted_runner import Gate, NullMeter, ScriptedRunner
from support.small_cache import KV, small_cache


@dataclass
class Bench:
    loop: DecodeLoop
    runner: ScriptedRunner
    cache: StateCache
    max_in_flight: int

    async def run(
        self,
        name: str,
        max_tokens: int = 4,
        rules: object = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> list[int]:
        """Indices of the tokens of one request, from admission to its end."""
        self.loop.admit(name, 10)
        try:
            await self.loop.reserved(name)
            stop = StopConditions(max_tokens, 0, stop_ids)
            wanted = Continuation(name, SamplingParams(0.0, 0, 1.0, 0, None), stop, (), rules)
            steps = [step async for step in self.loop.decode(wanted, first_token_id=5)]
            ended = FinishReason.STOP if stop_ids else FinishReason.LENGTH
            assert steps[-1].finish_reason is ended
            return [step.index for step in steps]
        finally:
            self.loop.abort(name)

    async def all_free(self) -> None:
        """Once the last step is over, which may be one that nobody wanted."""
        async with asyncio.timeout(5):
            while self.slots_free != 4:
                await asyncio.sleep(0.001)

    @property
    def slots_free(self) -> int:
        self.cache.check_conserved()
        return self.cache.state_slots.free


@pytest_asyncio.fixture(params=[1, 2], ids=["in turn", "overlap"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    cache, runner = small_cache(kv=KV), ScriptedRunner()
    with ThreadPoolExecutor(1) as executor:
        loop = DecodeLoop(
            DecodeScheduler(cache, max_waiting=3, max_in_flight=request.param),
            cache,
            runner,  # type: ignore[arg-type]
            executor,
            SystemClock(),
            NullMeter(),
        )
        running = asyncio.ensure_future(loop.run())
        yield Bench(loop, runner, cache, request.param)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert not loop._streams and not loop._reserving, "the loop still holds requests"
    for count in (cache.state_slots, cache.tail_pages, cache.kv_pages):
        assert count.free == count.total


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, 5)


async def test_streams_every_index_once(bench: Bench) -> None:
    assert await bench.run("a", max_tokens=6) == [1, 2, 3, 4, 5]
    assert bench.slots_free == 4


async def test_each_step_consumes_what_the_one_before_sampled(bench: Bench) -> None:
    await bench.run("a", max_tokens=5)
    assert bench.runner.consumed == [[5], [7], [7], [7]]


async def test_an_end_that_could_not_be_foreseen(bench: Bench) -> None:
    """Steps that overlap cost one that nobody wanted; its token is not streamed."""
    assert await bench.run("a", max_tokens=9, stop_ids=frozenset({7})) == [1]
    await bench.all_free()
    assert bench.runner.steps == bench.max_in_flight


async def test_the_engine_is_never_without_a_step(bench: Bench) -> None:
    """With overlap the next step is there when one ends."""
    gate, planned = Gate(), bench.runner.planned
    bench.runner.before = gate
    running = asyncio.ensure_future(bench.run("a", max_tokens=9))
    await entered(gate)
    await asyncio.sleep(0.05)
    assert len(planned) == bench.max_in_flight
    gate.open()
    await running


async def test_memory_is_filled_behind_what_is_in_flight(bench: Bench) -> None:
    """What a step that still runs may read is not written over by a state that arrives."""
    gate = Gate()
    bench.runner.before = gate
    running = asyncio.ensure_future(bench.run("a"))
    await entered(gate)
    at_step: list[int] = []
    filling = asyncio.ensure_future(bench.loop.fill(lambda: at_step.append(bench.runner.steps)))
    await asyncio.sleep(0.05)
    assert not at_step
    gate.open()
    await filling
    assert at_step[0] >= bench.max_in_flight
    await running


async def test_more_requests_than_memory_wait_their_turn(bench: Bench) -> None:
    results = await asyncio.gather(*(bench.run(f"r{n}") for n in range(5)))
    assert results == [[1, 2, 3]] * 5


async def test_a_failed_step_fails_its_requests_and_no_others(bench: Bench) -> None:
    def explode() -> None:
        bench.runner.before = lambda: None
        raise RuntimeError("bad weather")

    bench.runner.before = explode
    with pytest.raises(InvariantViolation):
        await bench.run("a")
    assert await bench.run("b") == [1, 2, 3]


async def test_an_untrustworthy_token_ends_the_stream_with_an_error(bench: Bench) -> None:
    bench.runner.broken_indices = {2}
    with pytest.raises(InvariantViolation, match="not finite"):
        await bench.run("a")
    await bench.all_free()


async def test_a_guide_that_broke_is_the_reason_that_is_given(bench: Bench) -> None:
    bench.runner.broken_indices = {2}
    rules = SequenceRules(SamplingParams(0.0, 0, 1.0, 0, None), None, None)
    rules.failure = GuideBroke("too complex")
    with pytest.raises(GuideBroke):
        await bench.run("a", rules=rules)
    await bench.all_free()


async def test_cancel_during_a_step_frees_after_it(bench: Bench) -> None:
    gate = Gate()
    bench.runner.before = gate
    running = asyncio.ensure_future(bench.run("a"))
    await entered(gate)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert bench.slots_free == 2, "freed while the step could still write"
    bench.runner.before = lambda: None
    gate.open()
    await bench.all_free()


async def test_cancel_while_waiting_for_memory(bench: Bench) -> None:
    gate = Gate()
    bench.runner.before = gate
    busy = [asyncio.ensure_future(bench.run(name)) for name in "ab"]
    await entered(gate)
    waiting = asyncio.ensure_future(bench.run("c"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.open()
    assert await asyncio.gather(*busy) == [[1, 2, 3]] * 2


async def test_the_queue_is_bounded_and_a_refusal_holds_nothing(bench: Bench) -> None:
    for name in "abcde":
        bench.loop.admit(name, 10)
    with pytest.raises(Overloaded):
        bench.loop.admit("f", 10)
    with pytest.raises(InvariantViolation, match="twice"):
        bench.loop.admit("a", 10)
    for name in "abcde":
        bench.loop.abort(name)
    assert bench.slots_free == 4
