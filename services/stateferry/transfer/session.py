"""The receiver's side of one connection: handshake, then one push after the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

from stateferry.core.clock import Clock
from stateferry.core.errors import (
    FrameError,
    HandshakeMismatch,
    IntegrityError,
    Overloaded,
    PeerLost,
)
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.transfer.arrival import ArrivalCheck
from stateferry.transfer.blocking import ended, run_sized
from stateferry.transfer.channel import Channel
from stateferry.transfer.expectation import Expectation, ExpectationBook, ReceivedHandoff
from stateferry.transfer.frames import (
    DATA_MESSAGE_BYTES,
    Frame,
    FrameType,
    RefusedHello,
    RejectReason,
    decode_hello,
    encode_reason,
    encode_refused,
    encode_welcome,
)
from stateferry.transfer.limits import TransferLimits
from stateferry.transfer.manifest import Manifest, Segment, decode_manifest, segment_offsets
from stateferry.transfer.push_mac import PushMac
from stateferry.transfer.staging import StagingBlock, StagingPool
from stateferry.transfer.transport import Connection

log = logging.getLogger(__name__)

# Signs of life to a sender that waits for staging, per deadline that it has.
_SIGNS_PER_DEADLINE = 4


@dataclass(slots=True)
class ReceiverCounters:
    """Monotonic totals of one receiver."""

    received_bytes: int = 0
    parts_received: int = 0
    handoffs_sealed: int = 0
    handoffs_failed: int = 0
    pushes_rejected: int = 0
    handshakes_refused: int = 0
    frames_refused: int = 0
    connections_lost: int = 0
    connections_refused: int = 0


@dataclass(frozen=True, slots=True)
class ReceiverShared:
    """What all sessions of one receiver use together."""

    me: WorkerKey
    fingerprint: Fingerprint
    limits: TransferLimits
    clock: Clock
    staging: StagingPool
    book: ExpectationBook
    counters: ReceiverCounters
    mac: PushMac


class Session:
    """Serves one connection until it ends. A failure ends this connection and its push only."""

    def __init__(self, connection: Connection, shared: ReceiverShared) -> None:
        self._connection = connection
        self._channel = Channel(connection)
        self._shared = shared

    async def run(self) -> None:
        """Never raises, except when cancelled. The connection is broken afterwards."""
        counters = self._shared.counters
        try:
            sender = await self._handshake()
            while True:
                frame = await self._channel.read(timeout_s=None)
                if frame.type is FrameType.BYE:
                    return
                if frame.type is not FrameType.PUSH:
                    raise FrameError(f"a {frame.type.name} where a PUSH was due")
                await self._serve_push(frame, sender)
        except FrameError as error:
            counters.frames_refused += 1
            log.warning("transfer: connection dropped: %s", error)
        except HandshakeMismatch as error:
            log.warning("transfer: peer refused: %s", error)
        except PeerLost as error:
            counters.connections_lost += 1
            log.info("transfer: %s", error)
        finally:
            self._connection.abort()

    async def _handshake(self) -> WorkerKey:
        shared, timeout_s = self._shared, self._shared.limits.handshake_timeout_s
        frame = await self._channel.read(timeout_s)
        if frame.type is not FrameType.HELLO:
            raise FrameError(f"a {frame.type.name} where a HELLO was due")
        hello = decode_hello(frame.body)
        try:
            shared.fingerprint.check_matches(hello.fingerprint)
            if hello.receiver != shared.me:
                raise HandshakeMismatch("receiver", str(shared.me), str(hello.receiver))
        except HandshakeMismatch as mismatch:
            shared.counters.handshakes_refused += 1
            await self._refuse(mismatch)
            raise
        welcome = encode_welcome(shared.fingerprint)
        await self._channel.send(FrameType.WELCOME, 0, welcome, timeout_s)
        return hello.sender

    async def _refuse(self, mismatch: HandshakeMismatch) -> None:
        shared, timeout_s = self._shared, self._shared.limits.handshake_timeout_s
        ours = getattr(shared.fingerprint, mismatch.field, shared.me)
        body = encode_refused(RefusedHello(mismatch.field, str(ours)))
        # Breaking the connection at once could overtake the answer: wait until the peer has gone.
        with contextlib.suppress(PeerLost, FrameError):
            await self._channel.send(FrameType.REFUSED, 0, body, timeout_s)
            await self._channel.read(timeout_s)

    async def _serve_push(self, frame: Frame, sender: WorkerKey) -> None:
        started_s = self._shared.clock.monotonic_s()
        manifest = decode_manifest(self._shared.mac.unwrap(frame.sequence, frame.body))
        claimed = self._admit(manifest, sender)
        if isinstance(claimed, RejectReason):
            await self._reject(frame.sequence, claimed)
            return
        try:
            block = await self._grant(frame.sequence, claimed, _wire_bytes(manifest))
            if isinstance(block, RejectReason):
                await self._reject(frame.sequence, block)
                return
            await self._take_in(frame.sequence, manifest, claimed, block, started_s)
        except BaseException as error:
            if not claimed.outcome.done():
                self._shared.counters.handoffs_failed += 1
            lost = PeerLost(f"the push from {sender} broke off: {error!r}")
            lost.__cause__ = error
            claimed.fail(lost)
            raise

    def _admit(self, manifest: Manifest, sender: WorkerKey) -> Expectation | RejectReason:
        limits = self._shared.limits
        most_bytes = min(limits.max_handoff_bytes, self._shared.staging.budget_bytes)
        if _wire_bytes(manifest) > most_bytes:
            return RejectReason.OVERSIZE
        return self._shared.book.claim(manifest, sender)

    async def _reject(self, sequence: int, reason: RejectReason) -> None:
        self._shared.counters.pushes_rejected += 1
        await self._answer(FrameType.REJECT, sequence, encode_reason(reason))

    async def _answer(self, frame_type: FrameType, sequence: int, body: bytes = b"") -> None:
        timeout_s = self._shared.limits.progress_timeout_s
        await self._channel.send(frame_type, sequence, body, timeout_s)

    async def _grant(
        self, sequence: int, expectation: Expectation, size_bytes: int
    ) -> StagingBlock | RejectReason:
        """Staging for a claimed push, or why there is none. Raises PeerLost."""
        limits = self._shared.limits
        interval_s = limits.progress_timeout_s / _SIGNS_PER_DEADLINE
        acquiring = asyncio.ensure_future(
            self._shared.staging.acquire(size_bytes, limits.credit_timeout_s)
        )
        either: set[asyncio.Future[Any]] = {acquiring, expectation.outcome}
        try:
            while True:
                done, _ = await asyncio.wait(
                    either, timeout=interval_s, return_when=asyncio.FIRST_COMPLETED
                )
                if done:
                    break
                # Also finds out whether the sender is still there.
                await self._answer(FrameType.WAITING, sequence)
            if not expectation.outcome.done():
                return acquiring.result()
        except Overloaded:
            expectation.postpone()
            return RejectReason.OVERLOADED
        except BaseException:
            _abandon(acquiring)
            raise
        _abandon(acquiring)
        return RejectReason.CLOSED

    async def _take_in(
        self,
        sequence: int,
        manifest: Manifest,
        expectation: Expectation,
        block: StagingBlock,
        started_s: float,
    ) -> None:
        try:
            await self._answer(FrameType.CREDIT, sequence)
            segments = await self._receive_data(manifest, block)
        except IntegrityError as error:
            block.release()
            self._shared.counters.handoffs_failed += 1
            expectation.fail(error)
            # All messages of this push were received, so the connection is in a known phase.
            await self._fail(sequence, RejectReason.INTEGRITY)
            return
        except BaseException:
            # A receive that was given up may still write; its end frees the staging.
            self._connection.abort()
            self._connection.when_idle(block.release)
            raise
        duration_s = self._shared.clock.monotonic_s() - started_s
        received = ReceivedHandoff(manifest, segments, block, self._connection.name, duration_s)
        if not expectation.land(received):
            received.release()
            await self._fail(sequence, RejectReason.CLOSED)
            return
        self._shared.counters.handoffs_sealed += manifest.is_last
        self._shared.counters.parts_received += 1
        self._shared.counters.received_bytes += manifest.size_bytes
        await self._answer(FrameType.SEALED, sequence)

    async def _fail(self, sequence: int, reason: RejectReason) -> None:
        await self._answer(FrameType.FAILED, sequence, encode_reason(reason))

    async def _receive_data(self, manifest: Manifest, block: StagingBlock) -> list[Segment]:
        """Receive all messages, and check each while the next one arrives. Raises IntegrityError
        after the last one; returns or raises only when no thread reads ``block`` any more."""
        timeout_s = self._shared.limits.progress_timeout_s
        check = ArrivalCheck(manifest.segments)
        checking: asyncio.Future[None] | None = None
        arriving = self._connection.recv_run(block.data, DATA_MESSAGE_BYTES, timeout_s)
        try:
            async with contextlib.aclosing(arriving):
                async for end in arriving:
                    if checking is not None:
                        await ended(checking)
                    checking = _started(check, block, end)
        finally:
            if checking is not None:
                await ended(checking)
        check.conclude()
        return _as_segments(manifest, block)


def _wire_bytes(manifest: Manifest) -> int:
    return segment_offsets([spec.size_bytes for spec in manifest.segments])[1]


def _started(check: ArrivalCheck, block: StagingBlock, end: int) -> asyncio.Future[None]:
    """Check up to ``end``, in a thread when that is much."""
    run = block.data[check.end : end]
    return asyncio.ensure_future(run_sized(run.size, lambda: check.advance(run)))


def _as_segments(manifest: Manifest, block: StagingBlock) -> list[Segment]:
    """The segments as views of ``block``."""
    offsets, _ = segment_offsets([spec.size_bytes for spec in manifest.segments])
    segments = []
    for spec, start in zip(manifest.segments, offsets, strict=True):
        data = block.data[start : start + spec.size_bytes]
        segments.append(Segment(spec.kind, spec.layer, spec.dtype, spec.shape, data, spec.start))
    return segments


def _abandon(acquiring: asyncio.Future[StagingBlock]) -> None:
    """Stop waiting for staging, or give it back if it has just come."""

    def give_back(done: asyncio.Future[StagingBlock]) -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().release()

    acquiring.cancel()
    acquiring.add_done_callback(give_back)
