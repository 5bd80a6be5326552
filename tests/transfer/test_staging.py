"""The staging pool: bounded, first come first served, and whole again at the end."""

from __future__ import annotations

import asyncio
import random

import pytest

from stateferry.core.errors import Overloaded
from stateferry.transfer.staging import StagingBlock, StagingPool

pytestmark = pytest.mark.asyncio
MIB = 1 << 20


async def test_released_memory_is_reused_and_retired_memory_is_not() -> None:
    pool = StagingPool(8 * MIB)
    first = await pool.acquire(MIB, 1.0)
    address = first.data.ctypes.data
    first.data[:] = 7
    first.release()
    second = await pool.acquire(MIB, 1.0)
    assert second.data.ctypes.data == address
    second.retire()
    assert pool.mapped_bytes == 0
    third = await pool.acquire(MIB, 1.0)
    assert not third.data.any()


async def test_giving_back_twice_counts_once() -> None:
    pool = StagingPool(8 * MIB)
    block, other = await pool.acquire(MIB, 1.0), await pool.acquire(MIB, 1.0)
    block.release()
    block.release()
    block.retire()
    assert pool.in_use_bytes == MIB
    other.release()
    assert pool.in_use_bytes == 0


async def test_a_block_that_never_fits_is_refused_at_once() -> None:
    with pytest.raises(Overloaded, match="never fit"):
        await StagingPool(MIB).acquire(MIB + 1, 60.0)


async def test_waiting_has_a_limit() -> None:
    pool = StagingPool(MIB)
    held = await pool.acquire(MIB, 1.0)
    with pytest.raises(Overloaded, match="within"):
        await pool.acquire(1, 0.02)
    held.release()
    (await pool.acquire(MIB, 0.02)).release()


async def test_a_small_request_does_not_overtake_a_big_one() -> None:
    pool = StagingPool(4 * MIB)
    held = await pool.acquire(3 * MIB, 1.0)
    order: list[str] = []

    async def take(name: str, size_bytes: int) -> StagingBlock:
        block = await pool.acquire(size_bytes, 1.0)
        order.append(name)
        return block

    big = asyncio.ensure_future(take("big", 2 * MIB))
    await asyncio.sleep(0)
    small = asyncio.ensure_future(take("small", MIB))
    await asyncio.sleep(0.01)
    assert order == []
    held.release()
    blocks = [await big, await small]
    assert order == ["big", "small"]
    for block in blocks:
        block.release()
    assert pool.in_use_bytes == 0


async def test_big_fresh_memory_does_not_stall_the_loop_and_cancel_returns_it() -> None:
    pool = StagingPool(256 * MIB)
    acquiring = asyncio.ensure_future(pool.acquire(200 * MIB, 5.0))
    await asyncio.sleep(0)
    acquiring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await acquiring
    assert pool.in_use_bytes == 0


async def test_random_use_with_cancellations_conserves_the_budget() -> None:
    rng = random.Random(5)
    pool = StagingPool(4 * MIB)
    held_bytes = 0

    async def use() -> None:
        nonlocal held_bytes
        size_bytes = rng.randint(1, 2 * MIB)
        block = await pool.acquire(size_bytes, rng.uniform(0.001, 0.2))
        held_bytes += size_bytes
        assert held_bytes <= pool.in_use_bytes <= pool.mapped_bytes <= pool.budget_bytes
        try:
            await asyncio.sleep(rng.uniform(0, 0.004))
        finally:
            held_bytes -= size_bytes
            rng.choice((block.release, block.retire))()

    for _ in range(20):
        tasks = [asyncio.ensure_future(use()) for _ in range(12)]
        for task in rng.sample(tasks, 5):
            asyncio.get_running_loop().call_later(rng.uniform(0, 0.01), task.cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        odd = [r for r in results if r and not isinstance(r, Overloaded | asyncio.CancelledError)]
        assert not odd
        assert pool.in_use_bytes == 0
    assert pool.mapped_bytes <= pool.budget_bytes
