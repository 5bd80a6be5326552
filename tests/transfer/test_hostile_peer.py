"""A peer that speaks the protocol wrongly: refused, and the receiver goes on serving others."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from stateferry.core.errors import FrameError, PeerLost
from stateferry.transfer.blocking import crc32c
from stateferry.transfer.channel import Channel
from stateferry.transfer.frames import (
    DATA_MESSAGE_BYTES,
    Frame,
    FrameType,
    Hello,
    RefusedHello,
    RejectReason,
    encode_frame,
    encode_hello,
    encode_reason,
    encode_refused,
    encode_welcome,
)
from stateferry.transfer.inproc import InprocTransport
from stateferry.transfer.manifest import Manifest, SegmentSpec, encode_manifest

pytestmark = pytest.mark.asyncio
TIMEOUT_S = 2.0


class RawPeer:
    """Sends what it is told to, well formed or not."""

    def __init__(self, cluster: Any, channel: Channel) -> None:
        self.cluster = cluster
        self.channel = channel

    @classmethod
    async def connect(cls, cluster: Any) -> RawPeer:
        connection = await InprocTransport(cluster.network).connect(cluster.address, 1.0)
        return cls(cluster, Channel(connection))

    async def greet(self) -> None:
        cluster = self.cluster
        hello = encode_hello(Hello(cluster.prefill, cluster.decode, cluster.fingerprint))
        await self.channel.send(FrameType.HELLO, 0, hello, TIMEOUT_S)
        assert (await self.channel.read(TIMEOUT_S)).type is FrameType.WELCOME

    async def send(self, message: bytes) -> None:
        await self.channel.connection.send(np.frombuffer(message, np.uint8), TIMEOUT_S)

    async def is_dropped(self) -> bool:
        """Whether the receiver hangs up without an answer."""
        try:
            await self.channel.read(TIMEOUT_S)
        except PeerLost as error:
            return "no progress" not in str(error)
        return False


def push_body(cluster: Any, request_id: str, **changes: Any) -> bytes:
    specs = tuple(
        SegmentSpec(s.kind, s.layer, s.dtype, s.shape, s.data.nbytes, crc32c(s.data))
        for s in cluster.segments()
    )
    fields = {
        "request_id": request_id,
        "epoch": 1,
        "sender": cluster.prefill,
        "receiver": cluster.decode,
        "payload": b"",
        "segments": specs,
    }
    return encode_manifest(Manifest(**(fields | changes)))


@pytest.mark.parametrize("greeted", [False, True])
async def test_thousands_of_damaged_messages(cluster: Any, greeted: bool) -> None:
    """Bits flipped, cut, stretched or replaced: the connection is dropped, and only that."""
    rng = random.Random(99 + greeted)
    expectation = cluster.expect("target")
    if greeted:
        good = encode_frame(Frame(FrameType.PUSH, 1, push_body(cluster, "target")))
    else:
        hello = Hello(cluster.prefill, cluster.decode, cluster.fingerprint)
        good = encode_frame(Frame(FrameType.HELLO, 0, encode_hello(hello)))
    for _ in range(1500):
        peer = await RawPeer.connect(cluster)
        if greeted:
            await peer.greet()
        await peer.send(_damage(rng, good))
        assert await peer.is_dropped()
    assert expectation.is_free
    expectation.cancel()
    assert cluster.receiver.snapshot().totals.frames_refused == 1500
    assert cluster.receiver._shared.staging.mapped_bytes == 0
    await cluster.serves("next")


def _damage(rng: random.Random, good: bytes) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return good[: rng.randrange(len(good))]
    if kind == 1:
        return rng.randbytes(rng.randrange(1, 2000))
    damaged = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    if bytes(damaged) == good:
        damaged[0] ^= 1
    return bytes(damaged) + rng.randbytes(rng.randrange(50) if kind == 3 else 0)


async def test_damaged_manifests_behind_a_right_checksum(cluster: Any) -> None:
    """The frame is intact, the manifest in it is not: never an answer that lets data in wrongly."""
    rng = random.Random(4)
    body = push_body(cluster, "target")
    expectation = cluster.expect("target")
    answers = {"dropped": 0, "rejected": 0, "credited": 0}
    for _ in range(1000):
        mutated = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
        peer = await RawPeer.connect(cluster)
        await peer.greet()
        await peer.send(encode_frame(Frame(FrameType.PUSH, 1, bytes(mutated))))
        try:
            answer = await peer.channel.read(TIMEOUT_S)
        except PeerLost:
            answers["dropped"] += 1
            continue
        answers["credited" if answer.type is FrameType.CREDIT else "rejected"] += 1
        if answer.type is FrameType.CREDIT:
            # A checksum or a label was hit. Break off; the next one gets a new reservation.
            peer.channel.connection.abort()
            with pytest.raises(PeerLost):
                await expectation.sealed(TIMEOUT_S)
            body = push_body(cluster, f"target-{answers['credited']}")
            expectation = cluster.expect(f"target-{answers['credited']}")
        peer.channel.connection.abort()
    expectation.cancel()
    assert all(answers.values()), answers
    await cluster.staging_is_free()
    await cluster.serves("next")


async def test_every_flipped_bit_of_the_data_is_found(cluster: Any) -> None:
    rng = random.Random(1)
    peer = await RawPeer.connect(cluster)
    await peer.greet()
    from stateferry.transfer.manifest import segment_offsets

    segments = cluster.segments()
    offsets, end = segment_offsets([s.data.nbytes for s in segments])
    run = np.zeros(end, np.uint8)
    for segment, start in zip(segments, offsets, strict=True):
        run[start : start + segment.data.nbytes] = segment.data
    for n in range(400):
        expectation = cluster.expect(f"r{n}")
        body = push_body(cluster, f"r{n}")
        await peer.channel.send(FrameType.PUSH, n, body, TIMEOUT_S)
        assert (await peer.channel.read(TIMEOUT_S)).type is FrameType.CREDIT
        which = rng.randrange(len(segments))
        at = offsets[which] + rng.randrange(segments[which].data.nbytes)
        flipped = run.copy()
        flipped[at] ^= 1 << rng.randrange(8)
        await peer.channel.connection.send(flipped, TIMEOUT_S)
        answer = await peer.channel.read(TIMEOUT_S)
        assert (answer.type, answer.sequence) == (FrameType.FAILED, n)
        assert expectation.outcome.exception() is not None
    assert cluster.receiver.snapshot().connections == 1
    peer.channel.connection.abort()
    await cluster.serves("next")


@pytest.mark.parametrize(
    "frame_type", [t for t in FrameType if t not in (FrameType.PUSH, FrameType.BYE)]
)
async def test_messages_out_of_turn(cluster: Any, frame_type: FrameType) -> None:
    expectation = cluster.expect("target")
    peer = await RawPeer.connect(cluster)
    await peer.greet()
    await peer.send(encode_frame(Frame(frame_type, 1, push_body(cluster, "target"))))
    assert await peer.is_dropped()
    assert expectation.is_free
    expectation.cancel()
    await cluster.serves("next")


async def test_data_that_never_comes_costs_one_deadline(cluster: Any) -> None:
    expectation = cluster.expect("target")
    peer = await RawPeer.connect(cluster)
    await peer.greet()
    await peer.send(encode_frame(Frame(FrameType.PUSH, 1, push_body(cluster, "target"))))
    assert (await peer.channel.read(TIMEOUT_S)).type is FrameType.CREDIT
    with pytest.raises(PeerLost, match="no progress"):
        await expectation.sealed(TIMEOUT_S)
    await cluster.staging_is_free()
    assert await peer.is_dropped()


async def test_push_without_hello_is_dropped(cluster: Any) -> None:
    cluster.expect("target")
    peer = await RawPeer.connect(cluster)
    await peer.send(encode_frame(Frame(FrameType.PUSH, 1, push_body(cluster, "target"))))
    assert await peer.is_dropped()
    cluster.receiver._shared.book.fail_all(PeerLost("end of test"))


@pytest.mark.parametrize("size_bytes", [0, 1, 4, 19])
async def test_short_message_is_not_completed_by_an_older_one(
    cluster: Any, size_bytes: int
) -> None:
    peer = await RawPeer.connect(cluster)
    await peer.greet()
    message = encode_frame(Frame(FrameType.PUSH, 1, push_body(cluster, "unexpected")))
    await peer.send(message)
    assert (await peer.channel.read(TIMEOUT_S)).type is FrameType.REJECT
    await peer.send(message[:size_bytes])
    assert await peer.is_dropped()


async def test_silent_connection_is_dropped(cluster: Any) -> None:
    peer = await RawPeer.connect(cluster)
    async with asyncio.timeout(1.5):
        assert await peer.is_dropped()
    assert cluster.receiver.snapshot().connections == 0


async def test_manifest_may_not_name_another_sender(cluster: Any) -> None:
    from dataclasses import replace

    other = replace(cluster.prefill, incarnation=99)
    expectation = cluster.expect("target", sender=other)
    peer = await RawPeer.connect(cluster)
    await peer.greet()
    body = push_body(cluster, "target", sender=other)
    await peer.channel.send(FrameType.PUSH, 1, body, TIMEOUT_S)
    answer = await peer.channel.read(TIMEOUT_S)
    assert answer.body == encode_reason(RejectReason.WRONG_SENDER)
    assert expectation.is_free
    expectation.cancel()
    peer.channel.connection.abort()


async def test_control_message_longer_than_the_buffer(cluster: Any) -> None:
    peer = await RawPeer.connect(cluster)
    await peer.send(bytes(1 << 20))
    assert await peer.is_dropped()


@pytest.mark.parametrize("answers", ["garbage", "wrong_type", "wrong_sequence", "wrong_digest"])
async def test_sender_survives_a_hostile_receiver(cluster: Any, answers: str) -> None:
    async def misbehave(connection: Any) -> None:
        channel = Channel(connection)
        await channel.read(TIMEOUT_S)
        if answers == "garbage":
            await connection.send(np.full(3000, 0xAB, np.uint8), TIMEOUT_S)
            return
        welcome = b"x" * 32 if answers == "wrong_digest" else encode_welcome(cluster.fingerprint)
        await channel.send(FrameType.WELCOME, 0, welcome, TIMEOUT_S)
        if answers == "wrong_digest":
            return
        push = await channel.read(TIMEOUT_S)
        if answers == "wrong_type":
            await channel.send(FrameType.SEALED, push.sequence, b"", TIMEOUT_S)
        else:
            await channel.send(FrameType.CREDIT, push.sequence + 1, b"", TIMEOUT_S)

    tasks: list[Any] = []
    address = cluster.network.add(lambda c: tasks.append(asyncio.ensure_future(misbehave(c))))
    sender = cluster.sender()
    from stateferry.core.errors import HandshakeMismatch

    wanted = HandshakeMismatch if answers == "wrong_digest" else FrameError
    with pytest.raises(wanted):
        await cluster.push(sender, "r1", address=address)
    assert sender.snapshot().connections == 0
    await cluster.serves("r2", sender)
    await asyncio.gather(*tasks)


async def test_refusal_of_an_unknown_field_is_reported(cluster: Any) -> None:
    """A newer receiver may compare more than this sender knows of."""

    async def refuse(connection: Any) -> None:
        channel = Channel(connection)
        await channel.read(TIMEOUT_S)
        body = encode_refused(RefusedHello("tensor_parallel", "4"))
        await channel.send(FrameType.REFUSED, 0, body, TIMEOUT_S)

    tasks: list[Any] = []
    address = cluster.network.add(lambda c: tasks.append(asyncio.ensure_future(refuse(c))))
    from stateferry.core.errors import HandshakeMismatch

    with pytest.raises(HandshakeMismatch, match="tensor_parallel"):
        await cluster.push(cluster.sender(), "r1", address=address)
    await asyncio.gather(*tasks)


async def test_data_message_longer_than_agreed_breaks_the_push_only(cluster: Any) -> None:
    expectation = cluster.expect("r1")
    peer = await RawPeer.connect(cluster)
    await peer.greet()
    await peer.channel.send(FrameType.PUSH, 1, push_body(cluster, "r1"), TIMEOUT_S)
    await peer.channel.read(TIMEOUT_S)
    await peer.send(bytes(DATA_MESSAGE_BYTES + 1))
    with pytest.raises(PeerLost):
        await expectation.sealed(TIMEOUT_S)
    assert await peer.is_dropped()
    await cluster.serves("next")
