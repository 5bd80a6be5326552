"""A prefill loop that runs, over a scripted runner."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from stateferry.cache.state_cache import StateCache
from stateferry.core.clock import SystemClock
from stateferry.prefill.loop import PrefillLoop
from stateferry.scheduler.prefill import PrefillScheduler
from support.scripted_runner import NullMeter, ScriptedRunner
from support.small_cache import GRID


@contextlib.asynccontextmanager
async def running_prefill(
    cache: StateCache,
    runner: ScriptedRunner,
    *,
    budget_tokens: int,
    max_waiting: int,
    max_in_flight: int,
) -> AsyncIterator[PrefillLoop]:
    """Ends it on the way out, when what is in flight is over."""
    scheduler = PrefillScheduler(
        cache,
        grid=GRID,
        budget_tokens=budget_tokens,
        max_waiting=max_waiting,
        max_in_flight=max_in_flight,
    )
    with ThreadPoolExecutor(1) as executor:
        loop = PrefillLoop(
            scheduler,
            cache,
            runner,  # type: ignore[arg-type]
            executor,
            SystemClock(),
            NullMeter(),
        )
        running = asyncio.ensure_future(loop.run())
        yield loop
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
