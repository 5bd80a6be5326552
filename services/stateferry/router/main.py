"""Builds and runs the router process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

import stateferry
from stateferry.api.inference_codec import RequestLimits
from stateferry.api.server import open_channel, service_name, start_server
from stateferry.config import Config
from stateferry.core.clock import Clock, SystemClock
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.errors import ModelError
from stateferry.core.ticket import TicketSigner
from stateferry.guided.compiler import GuideCompiler
from stateferry.router.admission import Admission, AdmissionLimits
from stateferry.router.channels import WorkerChannels
from stateferry.router.generate import Generation, TicketOffice, Workers
from stateferry.router.guides import GuideGate
from stateferry.router.intake import Backend, Door
from stateferry.router.loss import LossBoard
from stateferry.router.membership import WorkerRegistry
from stateferry.router.membership_servicer import MembershipServicer
from stateferry.router.model_info import ModelInfo, read_model_info
from stateferry.router.observer import RouterObserver
from stateferry.router.second_chances import FailoverLimits
from stateferry.router.servicer import SERVICE_NAME, InferenceServicer
from stateferry.router.text import Tokenizer
from stateferry.router.workers import WorkerWatch
from stateferry.telemetry.exporter import start_exporter
from stateferry.telemetry.metrics import RouterMetrics, new_registry, set_build_info
from stateferry.v1 import membership_pb2, membership_pb2_grpc

Announce = Callable[[dict[str, str]], None]

# On a stop, how long streams in flight may go on.
GRACE_S = 5.0


class OpenedDoor(Protocol):
    """Another door to the same router, open."""

    address: str

    async def stop(self) -> None:
        """Let requests finish for the grace that it was opened with, then end them."""


# By configuration, model directory, router and grace (seconds); None where it is turned off.
OpenDoor = Callable[[Config, Path, Backend, float], Awaitable[OpenedDoor | None]]


@dataclass(frozen=True, slots=True)
class Router:
    """The parts of one router, wired together."""

    inference: InferenceServicer
    membership: MembershipServicer
    registry: WorkerRegistry
    admission: Admission
    channels: WorkerChannels
    watch: WorkerWatch
    tokenizer: Tokenizer
    backend: Backend

    def register(self, server: grpc.aio.Server) -> list[str]:
        """Add both services; returns their full names."""
        self.inference.register(server)
        membership_pb2_grpc.add_MembershipServicer_to_server(self.membership, server)
        return [SERVICE_NAME, service_name(membership_pb2, "Membership")]


def build_router(
    config: Config,
    model: ModelInfo,
    tokenizer: Tokenizer,
    guides: GuideGate,
    clock: Clock,
    observer: RouterObserver,
) -> Router:
    """Wire a router for one model. Raises ConfigError naming a bad setting."""
    section = config.router
    registry = WorkerRegistry(clock, section.heartbeat_interval_s)
    channels, losses = WorkerChannels(open_channel), LossBoard()
    watch = WorkerWatch(registry, channels, losses, observer)
    limits = AdmissionLimits(section.max_requests, section.max_queue_s, section.starvation_s)
    admission = Admission(limits, registry, clock, observer)
    key = ClusterKey(config.cluster.key.encode())
    office = TicketOffice(TicketSigner(key), section.ticket_lifetime_s, clock)
    generation = Generation(
        Workers(admission, channels, losses),
        office,
        tokenizer,
        model.vocab_size,
        clock,
        observer,
        FailoverLimits(section.max_attempts, section.failover_wait_s),
    )
    door = Door(model, _request_limits(config, model), tokenizer, guides, admission)
    return Router(
        inference=InferenceServicer(door, generation, registry, clock, observer),
        membership=MembershipServicer(registry, model, key, section.heartbeat_interval_s),
        registry=registry,
        admission=admission,
        channels=channels,
        watch=watch,
        tokenizer=tokenizer,
        backend=Backend(door, generation, registry, clock, observer),
    )


async def run_router(
    config: Config,
    model_dir: Path,
    announce: Announce,
    stop: asyncio.Event,
    open_http: OpenDoor | None = None,
) -> None:
    """Serve until ``stop`` is set. ``announce`` gets the addresses once calls are accepted;
    ``open_http`` opens the HTTP door.

    Raises ConfigError or ModelError before it serves anything.
    """
    model = read_model_info(model_dir, config.model)
    tokenizer = Tokenizer.from_directory(model_dir)
    if tokenizer.vocab_size > model.vocab_size:
        raise ModelError(
            f"tokenizer.json has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        )
    metrics = new_registry()
    set_build_info(metrics, role="router", version=stateferry.__version__, kernels="", transport="")
    compiler = GuideCompiler(model_dir / "tokenizer.json", model.vocab_size, model.eos_token_ids)
    compiler.load()
    guides = GuideGate(compiler)
    router = build_router(config, model, tokenizer, guides, SystemClock(), RouterMetrics(metrics))
    exporter = start_exporter(metrics, config.router.host, config.router.metrics_port)
    http: OpenedDoor | None = None
    try:
        if open_http is not None:
            http = await open_http(config, model_dir, router.backend, GRACE_S)
        await _serve(config, router, exporter.address, http, announce, stop)
    finally:
        if http is not None:
            await http.stop()
        tokenizer.close()
        guides.close()
        exporter.close()


async def _serve(
    config: Config,
    router: Router,
    metrics_address: str,
    http: OpenedDoor | None,
    announce: Announce,
    stop: asyncio.Event,
) -> None:
    server = await start_server(config.router.host, config.router.port, router.register)
    sweeping = asyncio.create_task(router.watch.run(router.admission))
    stopping = asyncio.create_task(stop.wait())
    try:
        addresses = {"grpc": server.address, "metrics": metrics_address}
        announce(addresses if http is None else {**addresses, "http": http.address})
        # The sweeper ends only by a bug; without it lost workers would go unnoticed.
        await asyncio.wait({sweeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if sweeping.done():
            sweeping.result()
    finally:
        # Workers keep their streams open for ever; a stop that waits for them would take all grace.
        router.membership.close()
        # Both doors at once: each has all of the grace.
        doors = [] if http is None else [http.stop()]
        await asyncio.gather(server.stop(GRACE_S), *doors)
        for task in (sweeping, stopping):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        await router.channels.close()


def _request_limits(config: Config, model: ModelInfo) -> RequestLimits:
    return RequestLimits(
        model=model.name,
        vocab_size=model.vocab_size,
        max_context_tokens=model.max_context_tokens,
        max_prompt_bytes=config.router.max_prompt_bytes,
        eos_token_ids=model.eos_token_ids,
    )
