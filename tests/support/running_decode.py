"""A decode loop that runs over a small cache and a scripted runner, and how it must end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from stateferry.cache.reuse import Reuse
from stateferry.cache.state_cache import StateCache
from stateferry.core.clock import SystemClock
from stateferry.decode.loop import DecodeLoop
from stateferry.engine.forward_batch import ExtendBatch
from stateferry.prefix.state_tracking import StateStrategy, StateTracking
from stateferry.scheduler.decode import DecodeScheduler
from support.scripted_runner import Gate, NullMeter, ScriptedRunner
from support.small_cache import GRID, KV, small_cache


def reusing_cache(max_sequences: int, *, max_context_tokens: int, cache_bytes: int) -> StateCache:
    """One with attention layers, whose sequences leave checkpoints and pages behind."""
    plain = small_cache(
        max_sequences, kv=KV, max_context_tokens=max_context_tokens, cache_bytes=cache_bytes
    )
    tracking = StateTracking(StateStrategy.EXTRA_BUFFER, GRID, GRID)
    return StateCache(plain.pools, plain.sizes, Reuse(True, "w", "l", tracking))


@contextlib.asynccontextmanager
async def running_loop(
    scheduler: DecodeScheduler, cache: StateCache, runner: ScriptedRunner, meter: NullMeter
) -> AsyncIterator[DecodeLoop]:
    """Runs while the context does; in the end nobody waits in it and the pools are whole."""
    with ThreadPoolExecutor(1) as executor:
        loop = DecodeLoop(
            scheduler,
            cache,
            runner,  # type: ignore[arg-type]
            executor,
            SystemClock(),
            meter,
        )
        running = asyncio.ensure_future(loop.run())
        yield loop
        # A step too many may be in flight.
        async with asyncio.timeout(5):
            while scheduler.num_active:
                await asyncio.sleep(0.001)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    assert not loop._streams and not loop._reserving and not scheduler.num_waiting
    for count in (cache.state_slots, cache.tail_pages, cache.kv_pages):
        assert count.free == count.total
    cache.check_conserved()


def extended_tokens(runner: ScriptedRunner) -> list[int]:
    """Tokens that each extend computed."""
    batches = [b for b in runner.planned if isinstance(b, ExtendBatch)]
    return [sum(len(row.token_ids) for row in batch.rows) for batch in batches]


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, 5)
