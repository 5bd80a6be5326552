"""Builds and runs one decode worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from stateferry.api.server import service_name, start_server
from stateferry.config import Config, WorkerSection
from stateferry.core.clock import SystemClock
from stateferry.core.ids import Role
from stateferry.core.ticket import TicketDesk, TicketSigner
from stateferry.decode.local_prefill import LocalPrefill
from stateferry.decode.loop import DecodeLoop
from stateferry.decode.servicer import DecodeServicer
from stateferry.scheduler.decode import DecodeScheduler
from stateferry.scheduler.standing import Preemption
from stateferry.transfer.receiver import HandoffReceiver
from stateferry.v1 import worker_pb2, worker_pb2_grpc
from stateferry.worker.host import WorkerHost
from stateferry.worker.links import build_transport, transfer_limits
from stateferry.worker.process import Announce, serve_until_stopped
from stateferry.worker.steering import Steering


@dataclass(frozen=True, slots=True)
class _Work:
    """All that a decode worker has to do."""

    sequences: DecodeScheduler
    prompts: LocalPrefill

    @property
    def num_active(self) -> int:
        return self.sequences.num_active + self.prompts.num_active

    @property
    def num_waiting(self) -> int:
        return self.sequences.num_waiting

    @property
    def queued_tokens(self) -> int:
        return self.prompts.queued_tokens + self.sequences.queued_tokens


def _preemption(section: WorkerSection, grid: int) -> Preemption | None:
    if not section.preempt:
        return None
    # As much at a time as of prompts that run here, so that the others are not held up for longer.
    return Preemption(grid, max(grid, section.local_prefill_tokens // grid * grid))


async def run_decode(
    config: Config, host: WorkerHost, announce: Announce, stop: asyncio.Event
) -> None:
    """Serve until ``stop`` is set. ``announce`` gets the addresses once requests are welcome."""
    clock, parts = SystemClock(), host.parts
    scheduler = DecodeScheduler(
        parts.cache,
        max_waiting=config.worker.max_queue,
        max_in_flight=parts.steps_in_flight,
        starvation_s=config.worker.starvation_s,
        preemption=_preemption(config.worker, parts.grid),
    )
    loop = DecodeLoop(
        scheduler,
        parts.cache,
        parts.runner,
        host.executor,
        clock,
        host.meter,
        parts.speculator,
    )
    transport = build_transport(config.transfer, config.worker.host, config.worker.transfer_port)
    receiver = HandoffReceiver(
        transport,
        host.key,
        parts.fingerprint,
        transfer_limits(config.transfer),
        clock,
        host.cluster_key,
    )
    desk = TicketDesk(TicketSigner(host.cluster_key), Role.DECODE, host.key, clock)
    steering = Steering(parts.rules)
    prompts = LocalPrefill(
        parts.cache,
        parts.runner,
        loop,
        scheduler,
        clock,
        host.meter,
        limit_tokens=config.worker.local_prefill_tokens,
    )
    servicer = DecodeServicer(
        desk, loop, prompts, parts, steering, receiver, host.meter, config.transfer.seal_timeout_s
    )

    def register(server: grpc.aio.Server) -> Sequence[str]:
        worker_pb2_grpc.add_DecodeServicer_to_server(servicer, server)
        return [service_name(worker_pb2, "Decode")]

    try:
        transfer_address = await receiver.start()
        server = await start_server(config.worker.host, config.worker.port, register)
        description = host.describe(
            Role.DECODE, server.address, transfer_address, preempts=config.worker.preempt
        )
        load = host.load_reporter(_Work(scheduler, prompts))
        await serve_until_stopped(server, loop.run(), host, description, load, announce, stop)
    finally:
        await receiver.close()
        await transport.close()
        steering.close()
