"""Serves the Prometheus page of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, start_http_server

from stateferry.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Exporter:
    """A running page. ``address`` is host:port with the port that was really bound."""

    address: str
    close: Callable[[], None]


def start_exporter(registry: CollectorRegistry, host: str, port: int) -> Exporter:
    """Serve ``registry`` on http://host:port/metrics from a daemon thread; port 0 picks one.

    Raises ConfigError when the address cannot be bound.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        problem = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise ConfigError("metrics_port", problem) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return Exporter(f"{host}:{server.server_port}", close)
