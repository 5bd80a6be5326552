"""The decode worker's end: expects pushes, and takes in those and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from dataclasses import dataclass

from stateferry.core.clock import Clock
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.errors import Unavailable
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.transfer.expectation import (
    Expectation,
    ExpectationBook,
    OnPart,
    ReceivedHandoff,
)
from stateferry.transfer.limits import TransferLimits
from stateferry.transfer.protocol.receiving import ExpectedPush
from stateferry.transfer.push_mac import PushMac
from stateferry.transfer.session import ReceiverCounters, ReceiverShared, Session
from stateferry.transfer.staging import StagingPool
from stateferry.transfer.transport import Connection, Transport

__all__ = ["Expectation", "HandoffReceiver", "ReceivedHandoff", "ReceiverSnapshot"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReceiverSnapshot:
    """For metrics: monotonic totals, and what is held right now."""

    totals: ReceiverCounters
    staging_in_use_bytes: int
    expectations: int
    connections: int


class HandoffReceiver:
    """Accepts connections from prefill workers. Does not own ``transport``.

    The first message of any peer is not trusted: nothing is allocated for it, and no address or
    size from the wire is used before it was checked against an expectation.
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
        """With a ``cluster_key``, only pushes signed with it are honoured."""
        self._transport = transport
        self._shared = ReceiverShared(
            me=me,
            fingerprint=fingerprint,
            limits=limits,
            clock=clock,
            staging=StagingPool(limits.staging_bytes),
            book=ExpectationBook(me, limits.max_expectations),
            counters=ReceiverCounters(),
            mac=PushMac(cluster_key),
        )
        self._sessions: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> str:
        """Listen. Returns the address that senders connect to."""
        return await self._transport.listen(self._accept)

    def expect(
        self,
        request_id: str,
        epoch: int,
        sender: WorkerKey,
        max_bytes: int,
        on_part: OnPart | None = None,
    ) -> Expectation:
        """Allow one hand-off, of at most ``max_bytes`` of segments. Call it before it may come.

        With ``on_part`` it may come in parts: each but the last is given to that, in order, and its
        staging is free again once that has ended; an error of it ends the hand-off. Raises
        Overloaded when too many are open, Refused for an attempt that was expected before,
        Unavailable after ``close``.
        """
        if self._closed:
            raise Unavailable("the receiver is closed")
        push = ExpectedPush(request_id, epoch, sender, max_bytes, in_parts=on_part is not None)
        return self._shared.book.add(push, on_part)

    def snapshot(self) -> ReceiverSnapshot:
        return ReceiverSnapshot(
            totals=dataclasses.replace(self._shared.counters),
            staging_in_use_bytes=self._shared.staging.in_use_bytes,
            expectations=len(self._shared.book),
            connections=len(self._sessions),
        )

    async def close(self) -> None:
        """Break all connections; what is still expected fails with Unavailable. Idempotent."""
        self._closed = True
        self._shared.book.fail_all(Unavailable("the receiver is closing"))
        for session in self._sessions:
            session.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions)

    def _accept(self, connection: Connection) -> None:
        if self._closed or len(self._sessions) >= self._shared.limits.max_connections:
            self._shared.counters.connections_refused += 1
            connection.abort()
            return
        session = asyncio.ensure_future(Session(connection, self._shared).run())
        self._sessions.add(session)
        session.add_done_callback(self._ended)

    def _ended(self, session: asyncio.Task[None]) -> None:
        self._sessions.discard(session)
        if not session.cancelled() and (error := session.exception()) is not None:
            log.error("transfer: a session failed", exc_info=error)
