"""A transport inside one process: the same protocol code over queues. For tests and one process."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable

from stateferry.core.errors import FrameError, PeerLost
from stateferry.transfer.blocking import Bytes
from stateferry.transfer.transport import Connection

_Pending = tuple[Bytes, "asyncio.Future[None]"]


class _Pipe:
    """One direction. A send ends when its receiver has copied the message, as a UCX rendezvous."""

    def __init__(self) -> None:
        self.broken = False
        self._sends: deque[_Pending] = deque()
        self._receives: deque[_Pending] = deque()

    async def send(self, data: Bytes) -> None:
        await self._enter(self._sends, data)

    async def recv_into(self, buffer: Bytes) -> None:
        await self._enter(self._receives, buffer)

    def break_off(self) -> None:
        self.broken = True
        for _, done in (*self._sends, *self._receives):
            if not done.done():
                done.set_exception(PeerLost("inproc: the connection was broken"))
        self._sends.clear()
        self._receives.clear()

    async def _enter(self, queue: deque[_Pending], memory: Bytes) -> None:
        if self.broken:
            raise PeerLost("inproc: the connection is broken")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append((memory, done))
        self._match()
        await done

    def _match(self) -> None:
        while self._sends and self._receives:
            (data, sent), (buffer, received) = self._sends.popleft(), self._receives.popleft()
            if data.size > buffer.size:
                received.set_exception(
                    FrameError(f"a message of {data.size} bytes for a buffer of {buffer.size}")
                )
            else:
                buffer[: data.size] = data
                received.set_result(None)
            sent.set_result(None)


class _InprocLink:
    name = "inproc"

    def __init__(self, outgoing: _Pipe, incoming: _Pipe) -> None:
        self._outgoing = outgoing
        self._incoming = incoming

    @property
    def alive(self) -> bool:
        return not self._outgoing.broken

    async def send(self, data: Bytes) -> None:
        await self._outgoing.send(data)

    async def recv_into(self, buffer: Bytes) -> None:
        await self._incoming.recv_into(buffer)

    def abort(self) -> None:
        self._outgoing.break_off()
        self._incoming.break_off()


class InprocNetwork:
    """The listeners that transports of one process can reach."""

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[Connection], None]] = {}
        self._numbers = itertools.count()

    def add(self, handler: Callable[[Connection], None]) -> str:
        """Returns the new listener's address."""
        address = f"inproc-{next(self._numbers)}"
        self.handlers[address] = handler
        return address


class InprocTransport:
    """One worker's end of an InprocNetwork."""

    def __init__(self, network: InprocNetwork) -> None:
        self._network = network
        self._address: str | None = None
        self._connections: list[Connection] = []

    async def listen(self, handler: Callable[[Connection], None]) -> str:
        def accept(connection: Connection) -> None:
            self._connections.append(connection)
            handler(connection)

        self._address = self._network.add(accept)
        return self._address

    async def connect(self, address: str, timeout_s: float) -> Connection:
        handler = self._network.handlers.get(address)
        if handler is None:
            raise PeerLost(f"inproc: nobody listens at {address}")
        there, back = _Pipe(), _Pipe()
        connection = Connection(_InprocLink(there, back))
        self._connections = [c for c in self._connections if c.alive]
        self._connections.append(connection)
        handler(Connection(_InprocLink(back, there)))
        return connection

    async def close(self) -> None:
        if self._address is not None:
            self._network.handlers.pop(self._address, None)
        for connection in self._connections:
            connection.abort()
        self._connections.clear()
