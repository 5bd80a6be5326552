"""Peers that stall, die, lie or are cancelled: who is hurt, and that nothing leaks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from stateferry.core.errors import IntegrityError, Overloaded, PeerLost
from stateferry.core.ids import WorkerKey
from stateferry.transfer.frames import PushRejected, RejectReason

pytestmark = pytest.mark.asyncio

# Messages a sender sends on a fresh connection.
HELLO, PUSH, DATA = 0, 1, 2
FAR_S = 3.0


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
    faults.on_send = faults.stall_at(phase)
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
    await cluster.wait_for(lambda: cluster.receiver.snapshot().connections == 0)
    expectation.cancel()
    faults.on_send = None
    # The operation that stalls has not ended, so its staging is still held back; it is not reused.
    assert sender.snapshot().staging_in_use_bytes == (0 if phase == HELLO else 65536)
    cluster.end_stalled_operations()
    await cluster.staging_is_free()
    if phase == DATA:
        # What a peer may still be reading is unmapped, not used again.
        assert sender._shared.staging.mapped_bytes == 0
    await cluster.serves("r2", sender)


async def test_stalled_receiver_costs_one_deadline(cluster: Any) -> None:
    """A receiver that accepts connections and then never reads."""
    held = []
    address = cluster.network.add(held.append)
    sender = cluster.sender()
    with pytest.raises(PeerLost, match="no progress"):
        await cluster.push(sender, "r1", address=address)
    assert not held[0].alive


async def test_queue_of_pushes_is_bounded(cluster: Any, faults: Any) -> None:
    faults.on_send = faults.stall_at(PUSH)
    limits = replace(cluster.limits, max_queued_pushes=2, push_timeout_s=0.2)
    sender = cluster.sender(faults=faults, limits=limits)
    pushes = [asyncio.ensure_future(cluster.push(sender, f"r{n}")) for n in range(4)]
    results = await asyncio.gather(*pushes, return_exceptions=True)
    kinds = [type(result) for result in results]
    assert kinds == [PeerLost, Overloaded, Overloaded, Overloaded]
    assert "queued" in str(results[2])
    assert "too slow" in str(results[1])
    cluster.end_stalled_operations()


async def test_one_stuck_sender_does_not_block_another(cluster: Any, faults: Any) -> None:
    faults.on_send = faults.stall_at(DATA)
    stuck = asyncio.ensure_future(
        cluster.push(cluster.sender(WorkerKey("prefill-9", 1), faults), "stuck")
    )
    expectation = cluster.expect("stuck", sender=WorkerKey("prefill-9", 1))
    await cluster.wait_for(lambda: cluster.receiver.snapshot().staging_in_use_bytes > 0)
    healthy = cluster.sender()
    async with asyncio.timeout(0.4):
        for n in range(10):
            await cluster.serves(f"r{n}", healthy)
    assert not stuck.done()
    for broken in (expectation.sealed(FAR_S), stuck):
        with pytest.raises(PeerLost):
            await broken
    cluster.end_stalled_operations()


async def test_staging_runs_out_and_recovers(cluster: Any) -> None:
    """Room for two of the three; the third waits for a release, a fourth waits in vain."""
    big = {"max_bytes": 40 << 20}
    keys = [WorkerKey(f"prefill-{n}", 1) for n in range(4)]
    limits = replace(cluster.limits, staging_bytes=256 << 20, progress_timeout_s=FAR_S)
    segments = cluster.segments(scale=1700)
    expectations = [cluster.expect(f"r{n}", sender=keys[n], **big) for n in range(4)]
    senders = [cluster.sender(key, limits=limits) for key in keys]
    pushes = []
    with cluster.changed_limits(credit_timeout_s=FAR_S, progress_timeout_s=FAR_S):
        for n in range(3):
            pushes.append(
                asyncio.ensure_future(cluster.push(senders[n], f"r{n}", segments=segments))
            )
            # One after the other: it is the third that has to wait.
            await cluster.wait_for(lambda n=n: not expectations[n].is_free)
        first, second = [await e.sealed(FAR_S) for e in expectations[:2]]
        assert not pushes[2].done()
        first.release()
        third = await expectations[2].sealed(FAR_S)
    with cluster.changed_limits(credit_timeout_s=0.1), pytest.raises(Overloaded):
        await cluster.push(senders[3], "r3", segments=segments)
    second.release()
    third.release()
    assert cluster.receiver.snapshot().staging_in_use_bytes == 0
    # The refusal for lack of staging was no end: the same attempt may be pushed again.
    await cluster.push(senders[3], "r3", segments=segments)
    (await expectations[3].sealed(FAR_S)).release()
    await asyncio.gather(*pushes)


async def test_second_push_while_the_first_arrives_is_refused(cluster: Any, faults: Any) -> None:
    faults.on_send = faults.stall_at(DATA)
    stalled, expectation = cluster.sender(faults=faults), cluster.expect("r1")
    first = asyncio.ensure_future(cluster.push(stalled, "r1"))
    await cluster.wait_for(lambda: cluster.receiver.snapshot().staging_in_use_bytes > 0)
    with pytest.raises(PushRejected) as rejection:
        await cluster.push(cluster.sender(), "r1")
    assert rejection.value.reason is RejectReason.DUPLICATE
    assert not expectation.outcome.done()
    with pytest.raises(PeerLost):
        await first
    cluster.end_stalled_operations()


async def test_waiting_for_staging_may_take_longer_than_a_deadline(cluster: Any) -> None:
    """The receiver says that it lives; a silent one would be given up after half a second."""
    with cluster.changed_limits(credit_timeout_s=5.0):
        held = await cluster.receiver._shared.staging.acquire(64 << 20, 1.0)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        loop.call_later(1.2, held.release)
        await cluster.serves("r1")
        assert loop.time() - began_s >= 1.2, "it never had to wait"


async def test_connections_are_bounded(cluster: Any) -> None:
    senders = [cluster.sender(WorkerKey("p", n)) for n in range(3)]
    with cluster.changed_limits(max_connections=2):
        for sender in senders[:2]:
            await sender.connect(cluster.address, cluster.decode)
        with pytest.raises(PeerLost):
            await senders[2].connect(cluster.address, cluster.decode)
        assert cluster.receiver.snapshot().totals.connections_refused == 1


async def test_receiver_closes_in_the_middle_of_a_push(cluster: Any, faults: Any) -> None:
    faults.on_send = faults.stall_at(DATA)
    expectation = cluster.expect("r1")
    pushing = asyncio.ensure_future(cluster.push(cluster.sender(faults=faults), "r1"))
    await cluster.wait_for(lambda: cluster.receiver.snapshot().staging_in_use_bytes > 0)
    await cluster.receiver.close()
    assert expectation.outcome.done()
    cluster.end_stalled_operations()
    with pytest.raises((PeerLost, asyncio.CancelledError)):
        await pushing


async def test_closing_the_sender_ends_what_is_queued(cluster: Any, faults: Any) -> None:
    faults.on_send = faults.stall_at(DATA)
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r0")
    pushes = [asyncio.ensure_future(cluster.push(sender, f"r{n}")) for n in range(3)]
    await cluster.wait_for(lambda: cluster.receiver.snapshot().staging_in_use_bytes > 0)
    closing = asyncio.ensure_future(sender.close())
    await asyncio.sleep(0.01)
    cluster.end_stalled_operations()
    await closing
    results = await asyncio.gather(*pushes, return_exceptions=True)
    assert [isinstance(r, Exception | asyncio.CancelledError) for r in results] == [True] * 3
    assert len(faults.links) == 1
    assert sender.snapshot().connections == 0
    expectation.cancel()
