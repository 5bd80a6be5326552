"""Whoever gives up, in whatever phase: the others go on, and nothing leaks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from stateferry.core.errors import HandoffError, PeerLost
from stateferry.transfer.blocking import INLINE_MAX_BYTES, copy_with_crc32c
from stateferry.transfer.frames import PushRejected, RejectReason

pytestmark = pytest.mark.asyncio

# Messages a sender sends on a fresh connection.
HELLO, PUSH, DATA = 0, 1, 2
FAR_S = 3.0


@pytest.mark.parametrize("phase", [HELLO, PUSH, DATA])
async def test_cancelled_push_ends_in_the_background(cluster: Any, faults: Any, phase: int) -> None:
    """Its connection serves on, its staging comes back, and the receiver has dropped it."""

    async def slow(n: int, data: Any) -> Any:
        await asyncio.sleep(0.1 if n == phase else 0.0)
        return data

    faults.on_send = slow
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r1")
    pushing = asyncio.ensure_future(cluster.push(sender, "r1"))
    await cluster.wait_for(lambda: len(faults.links) == 1)
    await asyncio.sleep(0.02)
    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing
    expectation.cancel()
    await cluster.serves("r2", sender)
    assert len(faults.links) == 1
    assert sender.snapshot().staging_in_use_bytes == 0
    assert cluster.receiver.snapshot().staging_in_use_bytes == 0


async def test_cancelled_push_that_stalls_still_meets_its_deadline(
    cluster: Any, faults: Any
) -> None:
    faults.on_send = faults.stall_at(DATA)
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r1")
    pushing = asyncio.ensure_future(cluster.push(sender, "r1"))
    await cluster.wait_for(lambda: len(faults.links) == 1)
    await asyncio.sleep(0.02)
    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing
    await cluster.wait_for(lambda: sender.snapshot().connections == 0)
    expectation.cancel()
    faults.on_send = None
    cluster.end_stalled_operations()
    await cluster.serves("r2", sender)
    assert len(faults.links) == 2


async def test_queued_push_is_not_begun_once_cancelled(cluster: Any, faults: Any) -> None:
    async def slow(n: int, data: Any) -> Any:
        await asyncio.sleep(0.05)
        return data

    faults.on_send = slow
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r2")
    first = asyncio.ensure_future(cluster.serves("r1", sender))
    await asyncio.sleep(0.01)
    queued = asyncio.ensure_future(cluster.push(sender, "r2"))
    await asyncio.sleep(0.01)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    await first
    await cluster.serves("r3", sender)
    assert len(faults.links) == 1
    assert expectation.is_free
    expectation.cancel()


async def test_cancelled_push_waits_until_its_memory_is_copied(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []

    def slow_copy(runs: Any, target: Any) -> int:
        time.sleep(0.1)
        copied.append(True)
        return copy_with_crc32c(runs, target)

    monkeypatch.setattr("stateferry.transfer.lane.copy_with_crc32c", slow_copy)
    sender, segments = cluster.sender(), cluster.segments(scale=200)
    assert sum(s.data.nbytes for s in segments) > INLINE_MAX_BYTES
    pushing = asyncio.ensure_future(cluster.push(sender, "r1", segments=segments))
    await cluster.wait_for(lambda: sender.snapshot().staging_in_use_bytes > 0)
    await asyncio.sleep(0.02)
    for _ in range(2):
        pushing.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await pushing
    assert len(copied) == len(segments)


async def test_expectation_cancelled_before_the_push(cluster: Any) -> None:
    expectation = cluster.expect("r1")
    expectation.cancel()
    expectation.cancel()
    with pytest.raises(PushRejected) as rejection:
        await cluster.push(cluster.sender(), "r1")
    assert rejection.value.reason is RejectReason.CLOSED
    with pytest.raises(HandoffError):
        await expectation.sealed(1.0)


async def test_expectation_cancelled_while_data_is_on_its_way(cluster: Any, faults: Any) -> None:
    expectation = cluster.expect("r1")
    staging_at_cancel = []

    async def cancel_then_send(n: int, data: Any) -> Any:
        if n == DATA:
            expectation.cancel()
            await asyncio.sleep(0.05)
            staging_at_cancel.append(cluster.receiver.snapshot().staging_in_use_bytes)
        return data

    faults.on_send = cancel_then_send
    sender = cluster.sender(faults=faults)
    with pytest.raises(PushRejected) as rejection:
        await cluster.push(sender, "r1")
    assert rejection.value.reason is RejectReason.CLOSED
    assert staging_at_cancel == [65536]
    await cluster.staging_is_free()
    await cluster.serves("r2", sender)
    assert len(faults.links) == 1


async def test_expectation_cancelled_after_the_seal(cluster: Any) -> None:
    sender, expectation = cluster.sender(), cluster.expect("r1")
    await cluster.push(sender, "r1")
    assert cluster.receiver.snapshot().staging_in_use_bytes > 0
    expectation.cancel()
    assert cluster.receiver.snapshot().staging_in_use_bytes == 0
    with pytest.raises(PushRejected) as rejection:
        await cluster.push(sender, "r1")
    assert rejection.value.reason is RejectReason.DUPLICATE


async def test_cancel_does_not_touch_a_handoff_that_was_taken(
    cluster: Any, same_segments: Any
) -> None:
    expectation = cluster.expect("r1")
    await cluster.push(cluster.sender(), "r1")
    received = await expectation.sealed(1.0)
    expectation.cancel()
    same_segments(received.segments, cluster.segments())
    assert cluster.receiver.snapshot().staging_in_use_bytes > 0
    received.release()


async def test_waiter_cancelled_then_expectation_cancelled(cluster: Any) -> None:
    expectation = cluster.expect("r1")
    waiting = asyncio.ensure_future(expectation.sealed(5.0))
    await asyncio.sleep(0)
    waiting.cancel()
    await cluster.push(cluster.sender(), "r1")
    expectation.cancel()
    assert cluster.receiver.snapshot().staging_in_use_bytes == 0
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("turns", range(8))
async def test_cancel_in_the_moment_that_staging_comes_free(cluster: Any, turns: int) -> None:
    held = await cluster.receiver._shared.staging.acquire(64 << 20, 1.0)
    expectation = cluster.expect("r1")
    pushing = asyncio.ensure_future(cluster.push(cluster.sender(), "r1"))
    await cluster.wait_for(lambda: not expectation.is_free)
    held.release()
    for _ in range(turns):
        await asyncio.sleep(0)
    expectation.cancel()
    results = await asyncio.gather(pushing, return_exceptions=True)
    assert isinstance(results[0], PushRejected) or expectation.outcome.exception() is None
    await cluster.staging_is_free()
    await cluster.serves("r2")


@pytest.mark.parametrize("end", ["cancel", "die"])
async def test_push_that_waits_for_staging_can_end(cluster: Any, end: str, faults: Any) -> None:
    held = await cluster.receiver._shared.staging.acquire(64 << 20, 1.0)
    expectation = cluster.expect("r1")
    sender = cluster.sender(faults=faults)
    pushing = asyncio.ensure_future(cluster.push(sender, "r1"))
    await cluster.wait_for(lambda: not expectation.is_free)
    if end == "cancel":
        expectation.cancel()
        with pytest.raises(PushRejected) as rejection:
            await pushing
        assert rejection.value.reason is RejectReason.CLOSED
        assert not cluster.receiver._shared.staging._waiters
    else:
        faults.links[0].abort()
        with pytest.raises(PeerLost):
            await pushing
        with pytest.raises(PeerLost):
            await expectation.sealed(0.4)
    held.release()
    await cluster.serves("r2")


async def test_memory_of_a_cancelled_push_is_not_read_later(
    cluster: Any, faults: Any, same_segments: Any
) -> None:
    """The push goes on in the background with the bytes that it had copied."""

    async def slow(n: int, data: Any) -> Any:
        await asyncio.sleep(0.05)
        return data

    faults.on_send = slow
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r1")
    segments = cluster.segments(seed=1)
    pushing = asyncio.ensure_future(cluster.push(sender, "r1", segments=segments))
    await cluster.wait_for(lambda: sender.snapshot().staging_in_use_bytes > 0)
    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing
    for segment in segments:
        segment.data[:] = 0xEE
    with await expectation.sealed(FAR_S) as received:
        same_segments(received.segments, cluster.segments(seed=1))
