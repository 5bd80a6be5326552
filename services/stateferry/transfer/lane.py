"""The sender's side of one (sender, receiver) pair: one connection, one push at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from stateferry.core.errors import (
    FrameError,
    HandshakeMismatch,
    IntegrityError,
    Overloaded,
    PeerLost,
    Unavailable,
)
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.transfer.blocking import copy_with_crc32c, run_sized
from stateferry.transfer.channel import Channel
from stateferry.transfer.frames import (
    DATA_MESSAGE_BYTES,
    FrameType,
    Hello,
    PushRejected,
    RejectReason,
    decode_reason,
    decode_refused,
    encode_hello,
    encode_welcome,
)
from stateferry.transfer.limits import TransferLimits
from stateferry.transfer.manifest import (
    Manifest,
    OutgoingSegment,
    SegmentSpec,
    encode_manifest,
    segment_offsets,
)
from stateferry.transfer.protocol.sending import Answer, PartOffer, SendPhase
from stateferry.transfer.push_mac import PushMac
from stateferry.transfer.staging import StagingBlock, StagingPool
from stateferry.transfer.transport import Transport

_BYE_TIMEOUT_S = 0.2
_SEQUENCE_MASK = 0xFFFFFFFF
_ANSWERS = {
    FrameType.WAITING: Answer.WAIT,
    FrameType.CREDIT: Answer.CREDIT,
    FrameType.REJECT: Answer.REJECT,
    FrameType.SEALED: Answer.SEALED,
    FrameType.FAILED: Answer.FAILED,
}


@dataclass(frozen=True, slots=True)
class SenderShared:
    """What all lanes of one sender use together."""

    transport: Transport
    me: WorkerKey
    fingerprint: Fingerprint
    limits: TransferLimits
    staging: StagingPool
    mac: PushMac


@dataclass(frozen=True, slots=True)
class PushOrder:
    """One push, as its caller wants it."""

    request_id: str
    epoch: int
    payload: bytes
    segments: Sequence[OutgoingSegment]
    part: int = 0
    is_last: bool = True


class _Push:
    """A push under way, and whether its caller still waits for it."""

    def __init__(self, order: PushOrder) -> None:
        self.order = order
        self.staged = asyncio.Event()
        self._is_staging = False
        self._is_abandoned = False

    def begin_staging(self) -> None:
        """From here to ``staged`` the caller's memory is read. Raises PeerLost when too late."""
        if self._is_abandoned:
            raise PeerLost("the push was given up before it began")
        self._is_staging = True

    async def abandon(self) -> None:
        """The caller goes: returns once its memory is not read any more, and never will be."""
        self._is_abandoned = True
        while self._is_staging and not self.staged.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.staged.wait()


