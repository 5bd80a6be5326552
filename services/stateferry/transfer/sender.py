"""The prefill worker's end: pushes a finished prompt's state to a decode worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from stateferry.core.clock import Clock
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.errors import Overloaded, Unavailable
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.transfer.lane import Lane, PushOrder, SenderShared
from stateferry.transfer.limits import TransferLimits
from stateferry.transfer.manifest import OutgoingSegment
from stateferry.transfer.push_mac import PushMac
from stateferry.transfer.staging import StagingPool
from stateferry.transfer.transport import Transport


@dataclass(frozen=True, slots=True)
class PushReceipt:
    """A sealed push. ``duration_s`` includes waiting; ``transport`` is the one really used."""

    size_bytes: int
    duration_s: float
    transport: str


@dataclass(frozen=True, slots=True)
class SenderSnapshot:
    """For metrics: monotonic totals, and what is held right now."""

    pushes_sealed: int
    pushes_failed: int
    pushed_bytes: int
    staging_in_use_bytes: int
    connections: int


class HandoffSender:
    """Keeps one connection per receiver. Does not own ``transport``.

    Every segment is copied once, into staging of this object, and sent from there: the caller's
    memory is never under a transfer. Over UCX's shared memory the receiver then copies once more,
    straight from that staging into its own.
    """

    def __init__(
        self,
        transport: Transport,
        me: WorkerKey,
        fingerprint: Fingerprint,
        limits: TransferLimits,
        clock: Clock,
        cluster_key: ClusterKey | None = None,
    ) -> None:
        """With a ``cluster_key``, pushes are signed with it, for receivers that have it too."""
        self._shared = SenderShared(
            transport,
            me,
            fingerprint,
            limits,
            StagingPool(limits.staging_bytes),
            PushMac(cluster_key),
        )
        self._clock = clock
        self._lanes: dict[tuple[str, WorkerKey], Lane] = {}
        self._preparing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._sealed = 0
        self._failed = 0
        self._pushed_bytes = 0

    async def push(
        self,
        address: str,
        receiver: WorkerKey,
        request_id: str,
        epoch: int,
        payload: bytes,
        segments: Sequence[OutgoingSegment],
    ) -> PushReceipt:
        """Push one sequence's state and wait until ``receiver`` has sealed it.

        The segments must not change before this returns or raises; after that they may. When
        cancelled, a push that has begun goes on in the background. Nothing is retried.

        Raises PushRejected when the receiver will not have it, Overloaded when a queue or staging
        is full, IntegrityError when wrong bytes arrived, HandshakeMismatch, FrameError for a
        manifest beyond the limits or a peer that talks nonsense, PeerLost for all that breaks.
        """
        order = PushOrder(request_id, epoch, payload, segments)
        return await self.push_part(address, receiver, order)

    async def push_part(self, address: str, receiver: WorkerKey, order: PushOrder) -> PushReceipt:
        """Push one part of a hand-off, and wait until its checksums held over there.

        Parts of an attempt go one after the other, numbered from 0; the last one seals it. What
        was turned away with Overloaded may be pushed again, under its number. Otherwise as
        ``push``, for all parts together.
        """
        started_s = self._clock.monotonic_s()
        size_bytes = sum(segment.size_bytes for segment in order.segments)
        lane = self._lane(address, receiver)
        try:
            transport = await lane.push(order)
        except BaseException:
            self._failed += 1
            raise
        self._sealed += order.is_last
        self._pushed_bytes += size_bytes
        return PushReceipt(size_bytes, self._clock.monotonic_s() - started_s, transport)

    def prepare(self, address: str, receiver: WorkerKey) -> None:
        """Begin to connect, ahead of a push that is sure to come. What fails shows at the push."""
        lane = self._lane(address, receiver)
        if not lane.connected and not lane.busy:
            task = asyncio.ensure_future(lane.connect())
            self._preparing.add(task)
            task.add_done_callback(self._prepared)

    async def connect(self, address: str, receiver: WorkerKey) -> None:
        """Connect and compare fingerprints ahead of the first push.

        Raises HandshakeMismatch naming the field, or PeerLost.
        """
        await self._lane(address, receiver).connect()

    def snapshot(self) -> SenderSnapshot:
        return SenderSnapshot(
            pushes_sealed=self._sealed,
            pushes_failed=self._failed,
            pushed_bytes=self._pushed_bytes,
            staging_in_use_bytes=self._shared.staging.in_use_bytes,
            connections=sum(lane.connected for lane in self._lanes.values()),
        )

    async def close(self) -> None:
        """Break all connections; pushes in flight fail with PeerLost. Idempotent."""
        self._closed = True
        lanes = list(self._lanes.values())
        self._lanes.clear()
        for lane in lanes:
            await lane.close()

    def _lane(self, address: str, receiver: WorkerKey) -> Lane:
        if self._closed:
            raise Unavailable("the sender is closed")
        lane = self._lanes.get((address, receiver))
        if lane is None:
            self._make_room()
            lane = self._lanes[(address, receiver)] = Lane(address, receiver, self._shared)
        return lane

    def _prepared(self, task: asyncio.Task[None]) -> None:
        self._preparing.discard(task)
        if not task.cancelled():
            # Take it: the push will meet the same trouble and report it.
            task.exception()

    def _make_room(self) -> None:
        """Forget lanes without a connection: receivers that restart leave one behind each time."""
        for key, lane in list(self._lanes.items()):
            if not lane.busy and not lane.connected:
                del self._lanes[key]
        if len(self._lanes) >= self._shared.limits.max_connections:
            raise Overloaded(f"connected to {len(self._lanes)} receivers already")
