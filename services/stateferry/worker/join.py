"""Keeps a worker known to its routers, for as long as it lives."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable

import grpc

from stateferry.api import worker_codec as codec
from stateferry.api.server import open_channel
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.worker import WorkerDescription, WorkerLoad
from stateferry.v1 import membership_pb2, membership_pb2_grpc

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.1
_LONGEST_RETRY_S = 2.0
_DEFAULT_INTERVAL_S = 0.5
_REFUSALS = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
    }
)


class RouterLink:
    """One worker's membership at one router: joins, reports, and joins again after a loss."""

    def __init__(
        self,
        router_address: str,
        description: WorkerDescription,
        load: Callable[[], WorkerLoad],
        key: ClusterKey,
    ) -> None:
        self._router_address = router_address
        self._description = description
        self._load = load
        self._key = key
        self._interval_s = _DEFAULT_INTERVAL_S

    async def run(self) -> None:
        """Stay joined for ever; end it by cancelling, which leaves at once."""
        retry_s = _FIRST_RETRY_S
        async with open_channel(self._router_address) as channel:
            stub = membership_pb2_grpc.MembershipStub(channel)
            while True:
                joined = asyncio.Event()
                try:
                    async for reply in stub.Join(self._reports(joined)):
                        if not joined.is_set():
                            log.info("joined router %s", self._router_address)
                        joined.set()
                        retry_s = _FIRST_RETRY_S
                        self._interval_s = reply.heartbeat_interval_s or _DEFAULT_INTERVAL_S
                except grpc.aio.AioRpcError as error:
                    if joined.is_set() or retry_s == _FIRST_RETRY_S:
                        self._report_loss(error)
                # Jitter, so that a restarted router is not met by all workers in one instant.
                await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))
                retry_s = min(_LONGEST_RETRY_S, retry_s * 2)

    def _report_loss(self, error: grpc.aio.AioRpcError) -> None:
        refused = error.code() in _REFUSALS
        log.log(
            logging.ERROR if refused else logging.WARNING,
            "router %s %s: %s: %s",
            self._router_address,
            "refuses this worker" if refused else "is not reachable",
            error.code().name,
            error.details(),
        )

    async def _reports(self, joined: asyncio.Event) -> AsyncIterator[membership_pb2.WorkerReport]:
        yield codec.join_report(self._description, self._key)
        # A refusal must find no report half written, or gRPC tells of an internal error instead.
        await joined.wait()
        while True:
            yield membership_pb2.WorkerReport(load=codec.load_to_pb(self._load()))
            await asyncio.sleep(self._interval_s)
