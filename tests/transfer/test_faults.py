"""Peers that stall, die, lie or are cancelled: who is hurt, and that nothing leaks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from stateferry.core.errors import HandoffError, IntegrityError, Overloaded, PeerLost
from stateferry.core.ids import WorkerKey
from stateferry.transfer.frames import PushRejected, RejectReason

pytestmark = pytest.mark.asyncio

# Messages a sender sends on a fresh connection.
HELLO, PUSH, DATA = 0, 1, 2
FAR_S = 3.0


def stall_at(number: int) -> Any:
    async def on_send(n: int, data: Any) -> Any:
        if n == number:
            await asyncio.sleep(3600)
        return data

    return on_send


async def wait_for(condition: Any) -> None:
    async with asyncio.timeout(FAR_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("byte", [0, 4095, -1])
async def test_wrong_bytes_hurt_their_own_request_only(
    cluster: Any, faults: Any, byte: int
) -> None:
    async def flip(n: int, data: Any) -> Any:
        if n == DATA:
            data = data.copy()
            data[byte] ^= 0x10
        return data

    faults.on_send = flip
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r1")
    with pytest.raises(IntegrityError):
        await cluster.push(sender, "r1")
    with pytest.raises(IntegrityError):
        await expectation.sealed(1.0)
    await cluster.serves("r2", sender)
    assert len(faults.links) == 1
    assert cluster.receiver.snapshot().totals.handoffs_failed == 1


@pytest.mark.parametrize("changed", ["short", "empty", "long", "other"])
async def test_data_of_another_length_never_seals(cluster: Any, faults: Any, changed: str) -> None:
    async def distort(n: int, data: Any) -> Any:
        if n != DATA:
            return data
        twice = data.repeat(2)
        return {
            "short": data[:-1] if data[-1] else data[:-100],
            "empty": data[:0],
            "long": twice,
            "other": twice[: data.size],
        }[changed]

    faults.on_send = distort
    expectation = cluster.expect("r1")
    # Staging keeps old bytes; a short message must not be completed by those of an older push.
    await cluster.serves("r0")
    with pytest.raises((IntegrityError, PeerLost)):
        await cluster.push(cluster.sender(faults=faults), "r1", segments=cluster.segments(seed=2))
    with pytest.raises((IntegrityError, PeerLost)):
        await expectation.sealed(FAR_S)
    await cluster.serves("r2")


@pytest.mark.parametrize("phase", [PUSH, DATA])
async def test_sender_dies_in_any_phase(cluster: Any, faults: Any, phase: int) -> None:
    async def die(n: int, data: Any) -> Any:
        if n == phase:
            faults.links[0].abort()
        return data

    faults.on_send = die
    expectation = cluster.expect("r1")
    with pytest.raises(PeerLost):
        await cluster.push(cluster.sender(faults=faults), "r1")
    if phase == DATA:
        with pytest.raises(PeerLost):
            await expectation.sealed(0.2)
        assert cluster.receiver.snapshot().totals.handoffs_failed == 1
    expectation.cancel()
    await cluster.staging_is_free()
    await cluster.serves("r2")


@pytest.mark.parametrize("phase", [HELLO, PUSH, DATA])
async def test_stalled_sender_costs_one_deadline(cluster: Any, faults: Any, phase: int) -> None:
    faults.on_send = stall_at(phase)
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r1")
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    pushing = asyncio.ensure_future(cluster.push(sender, "r1"))
    if phase == DATA:
        with pytest.raises(PeerLost):
            await expectation.sealed(FAR_S)
    with pytest.raises(PeerLost):
        await pushing
    assert loop.time() - started_s < 1.0
    await wait_for(lambda: cluster.receiver.snapshot().connections == 0)
    expectation.cancel()
    faults.on_send = None
    # The operation that stalls has not ended, so its staging is still held back; it is not reused.
    assert sender.snapshot().staging_in_use_bytes == (0 if phase == HELLO else 65536)
    end_stalled_operations()
    await cluster.serves("r2", sender)


def end_stalled_operations() -> None:
    for task in asyncio.all_tasks():
        if "FaultyLink.send" in repr(task.get_coro()):
            task.cancel()


async def test_stalled_receiver_costs_one_deadline(cluster: Any) -> None:
    """A receiver that accepts connections and then never reads."""
    held = []
    address = cluster.network.add(held.append)
    sender = cluster.sender()
    with pytest.raises(PeerLost, match="no progress"):
        await cluster.push(sender, "r1", address=address)
    assert not held[0].alive


@pytest.mark.parametrize("phase", [HELLO, PUSH, DATA])
async def test_cancelled_push_ends_in_the_background(cluster: Any, faults: Any, phase: int) -> None:
    """Its connection serves on, its staging comes back, and the receiver has dropped it."""

    async def slow(n: int, data: Any) -> Any:
        await asyncio.sleep(0.1 if n == phase else 0.0)
        return data

    faults.on_send = slow
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r1")
    pushing = asyncio.ensure_future(cluster.push(sender, "r1"))
    await wait_for(lambda: len(faults.links) == 1)
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
    faults.on_send = stall_at(DATA)
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r1")
    pushing = asyncio.ensure_future(cluster.push(sender, "r1"))
    await wait_for(lambda: len(faults.links) == 1)
    await asyncio.sleep(0.02)
    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing
    await wait_for(lambda: sender.snapshot().connections == 0)
    expectation.cancel()
    faults.on_send = None
    end_stalled_operations()
    await cluster.serves("r2", sender)
    assert len(faults.links) == 2


async def test_queued_push_can_be_cancelled_without_harm(cluster: Any, faults: Any) -> None:
    async def slow(n: int, data: Any) -> Any:
        await asyncio.sleep(0.05)
        return data

    faults.on_send = slow
    sender = cluster.sender(faults=faults)
    first = asyncio.ensure_future(cluster.serves("r1", sender))
    await asyncio.sleep(0.01)
    queued = asyncio.ensure_future(cluster.push(sender, "r2"))
    await asyncio.sleep(0.01)
    queued.cancel()
    await first
    await cluster.serves("r3", sender)
    assert len(faults.links) == 1
    assert queued.cancelled()


async def test_queue_of_pushes_is_bounded(cluster: Any, faults: Any) -> None:
    faults.on_send = stall_at(PUSH)
    limits = replace(cluster.limits, max_queued_pushes=2, push_timeout_s=0.2)
    sender = cluster.sender(faults=faults, limits=limits)
    pushes = [asyncio.ensure_future(cluster.push(sender, f"r{n}")) for n in range(4)]
    results = await asyncio.gather(*pushes, return_exceptions=True)
    kinds = [type(result) for result in results]
    assert kinds == [PeerLost, Overloaded, Overloaded, Overloaded]
    assert "queued" in str(results[2])
    assert "too slow" in str(results[1])
    end_stalled_operations()


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


async def test_one_stuck_sender_does_not_block_another(cluster: Any, faults: Any) -> None:
    faults.on_send = stall_at(DATA)
    stuck = asyncio.ensure_future(
        cluster.push(cluster.sender(WorkerKey("prefill-9", 1), faults), "stuck")
    )
    expectation = cluster.expect("stuck", sender=WorkerKey("prefill-9", 1))
    await wait_for(lambda: cluster.receiver.snapshot().staging_in_use_bytes > 0)
    healthy = cluster.sender()
    async with asyncio.timeout(0.4):
        for n in range(10):
            await cluster.serves(f"r{n}", healthy)
    assert not stuck.done()
    for broken in (expectation.sealed(FAR_S), stuck):
        with pytest.raises(PeerLost):
            await broken
    end_stalled_operations()


async def test_staging_runs_out_and_recovers(cluster: Any) -> None:
    """Room for two of the three; the third waits for a release, a fourth waits in vain."""
    big = {"max_bytes": 40 << 20}
    keys = [WorkerKey(f"prefill-{n}", 1) for n in range(4)]
    limits = replace(cluster.limits, staging_bytes=256 << 20, credit_timeout_s=2.0)
    segments = cluster.segments(scale=1700)
    expectations = [cluster.expect(f"r{n}", sender=keys[n], **big) for n in range(4)]
    pushes = []
    for n in range(3):
        sender = cluster.sender(keys[n], limits=limits)
        pushes.append(asyncio.ensure_future(cluster.push(sender, f"r{n}", segments=segments)))
        await asyncio.sleep(0.02)
    first, second = [await e.sealed(FAR_S) for e in expectations[:2]]
    assert not pushes[2].done()
    first.release()
    third = await expectations[2].sealed(FAR_S)
    sender = cluster.sender(keys[3], limits=limits)
    with pytest.raises(Overloaded):
        await cluster.push(sender, "r3", segments=segments)
    second.release()
    third.release()
    assert cluster.receiver.snapshot().staging_in_use_bytes == 0
    # The refusal for lack of staging was no end: the same attempt may be pushed again.
    await cluster.push(sender, "r3", segments=segments)
    (await expectations[3].sealed(FAR_S)).release()
    await asyncio.gather(*pushes)


@pytest.mark.parametrize("end", ["cancel", "die"])
async def test_push_that_waits_for_staging_can_end(cluster: Any, end: str, faults: Any) -> None:
    held = await cluster.receiver._shared.staging.acquire(64 << 20, 1.0)
    expectation = cluster.expect("r1")
    sender = cluster.sender(faults=faults)
    pushing = asyncio.ensure_future(cluster.push(sender, "r1"))
    await wait_for(lambda: not expectation.is_free)
    if end == "cancel":
        expectation.cancel()
        with pytest.raises(PushRejected) as rejection:
            await pushing
        assert rejection.value.reason is RejectReason.CLOSED
    else:
        faults.links[0].abort()
        with pytest.raises(PeerLost):
            await pushing
        with pytest.raises(PeerLost):
            await expectation.sealed(0.4)
    held.release()
    await cluster.serves("r2")


async def test_waiting_for_staging_may_take_longer_than_a_deadline(cluster: Any) -> None:
    """The receiver says that it lives; a silent one would be given up after half a second."""
    object.__setattr__(cluster.limits, "credit_timeout_s", 5.0)
    try:
        held = await cluster.receiver._shared.staging.acquire(64 << 20, 1.0)
        asyncio.get_running_loop().call_later(1.2, held.release)
        await cluster.serves("r1")
    finally:
        object.__setattr__(cluster.limits, "credit_timeout_s", 0.5)


async def test_connections_are_bounded(cluster: Any) -> None:
    object.__setattr__(cluster.limits, "max_connections", 2)
    try:
        for n in range(2):
            await cluster.sender(WorkerKey("p", n)).connect(cluster.address, cluster.decode)
        with pytest.raises(PeerLost):
            await cluster.sender().connect(cluster.address, cluster.decode)
        assert cluster.receiver.snapshot().totals.connections_refused == 1
    finally:
        object.__setattr__(cluster.limits, "max_connections", 256)


async def test_receiver_closes_in_the_middle_of_a_push(cluster: Any, faults: Any) -> None:
    faults.on_send = stall_at(DATA)
    expectation = cluster.expect("r1")
    pushing = asyncio.ensure_future(cluster.push(cluster.sender(faults=faults), "r1"))
    await wait_for(lambda: cluster.receiver.snapshot().staging_in_use_bytes > 0)
    await cluster.receiver.close()
    assert expectation.outcome.done()
    end_stalled_operations()
    with pytest.raises((PeerLost, asyncio.CancelledError)):
        await pushing
