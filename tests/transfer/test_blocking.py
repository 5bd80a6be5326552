"""Big work leaves the event loop alone, and never outlives its caller."""

from __future__ import annotations

import asyncio
import time

import google_crc32c
import numpy as np
import pytest

from stateferry.transfer.blocking import INLINE_MAX_BYTES, crc32c, run_sized

BIG_BYTES = INLINE_MAX_BYTES + 1


@pytest.mark.parametrize("size_bytes", [0, 1, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_sliced_checksum_is_that_of_the_whole(size_bytes: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, size_bytes, dtype=np.uint8)
    assert crc32c(data) == google_crc32c.value(data.tobytes())


@pytest.mark.asyncio
async def test_the_loop_runs_while_big_work_does() -> None:
    working = asyncio.ensure_future(run_sized(BIG_BYTES, lambda: time.sleep(0.2)))
    ticks = 0
    while not working.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 5


@pytest.mark.asyncio
async def test_cancelling_waits_for_the_work_to_end() -> None:
    ended = []

    def work() -> None:
        time.sleep(0.1)
        ended.append(True)

    working = asyncio.ensure_future(run_sized(BIG_BYTES, work))
    await asyncio.sleep(0.02)
    working.cancel()
    await asyncio.sleep(0.02)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert ended


@pytest.mark.asyncio
@pytest.mark.parametrize("size_bytes", [1, BIG_BYTES])
async def test_errors_reach_the_caller(size_bytes: int) -> None:
    with pytest.raises(ZeroDivisionError):
        await run_sized(size_bytes, lambda: 1 // 0)
