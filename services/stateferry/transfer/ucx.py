"""The UCX transport (ucxx): shared memory on one host, TCP or better between hosts.

Only listener endpoints with error handling are used: every other kind may miss the death of a peer,
or take this process down with it. ucxx listens on all interfaces and cannot be told otherwise, and
UCX knows no authentication: keep the port inside a trusted network. A stranger who sends it more
than 2 KiB of anything else does no harm to hand-offs, but leaves UCX 1.21 with a thread that spins
on that socket for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stateferry.core.errors import ConfigError, FrameError, InvariantViolation, PeerLost
from stateferry.transfer.blocking import Bytes
from stateferry.transfer.transport import Connection

if TYPE_CHECKING:
    from types import ModuleType

log = logging.getLogger(__name__)

# Measured: 4 to 12 times the throughput of UCX's defaults on one host, 2 to 3 times over TCP.
TUNED_VARIABLES: Mapping[str, str] = {
    # Single-copy transfers and shared memory, both of which error handling switches off otherwise.
    "UCX_CMA_MEMORY_INVALIDATE": "y",
    "UCX_POSIX_ERROR_HANDLING": "y",
    # The receiver reads. If the sender wrote, a write could land after its receive was given up.
    "UCX_RNDV_SCHEME": "get_zcopy",
    "UCX_TCP_TX_SEG_SIZE": "1M",
    "UCX_TCP_RX_SEG_SIZE": "1M",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    # It would print every lost peer on standard output; here each is an exception.
    "UCXX_LOG_LEVEL": "fatal",
}
_CLOSE_PERIOD_NS = 200_000_000
_ACCEPT_TIMEOUT_S = 5.0
_KEPT_CONNECT_BUFFERS = 8192


@dataclass(frozen=True, slots=True)
class UcxSettings:
    """``host`` is what peers are told; ``port`` 0 picks a free one.

    ``variables`` are UCX's own. They are written to the environment of this process just before
    ucxx is first imported, unless they are set there already.
    """

    host: str = "127.0.0.1"
    port: int = 0
    variables: Mapping[str, str] = field(default_factory=lambda: dict(TUNED_VARIABLES))


class UcxLink:
    """One endpoint. Its requests end when UCX has let go of their buffers."""

    name = "ucx"

    def __init__(self, ucxx: ModuleType, endpoint: Any) -> None:
        self._ucxx = ucxx
        self._endpoint = endpoint

    @property
    def alive(self) -> bool:
        return self._endpoint is not None and bool(self._endpoint.alive)

    async def send(self, data: Bytes) -> None:
        await self._request(lambda endpoint: endpoint.send(data))
        # ucxx reports a send that was cancelled by the peer's death as done.
        if not self.alive:
            raise PeerLost("ucx: the peer went away during a send")

    async def recv_into(self, buffer: Bytes) -> None:
        await self._request(lambda endpoint: endpoint.recv(buffer))

    def abort(self) -> None:
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.abort(period=_CLOSE_PERIOD_NS, max_attempts=1)

    async def _request(self, start: Callable[[Any], Coroutine[Any, Any, object]]) -> None:
        if self._endpoint is None:
            raise PeerLost("ucx: the connection was broken")
        errors = self._ucxx.exceptions
        try:
            await start(self._endpoint)
        except errors.UCXMessageTruncatedError as error:
            raise FrameError("ucx: a message is longer than its buffer") from _bare(error)
        except (errors.UCXError, OSError, RuntimeError, AttributeError) as error:
            # AttributeError: the endpoint was aborted between two steps of ucxx's own code.
            raise PeerLost(f"ucx: {type(error).__name__}: {error}") from _bare(error)


class UcxTransport:
    """UCX in this process: at most one open at a time, used from one event loop.

    Must be closed for all its memory to be freed; a process that forgets still ends.
    """

    _open: UcxTransport | None = None
    _buffers_kept = False

    def __init__(self, settings: UcxSettings) -> None:
        self._settings = settings
        self._ucxx: ModuleType | None = None
        self._listener: Any = None
        self._links: weakref.WeakSet[UcxLink] = weakref.WeakSet()

    async def listen(self, handler: Callable[[Connection], None]) -> str:
        """Returns ``host:port``. Raises ConfigError when the port cannot be had."""
        ucxx = self._start()
        if self._listener is not None:
            raise InvariantViolation("this transport listens already")
        try:
            self._listener = ucxx.create_listener(
                lambda endpoint: handler(self._connection(endpoint)),
                port=self._settings.port,
                endpoint_error_handling=True,
                connect_timeout=_ACCEPT_TIMEOUT_S,
            )
        except ucxx.exceptions.UCXError as error:
            raise ConfigError("worker.transfer_port", f"UCX cannot listen: {error}") from error
        return f"{self._settings.host}:{self._listener.port}"

    async def connect(self, address: str, timeout_s: float) -> Connection:
        """``address`` is ``host:port``. Raises PeerLost."""
        ucxx = self._start()
        host, _, port = address.rpartition(":")
        try:
            async with asyncio.timeout(timeout_s):
                # ucxx would resolve a name on the event loop.
                found = await asyncio.get_running_loop().getaddrinfo(
                    host, int(port), family=socket.AF_INET, type=socket.SOCK_STREAM
                )
                endpoint = await ucxx.create_endpoint(
                    found[0][4][0],
                    int(port),
                    endpoint_error_handling=True,
                    connect_timeout=timeout_s,
                )
        except (ucxx.exceptions.UCXError, OSError, RuntimeError, ValueError) as error:
            raise PeerLost(f"ucx: cannot connect to {address}: {error!r}") from _bare(error)
        return self._connection(endpoint)

    def describe(self) -> str:
        """The UCX version and the transports it may use in this process."""
        ucxx = self._start()
        version = ".".join(str(part) for part in ucxx.get_ucx_version())
        return f"ucx {version}: {', '.join(sorted(ucxx.get_active_transports()))}"

    async def close(self) -> None:
        if self._ucxx is None:
            return
        ucxx, self._ucxx = self._ucxx, None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for link in list(self._links):
            link.abort()
        # Tasks of broken connections drop their endpoints in the next turns of the loop.
        await asyncio.sleep(0.01)
        gc.collect()
        try:
            ucxx.reset()
        except ucxx.exceptions.UCXError as error:
            # Somebody still refers to an endpoint. The notifier thread is stopped all the same.
            log.debug("ucx: %s", error)
        UcxTransport._open = None

    def _connection(self, endpoint: Any) -> Connection:
        if self._ucxx is None:
            raise PeerLost("ucx: the transport is closed")
        link = UcxLink(self._ucxx, endpoint)
        self._links.add(link)
        return Connection(link)

    def _start(self) -> ModuleType:
        """ucxx, initialised for the running loop; in other loops its futures would not work."""
        if self._ucxx is not None:
            return self._ucxx
        if UcxTransport._open is not None:
            raise InvariantViolation("UCX is open in this process already")
        for name, value in self._settings.variables.items():
            os.environ.setdefault(name, value)
        import ucxx

        # "thread" with futures is the one mode that leaves the cores to the model while idle.
        ucxx.init(progress_mode="thread", enable_python_future=True)
        _stop_notifier_at_exit(ucxx)
        if not UcxTransport._buffers_kept:
            _keep_connect_buffers()
            UcxTransport._buffers_kept = True
        UcxTransport._open = self
        self._ucxx = ucxx
        return self._ucxx


def _bare(error: Exception) -> Exception:
    """``error`` without its traceback.

    ucxx 0.52 never lets go of the exceptions it raises; their frames would keep every buffer and
    endpoint that ever failed.
    """
    return error.with_traceback(None)


def _keep_connect_buffers() -> None:
    """Make a connect safe to give up, on either side.

    A connect that is cancelled, also by ucxx's own time limit, frees the 16 bytes that the peer's
    answer is to be received into, but UCX still writes them: measured, a dozen cancelled connects
    end in SIGSEGV. So these buffers live on until thousands of later connects have come.
    """
    exchange: Any = importlib.import_module("ucxx._lib_async.exchange_peer_info")
    make_array = exchange.Array
    kept: deque[Any] = deque(maxlen=_KEPT_CONNECT_BUFFERS)

    def make_kept_array(memory: Any) -> Any:
        kept.append(make_array(memory))
        return kept[-1]

    exchange.Array = make_kept_array


def _stop_notifier_at_exit(ucxx: ModuleType) -> None:
    """ucxx's notifier thread is no daemon: without this, a process that crashes would never end.

    The interpreter joins such threads before it runs ``atexit``, so a daemon thread watches for the
    end of the main thread instead.
    """

    def stop_after_main() -> None:
        threading.main_thread().join()
        with contextlib.suppress(Exception):
            ucxx.stop_notifier_thread()

    threading.Thread(target=stop_after_main, name="ucx-exit", daemon=True).start()