class Lane:
    """Connects lazily and again after a failure. A connection in an unknown phase is never used."""

    def __init__(self, address: str, receiver: WorkerKey, shared: SenderShared) -> None:
        self._address = address
        self._receiver = receiver
        self._shared = shared
        self._turn = asyncio.Lock()
        self._closed = False
        self._pushes: set[asyncio.Task[str]] = set()
        self._channel: Channel | None = None
        self._sequence = 0

    @property
    def busy(self) -> bool:
        return bool(self._pushes) or self._turn.locked()

    @property
    def connected(self) -> bool:
        return self._channel is not None and self._channel.connection.alive

    async def push(self, order: PushOrder) -> str:
        """Send one hand-off; returns the name of the transport once the peer has sealed it.

        Raises as HandoffSender.push does. A cancelled caller stops waiting, no more: a push that
        has begun goes on in the background, bounded by its deadline, and the receiver drops it.
        Breaking off would cost every other push its connection.
        """
        if len(self._pushes) >= self._shared.limits.max_queued_pushes:
            raise Overloaded(f"{len(self._pushes)} pushes to {self._receiver} are queued")
        push = _Push(order)
        task = asyncio.ensure_future(self._push_in_turn(push))
        self._pushes.add(task)
        task.add_done_callback(self._push_ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await push.abandon()
            raise

    async def connect(self) -> None:
        """Connect and shake hands now. Raises PeerLost or HandshakeMismatch."""
        deadline_s = asyncio.get_running_loop().time() + self._shared.limits.push_timeout_s
        async with self._own_turn(deadline_s):
            await self._ready()

    async def close(self) -> None:
        """Say goodbye if idle, and break the connection: a push in flight fails with PeerLost."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            if not self._turn.locked():
                with contextlib.suppress(PeerLost):
                    await channel.send(FrameType.BYE, 0, b"", _BYE_TIMEOUT_S)
            channel.connection.abort()
        if self._pushes:
            await asyncio.wait(self._pushes)

    def _push_ended(self, task: asyncio.Task[str]) -> None:
        self._pushes.discard(task)
        if not task.cancelled():
            # Take the exception even if the caller has gone.
            task.exception()

    async def _push_in_turn(self, push: _Push) -> str:
        limits = self._shared.limits
        deadline_s = asyncio.get_running_loop().time() + limits.push_timeout_s
        try:
            async with self._own_turn(deadline_s):
                try:
                    async with asyncio.timeout_at(deadline_s):
                        return await self._push_now(push)
                except TimeoutError as error:
                    raise PeerLost(f"push not done in {limits.push_timeout_s} s") from error
        finally:
            push.staged.set()

    @contextlib.asynccontextmanager
    async def _own_turn(self, deadline_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._turn.acquire()
        except TimeoutError as error:
            raise Overloaded(f"pushes to {self._receiver} are too slow") from error
        try:
            yield
        finally:
            self._turn.release()

    async def _push_now(self, push: _Push) -> str:
        channel, order = await self._ready(), push.order
        offsets, wire_bytes = segment_offsets([segment.size_bytes for segment in order.segments])
        block = await self._shared.staging.acquire(wire_bytes, self._shared.limits.credit_timeout_s)
        try:
            push.begin_staging()
            specs = await run_sized(wire_bytes, lambda: _stage(order.segments, offsets, block))
            push.staged.set()
            body = self._push_body(order, specs)
        except BaseException:
            block.release()
            raise
        self._sequence = (self._sequence + 1) & _SEQUENCE_MASK
        offer = PartOffer(self._sequence)
        try:
            await self._transfer(channel, offer, body, block)
        except (PushRejected, IntegrityError, Overloaded):
            # The peer answered, so both sides know where they are and nobody reads the staging.
            block.release()
            raise
        except BaseException:
            channel.connection.abort()
            end = block.retire if offer.peer_may_read else block.release
            channel.connection.when_idle(end)
            raise
        block.release()
        return channel.connection.name

    def _push_body(self, order: PushOrder, specs: tuple[SegmentSpec, ...]) -> bytes:
        shared = self._shared
        return encode_manifest(
            Manifest(
                request_id=order.request_id,
                epoch=order.epoch,
                sender=shared.me,
                receiver=self._receiver,
                payload=order.payload,
                segments=specs,
                part=order.part,
                is_last=order.is_last,
            )
        )

    async def _transfer(
        self, channel: Channel, offer: PartOffer, body: bytes, block: StagingBlock
    ) -> None:
        limits = self._shared.limits
        body = self._shared.mac.wrap(offer.sequence, body)
        await channel.send(FrameType.PUSH, offer.sequence, body, limits.progress_timeout_s)
        while offer.phase is SendPhase.OFFERED:
            await self._answer(channel, offer)
        await channel.connection.send_run(block.data, DATA_MESSAGE_BYTES, limits.progress_timeout_s)
        offer.sent()
        await self._answer(channel, offer)

    async def _answer(self, channel: Channel, offer: PartOffer) -> None:
        """Feed the next answer to ``offer``. Raises what a refusal means."""
        frame = await channel.read(self._shared.limits.progress_timeout_s)
        answer = _ANSWERS.get(frame.type)
        if answer is None:
            raise FrameError(f"a {frame.type.name} is no answer to a push")
        if offer.answered(frame.sequence, answer) is SendPhase.REFUSED:
            raise _rejection(decode_reason(frame.body))

    async def _ready(self) -> Channel:
        if self._closed:
            raise Unavailable("the sender is closed")
        if self._channel is not None and self._channel.connection.alive:
            return self._channel
        limits = self._shared.limits
        connection = await self._shared.transport.connect(self._address, limits.connect_timeout_s)
        channel = Channel(connection)
        try:
            await self._shake_hands(channel)
        except BaseException:
            connection.abort()
            raise
        if self._closed:
            connection.abort()
            raise Unavailable("the sender was closed meanwhile")
        self._channel = channel
        return channel

    async def _shake_hands(self, channel: Channel) -> None:
        shared, timeout_s = self._shared, self._shared.limits.handshake_timeout_s
        hello = encode_hello(Hello(shared.me, self._receiver, shared.fingerprint))
        await channel.send(FrameType.HELLO, 0, hello, timeout_s)
        answer = await channel.read(timeout_s)
        if answer.type is FrameType.REFUSED:
            refused = decode_refused(answer.body)
            ours = getattr(shared.fingerprint, refused.field, str(self._receiver))
            raise HandshakeMismatch(refused.field, ours, refused.theirs)
        if answer.type is not FrameType.WELCOME:
            raise FrameError(f"a {answer.type.name} where a WELCOME was due")
        if answer.body != encode_welcome(shared.fingerprint):
            raise HandshakeMismatch("fingerprint", shared.fingerprint.digest(), answer.body)


def _rejection(reason: RejectReason) -> PushRejected | Overloaded | IntegrityError:
    if reason is RejectReason.OVERLOADED:
        return Overloaded(f"the receiver: {reason.value}")
    if reason is RejectReason.INTEGRITY:
        return IntegrityError(f"the receiver: {reason.value}")
    return PushRejected(reason)


def _stage(
    segments: Sequence[OutgoingSegment], offsets: Sequence[int], block: StagingBlock
) -> tuple[SegmentSpec, ...]:
    """Copy the segments into ``block``. The checksum is that of the copy: of what is sent."""
    specs, end = [], 0
    for segment, start in zip(segments, offsets, strict=True):
        # The gap may hold bytes of another request.
        block.data[end:start] = 0
        end = start + segment.size_bytes
        copy = block.data[start:end]
        crc = copy_with_crc32c(segment.runs, copy)
        specs.append(
            SegmentSpec(
                kind=segment.kind,
                layer=segment.layer,
                dtype=segment.dtype,
                shape=segment.shape,
                size_bytes=copy.nbytes,
                crc32c=crc,
                start=segment.start,
            )
        )
    return tuple(specs)
