"""The router's door for workers.

::

    worker --Join: description, load, load, ...--> MembershipServicer --> WorkerRegistry
    worker <--JoinReply: interval----------------        |
                                        stream ends --> leave
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc

from stateferry.api import worker_codec as codec
from stateferry.api.status import streams_errors
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.errors import InvalidRequest
from stateferry.core.ids import Role
from stateferry.core.worker import WorkerDescription
from stateferry.router.membership import Registration, WorkerRegistry
from stateferry.router.model_info import ModelInfo
from stateferry.v1 import membership_pb2, membership_pb2_grpc

log = logging.getLogger(__name__)


def _log_failure(error: Exception) -> None:
    log.warning("membership: %s: %s", type(error).__name__, error)


class MembershipServicer(membership_pb2_grpc.MembershipServicer):
    """One Join stream is one registration; its end, however it comes, is the worker's leaving."""

    def __init__(
        self,
        registry: WorkerRegistry,
        model: ModelInfo,
        key: ClusterKey,
        heartbeat_interval_s: float,
    ) -> None:
        self._registry = registry
        self._model = model
        self._key = key
        self._heartbeat_interval_s = heartbeat_interval_s
        self._is_closing = False

    def close(self) -> None:
        """End every stream at its next report."""
        self._is_closing = True

    @streams_errors(_log_failure)
    async def Join(
        self,
        request_iterator: AsyncIterator[membership_pb2.WorkerReport],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncGenerator[membership_pb2.JoinReply, None]:
        registration: Registration | None = None
        try:
            async for report in request_iterator:
                if self._is_closing:
                    return
                kind = report.WhichOneof("report")
                if registration is None:
                    if kind != "description":
                        raise InvalidRequest("description", "must come first")
                    worker = codec.description_from_join(report.description, self._key)
                    registration = self._join(worker)
                    yield membership_pb2.JoinReply(heartbeat_interval_s=self._heartbeat_interval_s)
                elif kind == "load":
                    self._registry.report(registration, codec.load_from_pb(report.load))
                else:
                    raise InvalidRequest("load", "must follow the description")
        finally:
            if registration is not None:
                self._registry.leave(registration)

    async def ListWorkers(
        self,
        request: membership_pb2.ListWorkersRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> membership_pb2.ListWorkersResponse:
        response = membership_pb2.ListWorkersResponse()
        for role in Role:
            for view in self._registry.views(role):
                response.workers.add(
                    description=codec.description_to_pb(view.description),
                    load=None if view.load is None else codec.load_to_pb(view.load),
                    dispatched_requests=view.dispatched_requests,
                    silence_s=view.silence_s,
                )
        return response

    def _join(self, worker: WorkerDescription) -> Registration:
        """Raises HandshakeMismatch where the worker does not serve this router's model."""
        live = [view for role in Role for view in self._registry.views(role)]
        self._model.check_serves(worker, live[0].description.fingerprint if live else None)
        registration = self._registry.join(worker)
        log.info("%s worker %s joined: %s", worker.role.value, worker.key, worker.grpc_address)
        return registration
