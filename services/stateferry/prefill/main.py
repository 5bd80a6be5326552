"""Builds and runs one prefill worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

from stateferry.api.server import service_name, start_server
from stateferry.config import Config
from stateferry.core.clock import SystemClock
from stateferry.core.ids import Role
from stateferry.core.ticket import TicketDesk, TicketSigner
from stateferry.prefill.loop import PrefillLoop
from stateferry.prefill.servicer import PrefillServicer
from stateferry.scheduler.prefill import PrefillScheduler
from stateferry.transfer.sender import HandoffSender
from stateferry.v1 import worker_pb2, worker_pb2_grpc
from stateferry.worker.host import WorkerHost
from stateferry.worker.links import build_transport, transfer_limits
from stateferry.worker.process import Announce, serve_until_stopped
from stateferry.worker.steering import Steering

log = logging.getLogger(__name__)


async def run_prefill(
    config: Config, host: WorkerHost, announce: Announce, stop: asyncio.Event
) -> None:
    """Serve until ``stop`` is set. ``announce`` gets the addresses once requests are welcome."""
    clock, parts = SystemClock(), host.parts
    scheduler = PrefillScheduler(
        parts.cache,
        grid=parts.grid,
        budget_tokens=config.worker.extend_budget_tokens,
        max_waiting=config.worker.max_queue,
        max_in_flight=parts.steps_in_flight,
        starvation_s=config.worker.starvation_s,
    )
    loop = PrefillLoop(scheduler, parts.cache, parts.runner, host.executor, clock, host.meter)
    transport = build_transport(config.transfer, config.worker.host, port=0)
    # Now, not at the first hand-off: loading UCX takes half a second.
    log.info("transfer: %s", transport.describe())
    sender = HandoffSender(
        transport,
        host.key,
        parts.fingerprint,
        transfer_limits(config.transfer),
        clock,
        host.cluster_key,
    )
    desk = TicketDesk(TicketSigner(host.cluster_key), Role.PREFILL, host.key, clock)
    steering = Steering(parts.rules)
    servicer = PrefillServicer(desk, loop, parts, steering, sender, host.meter)

    def register(server: grpc.aio.Server) -> Sequence[str]:
        worker_pb2_grpc.add_PrefillServicer_to_server(servicer, server)
        return [service_name(worker_pb2, "Prefill")]

    server = await start_server(config.worker.host, config.worker.port, register)
    description = host.describe(Role.PREFILL, server.address, transfer_address=None)
    try:
        await serve_until_stopped(
            server, loop.run(), host, description, host.load_reporter(scheduler), announce, stop
        )
    finally:
        await sender.close()
        await transport.close()
        steering.close()
