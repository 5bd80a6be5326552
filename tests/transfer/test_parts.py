"""A hand-off in several parts: in order, each checked, none seen before the last one is there."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stateferry.core.errors import FrameError, HandoffError, IntegrityError
from stateferry.transfer.frames import PushRejected, RejectReason
from stateferry.transfer.lane import PushOrder


class Copies:
    """Takes parts in, as a decode worker does; ``gate`` holds it up."""

    def __init__(self) -> None:
        self.parts: list[list[bytes]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: FrameError | None = None

    async def __call__(self, received: Any) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.parts.append([bytes(segment.data) for segment in received.segments])


async def push_part(cluster: Any, sender: Any, number: int, **changes: Any) -> Any:
    fields = {
        "request_id": "r1",
        "epoch": 1,
        "payload": b"",
        "segments": cluster.segments(seed=number),
        "part": number,
        "is_last": number == 2,
    } | changes
    return await sender.push_part(cluster.address, cluster.decode, PushOrder(**fields))


def sent(cluster: Any, number: int) -> list[bytes]:
    return [bytes(segment.data) for segment in cluster.segments(seed=number)]


async def test_three_parts_are_one_handoff(cluster: Any, same_segments: Any) -> None:
    copies, sender = Copies(), cluster.sender()
    expectation = cluster.expect("r1", on_part=copies)
    for number in range(3):
        assert not expectation.outcome.done()
        await push_part(cluster, sender, number)
    with await expectation.sealed(3.0) as received:
        assert copies.parts == [sent(cluster, 0), sent(cluster, 1)]
        same_segments(received.segments, cluster.segments(seed=2))
    totals = cluster.receiver.snapshot().totals
    assert (totals.parts_received, totals.handoffs_sealed) == (3, 1)
    assert sender.snapshot().pushes_sealed == 1


async def test_the_last_part_waits_for_the_copies_of_the_others(cluster: Any) -> None:
    copies, sender = Copies(), cluster.sender()
    copies.gate.clear()
    expectation = cluster.expect("r1", on_part=copies)
    for number in range(3):
        await push_part(cluster, sender, number)
    sealed = asyncio.ensure_future(expectation.sealed(3.0))
    await asyncio.sleep(0.05)
    assert expectation.outcome.done() and not sealed.done() and not copies.parts
    copies.gate.set()
    (await sealed).release()
    assert len(copies.parts) == 2


@pytest.mark.parametrize(
    ("number", "changes", "reason"),
    [
        (2, {}, RejectReason.OUT_OF_ORDER),
        (0, {}, RejectReason.DUPLICATE),
        (1, {"epoch": 2}, RejectReason.WRONG_EPOCH),
    ],
)
async def test_a_part_that_is_not_due(
    cluster: Any, number: int, changes: dict[str, Any], reason: RejectReason
) -> None:
    copies, sender = Copies(), cluster.sender()
    expectation = cluster.expect("r1", on_part=copies)
    await push_part(cluster, sender, 0)
    with pytest.raises(PushRejected) as refusal:
        await push_part(cluster, sender, number, **changes)
    assert refusal.value.reason is reason
    for due in (1, 2):
        await push_part(cluster, sender, due)
    (await expectation.sealed(3.0)).release()
    assert copies.parts == [sent(cluster, 0), sent(cluster, 1)]


async def test_parts_where_one_piece_was_reserved(cluster: Any) -> None:
    sender, expectation = cluster.sender(), cluster.expect("r1")
    with pytest.raises(PushRejected) as refusal:
        await push_part(cluster, sender, 0)
    assert refusal.value.reason is RejectReason.WHOLE_ONLY
    expectation.cancel()


async def test_all_parts_together_fit_what_was_reserved(cluster: Any) -> None:
    size_bytes = sum(segment.size_bytes for segment in cluster.segments())
    sender = cluster.sender()
    expectation = cluster.expect("r1", on_part=Copies(), max_bytes=2 * size_bytes)
    for number in range(2):
        await push_part(cluster, sender, number)
    with pytest.raises(PushRejected) as refusal:
        await push_part(cluster, sender, 2)
    assert refusal.value.reason is RejectReason.OVERSIZE
    expectation.cancel()


async def test_a_part_that_cannot_be_copied_ends_the_handoff(cluster: Any) -> None:
    copies, sender = Copies(), cluster.sender()
    copies.error = FrameError("not these pages")
    expectation = cluster.expect("r1", on_part=copies)
    await push_part(cluster, sender, 0)
    with pytest.raises(FrameError, match="not these pages"):
        await expectation.sealed(3.0)
    with pytest.raises(PushRejected) as refusal:
        await push_part(cluster, sender, 1)
    assert refusal.value.reason is RejectReason.CLOSED
    await cluster.serves("r2", sender)


async def test_cancelled_with_a_copy_under_way(cluster: Any) -> None:
    """The owner's memory is written until ``settled`` returns, and not afterwards."""
    copies, sender = Copies(), cluster.sender()
    copies.gate.clear()
    expectation = cluster.expect("r1", on_part=copies)
    for number in range(2):
        await push_part(cluster, sender, number)
    await asyncio.sleep(0)
    expectation.cancel()
    settled = asyncio.ensure_future(expectation.settled())
    await asyncio.sleep(0.02)
    assert not settled.done()
    copies.gate.set()
    await settled
    assert len(copies.parts) == 1, "the second copy had not begun"
    with pytest.raises(HandoffError):
        await expectation.sealed(3.0)


async def test_wrong_bytes_in_an_early_part(cluster: Any, faults: Any) -> None:
    async def on_send(number: int, data: Any) -> Any:
        if data.size > 10_000:
            data = np.array(data)
            data[100] ^= 4
        return data

    copies = Copies()
    faults.on_send = on_send
    sender, expectation = cluster.sender(faults=faults), cluster.expect("r1", on_part=copies)
    with pytest.raises(IntegrityError):
        await push_part(cluster, sender, 0)
    with pytest.raises(IntegrityError):
        await expectation.sealed(3.0)
    assert copies.parts == []
