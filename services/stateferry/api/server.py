"""A gRPC server with what every process of ours offers: health, reflection, bounded messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stateferry.core.errors import ConfigError

# Far above any request we accept, so that an oversized one reaches the check that can name the
# field; beyond it gRPC itself answers RESOURCE_EXHAUSTED.
MAX_RECEIVE_BYTES = 32 << 20
MAX_METADATA_BYTES = 16 << 10

_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A started server. ``address`` is host:port with the port that was really bound."""

    address: str
    _server: grpc.aio.Server
    _health: health.aio.HealthServicer

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, let calls finish for ``grace_s``, then end them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_server(
    host: str, port: int, register: Callable[[grpc.aio.Server], Sequence[str]]
) -> RunningServer:
    """Start serving. ``register`` adds servicers and returns their full service names.

    Raises ConfigError when the address cannot be bound.
    """
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    names = list(register(server))
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise ConfigError("port", f"cannot listen on {host}:{port}: {error}") from error
    await server.start()
    for name in ("", *names):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    return RunningServer(f"{host}:{bound}", server, health_servicer)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to another process of ours, with keepalive on."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def service_name(module: Any, service: str) -> str:
    """Full name of ``service`` in a generated module, as health and reflection know it."""
    return str(module.DESCRIPTOR.services_by_name[service].full_name)
