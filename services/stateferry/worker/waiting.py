"""Two small asyncio idioms that are easy to get wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def run_to_end(
    executor: Executor | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run blocking work on an executor and never return before it has ended, even when cancelled.

    A cancelled task would otherwise free memory that the thread still writes.
    """
    loop = asyncio.get_running_loop()
    work = loop.run_in_executor(executor, lambda: function(*args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await settle(work)
        raise


async def settle(work: Awaitable[object]) -> None:
    """Wait until ``work`` has ended, well or not, whoever cancels the wait."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            # Cancelled again; the work still has to end first.
            continue


class Wakeup:
    """Lets a loop sleep until somebody has given it something to do."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        """Sleep until ``set`` was called since the last ``wait`` returned."""
        await self._event.wait()
        self._event.clear()
