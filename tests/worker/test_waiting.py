"""Cancelling a task never leaves its thread writing behind its back."""

from __future__ import annotations

import asyncio
import threading

import pytest

from stateferry.worker.waiting import Wakeup, run_to_end


async def test_gives_the_result_and_the_error() -> None:
    assert await run_to_end(None, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await run_to_end(None, divmod, 7, 0)


@pytest.mark.parametrize("cancels", [1, 3])
async def test_a_cancelled_caller_waits_for_the_thread(cancels: int) -> None:
    release, ended = threading.Event(), threading.Event()

    def work() -> None:
        release.wait(5)
        ended.set()

    task = asyncio.create_task(run_to_end(None, work))
    await asyncio.sleep(0.05)
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0.02)
    assert not task.done(), "returned while the thread was still writing"
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_wakeup_before_and_after_wait() -> None:
    wakeup = Wakeup()
    wakeup.set()
    await asyncio.wait_for(wakeup.wait(), 1)
    waiter = asyncio.create_task(wakeup.wait())
    await asyncio.sleep(0.01)
    assert not waiter.done()
    wakeup.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert waiter.done()
