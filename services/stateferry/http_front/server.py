"""Runs the HTTP door on the router's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from stateferry.config import AUTO_PORT, Config
from stateferry.core.errors import ConfigError
from stateferry.http_front.app import build_app
from stateferry.http_front.chat_template import ChatTemplate
from stateferry.router.intake import Backend

DEFAULT_PORT = 8000
_POLL_S = 0.01
_BACKLOG = 2048
# Connections without a request are closed after it.
_KEEP_ALIVE_S = 30


class HttpDoor:
    """A running server. ``address`` is host:port with the port that was really bound."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None], address: str) -> None:
        self._server = server
        self._serving = serving
        self.address = address

    async def stop(self) -> None:
        """Let requests finish for the grace that the server was started with, then end them."""
        self._server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's."""
        yield


async def open_http_door(
    config: Config, model_dir: Path, backend: Backend, grace_s: float
) -> HttpDoor | None:
    """Serve; None when http.enabled is off. Raises ConfigError when the address cannot be bound,
    ModelError when the model's chat template cannot be used."""
    section = config.http
    if not section.enabled:
        return None
    template = ChatTemplate.from_directory(model_dir)
    app: Any = build_app(backend, template, section.max_body_bytes)
    listener = _listen(section.host, port_of(config))
    options = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )
    server = _Server(options)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        if serving.done():
            serving.result()
        await asyncio.sleep(_POLL_S)
    return HttpDoor(server, serving, f"{section.host}:{listener.getsockname()[1]}")


def port_of(config: Config) -> int:
    """The port to listen on; 0: any that is free."""
    if config.http.port != AUTO_PORT:
        return config.http.port
    return DEFAULT_PORT if config.router.port else 0


def _listen(host: str, port: int) -> socket.socket:
    """Bound here, so that an address in use is an error of ours and not uvicorn's exit."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return socket.create_server(
            (str(address[0]), int(address[1])), family=family, backlog=_BACKLOG
        )
    except OSError as error:
        problem = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise ConfigError("http.port", problem) from error
