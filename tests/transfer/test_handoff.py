"""reserve -> push -> seal -> release over inproc: what is let in, and what is not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from stateferry.core.errors import (
    DeadlineExceeded,
    FrameError,
    HandoffError,
    HandshakeMismatch,
    InvariantViolation,
    Overloaded,
    PeerLost,
    Refused,
    Unavailable,
)
from stateferry.core.ids import WorkerKey
from stateferry.transfer.frames import PushRejected, RejectReason
from stateferry.transfer.manifest import SegmentKind, segment_from_tensor

pytestmark = pytest.mark.asyncio


async def test_bytes_labels_and_payload_arrive(cluster: Any, same_segments: Any) -> None:
    sender, expectation = cluster.sender(), cluster.expect("r1")
    segments = cluster.segments(seed=3)
    pushing = asyncio.ensure_future(
        cluster.push(sender, "r1", payload=b"\x00\x01", segments=segments)
    )
    received = await expectation.sealed(2.0)
    receipt = await pushing
    size_bytes = sum(s.data.nbytes for s in segments)
    assert receipt.size_bytes == received.size_bytes == received.manifest.size_bytes == size_bytes
    assert receipt.transport == received.transport == "inproc"
    assert received.manifest.payload == b"\x00\x01"
    assert (received.manifest.sender, received.manifest.receiver) == (
        cluster.prefill,
        cluster.decode,
    )
    same_segments(received.segments, segments)
    received.release()
    received.release()
    with pytest.raises(InvariantViolation, match="released"):
        _ = received.segments
    totals = cluster.receiver.snapshot().totals
    assert (totals.handoffs_sealed, totals.received_bytes) == (1, size_bytes)
    assert sender.snapshot().pushes_sealed == 1


async def test_bfloat16_survives_to_the_bit(cluster: Any) -> None:
    every_bit_pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    tensor = every_bit_pattern.view(torch.bfloat16)
    expectation = cluster.expect("r1")
    segments = [segment_from_tensor("tail_x", 0, tensor)]
    pushing = asyncio.ensure_future(cluster.push(cluster.sender(), "r1", segments=segments))
    with await expectation.sealed(2.0) as received:
        (segment,) = received.segments
        got = torch.from_numpy(segment.data).view(torch.bfloat16).reshape(segment.shape)
        assert torch.equal(got.view(torch.int16), tensor.view(torch.int16))
    await pushing


async def test_many_messages_of_data(cluster: Any, same_segments: Any) -> None:
    """More than one DATA message, and the thread that checks big pushes."""
    segments = cluster.segments(scale=2500)
    assert sum(s.data.nbytes for s in segments) > 32 << 20
    expectation = cluster.expect("r1", max_bytes=64 << 20)
    pushing = asyncio.ensure_future(cluster.push(cluster.sender(), "r1", segments=segments))
    with await expectation.sealed(5.0) as received:
        same_segments(received.segments, segments)
    await pushing


async def test_one_connection_serves_many_pushes_at_once(cluster: Any) -> None:
    sender = cluster.sender()
    await asyncio.gather(*(cluster.serves(f"r{n}", sender) for n in range(40)))
    assert cluster.receiver.snapshot().connections == 1
    assert sender.snapshot().connections == 1


async def test_source_memory_is_free_once_push_returns(cluster: Any, same_segments: Any) -> None:
    segments = cluster.segments(seed=1)
    expectation = cluster.expect("r1")
    await asyncio.gather(cluster.push(cluster.sender(), "r1", segments=segments))
    for segment in segments:
        segment.data[:] = 0xEE
    with await expectation.sealed(2.0) as received:
        same_segments(received.segments, cluster.segments(seed=1))


@pytest.mark.parametrize(
    ("expected", "pushed", "reason"),
    [
        ({"epoch": 2}, {}, RejectReason.WRONG_EPOCH),
        ({"epoch": 1}, {"epoch": 2}, RejectReason.WRONG_EPOCH),
        ({"sender": WorkerKey("prefill-1", 3)}, {}, RejectReason.WRONG_SENDER),
        ({"sender": WorkerKey("prefill-0", 4)}, {}, RejectReason.WRONG_SENDER),
        ({"max_bytes": 100}, {}, RejectReason.OVERSIZE),
        ({}, {"request_id": "other"}, RejectReason.UNEXPECTED),
    ],
)
async def test_only_the_push_that_was_expected_is_let_in(
    cluster: Any, expected: Any, pushed: Any, reason: RejectReason
) -> None:
    expectation, sender = cluster.expect("r1", **expected), cluster.sender()
    with pytest.raises(PushRejected) as rejection:
        await cluster.push(sender, **({"request_id": "r1"} | pushed))
    assert rejection.value.reason is reason
    assert not expectation.outcome.done()
    assert cluster.receiver.snapshot().totals.pushes_rejected == 1
    expectation.cancel()
    await cluster.serves("r2", sender)
    assert cluster.receiver.snapshot().connections == 1


async def test_exact_limit_fits_and_one_byte_less_does_not(cluster: Any) -> None:
    size_bytes = sum(s.data.nbytes for s in cluster.segments())
    sender = cluster.sender()
    tight = cluster.expect("tight", max_bytes=size_bytes - 1)
    with pytest.raises(PushRejected):
        await cluster.push(sender, "tight")
    tight.cancel()
    exact = cluster.expect("exact", max_bytes=size_bytes)
    await cluster.push(sender, "exact")
    (await exact.sealed(1.0)).release()


async def test_a_rejected_push_uses_no_staging_at_the_receiver(cluster: Any) -> None:
    with pytest.raises(PushRejected):
        await cluster.push(cluster.sender(), "nobody")
    assert cluster.receiver._shared.staging.mapped_bytes == 0


async def test_a_second_push_of_a_sealed_attempt_is_refused(cluster: Any) -> None:
    sender, expectation = cluster.sender(), cluster.expect("r1")
    await cluster.push(sender, "r1")
    with pytest.raises(PushRejected) as rejection:
        await cluster.push(sender, "r1", segments=cluster.segments(seed=9))
    assert rejection.value.reason is RejectReason.DUPLICATE
    (await expectation.sealed(1.0)).release()
    with pytest.raises(PushRejected):
        await cluster.push(sender, "r1")
    with pytest.raises(Refused):
        cluster.expect("r1")
    with pytest.raises(InvariantViolation):
        await expectation.sealed(1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol", 99),
        ("model", "x"),
        ("weights", "x"),
        ("layout", "x"),
        ("grid", 128),
        ("dtype", "float32"),
        ("numerics", "torch"),
    ],
)
async def test_a_different_fingerprint_is_refused_by_name(
    cluster: Any, field: str, value: Any
) -> None:
    sender = cluster.sender(**{field: value})
    expectation = cluster.expect("r1")
    with pytest.raises(HandshakeMismatch) as mismatch:
        await cluster.push(sender, "r1")
    assert mismatch.value.field == field
    assert repr(value) in str(mismatch.value)
    assert str(getattr(cluster.fingerprint, field)) in str(mismatch.value)
    assert cluster.receiver.snapshot().totals.handshakes_refused == 1
    expectation.cancel()


async def test_another_incarnation_of_the_receiver_is_refused(cluster: Any) -> None:
    with pytest.raises(HandshakeMismatch) as mismatch:
        await cluster.push(cluster.sender(), "r1", receiver=WorkerKey("decode-0", 6))
    assert mismatch.value.field == "receiver"


async def test_connect_checks_ahead_of_the_first_push(cluster: Any) -> None:
    sender = cluster.sender()
    await sender.connect(cluster.address, cluster.decode)
    assert sender.snapshot().connections == 1
    with pytest.raises(HandshakeMismatch):
        await cluster.sender(layout="other").connect(cluster.address, cluster.decode)


async def test_nobody_listens(cluster: Any) -> None:
    with pytest.raises(PeerLost):
        await cluster.push(cluster.sender(), "r1", address="inproc-404")


async def test_a_manifest_beyond_the_limits_hurts_nobody_else(cluster: Any) -> None:
    sender = cluster.sender()
    await cluster.serves("r1", sender)
    with pytest.raises(FrameError):
        await cluster.push(sender, "r2", payload=bytes(20_000))
    await cluster.serves("r3", sender)
    assert cluster.receiver.snapshot().totals.connections_lost == 0


async def test_no_push_in_time_cancels_the_reservation(cluster: Any) -> None:
    expectation = cluster.expect("r1")
    with pytest.raises(DeadlineExceeded):
        await expectation.sealed(0.02)
    with pytest.raises(PushRejected) as rejection:
        await cluster.push(cluster.sender(), "r1")
    assert rejection.value.reason is RejectReason.CLOSED


async def test_number_of_expectations_is_bounded(cluster: Any) -> None:
    cluster.receiver._shared.book.attempts._max_open = 2
    kept = [cluster.expect("r1"), cluster.expect("r2")]
    with pytest.raises(Overloaded):
        cluster.expect("r3")
    for expectation in kept:
        expectation.cancel()
    cluster.expect("r3").cancel()


async def test_closing_the_receiver_fails_what_is_expected(cluster: Any) -> None:
    sender, expectation = cluster.sender(), cluster.expect("r1")
    await cluster.serves("r0", sender)
    await cluster.receiver.close()
    with pytest.raises(Unavailable):
        await expectation.sealed(1.0)
    with pytest.raises(Unavailable):
        cluster.expect("r2")
    with pytest.raises(PeerLost):
        await cluster.push(sender, "r1")


async def test_closed_sender_refuses_pushes(cluster: Any) -> None:
    sender = cluster.sender()
    await cluster.serves("r1", sender)
    await sender.close()
    with pytest.raises(Unavailable):
        await cluster.push(sender, "r2")
    await asyncio.sleep(0.01)
    assert cluster.receiver.snapshot().connections == 0
    assert cluster.receiver.snapshot().totals.connections_lost == 0


async def test_cancelled_expectation_raises_for_a_concurrent_waiter(cluster: Any) -> None:
    expectation = cluster.expect("r1")
    waiting = asyncio.ensure_future(expectation.sealed(5.0))
    await asyncio.sleep(0.01)
    expectation.cancel()
    with pytest.raises(HandoffError, match="cancelled"):
        await waiting


async def test_kinds_are_those_of_the_pool() -> None:
    from dataclasses import fields

    from stateferry_kernels.layer_state import LayerState

    pools = {field.name for field in fields(LayerState) if field.init}
    assert pools and pools <= {kind.value for kind in SegmentKind}


async def test_a_prepared_connection_is_the_one_that_is_used(cluster: Any, faults: Any) -> None:
    sender = cluster.sender(faults=faults)
    sender.prepare(cluster.address, cluster.decode)
    sender.prepare(cluster.address, cluster.decode)
    await cluster.serves("r1", sender)
    sender.prepare(cluster.address, cluster.decode)
    assert len(faults.links) == 1


async def test_a_failed_preparation_shows_at_the_push(cluster: Any) -> None:
    sender = cluster.sender(layout="other")
    sender.prepare(cluster.address, cluster.decode)
    await asyncio.sleep(0.05)
    with pytest.raises(HandshakeMismatch, match="layout"):
        await cluster.push(sender, "r1")
