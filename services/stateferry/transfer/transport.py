"""What a transport must offer, and the one place that adds deadlines and tracks buffers in use."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from stateferry.core.errors import PeerLost
from stateferry.transfer.blocking import Bytes


class Link(Protocol):
    """A raw connection of some transport: ordered messages, no deadlines.

    ``send`` and ``recv_into`` end only when the transport no longer touches their buffer. A message
    may be shorter than the buffer it is received into; the receiver cannot see by how much.
    """

    @property
    def name(self) -> str:
        """The transport in use, for receipts and metrics."""
        ...

    @property
    def alive(self) -> bool: ...

    async def send(self, data: Bytes) -> None:
        """Raises PeerLost."""
        ...

    async def recv_into(self, buffer: Bytes) -> None:
        """Raises PeerLost, or FrameError when the message is longer than ``buffer``."""
        ...

    def abort(self) -> None:
        """Break the connection now, idempotently: pending operations end with PeerLost."""
        ...


class Connection:
    """A link with deadlines. After any failed, late or cancelled operation it is broken for good.

    A deadline ends the wait, not the operation: the transport may go on touching the buffer. So a
    buffer is given back in a callback of ``when_idle``.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._aborted = False
        self._in_flight: set[asyncio.Task[None]] = set()
        self._on_idle: list[Callable[[], None]] = []

    @property
    def name(self) -> str:
        return self._link.name

    @property
    def alive(self) -> bool:
        return not self._aborted and self._link.alive

    async def send(self, data: Bytes, timeout_s: float) -> None:
        """Send one message. Raises PeerLost, also after ``timeout_s``."""
        await self._run(self._link.send(data), timeout_s)

    async def recv_into(self, buffer: Bytes, timeout_s: float | None) -> None:
        """Receive one message; None waits for ever. Mutates ``buffer``.

        Raises PeerLost, also after ``timeout_s``, and FrameError when the message does not fit.
        """
        await self._run(self._link.recv_into(buffer), timeout_s)

    def abort(self) -> None:
        """Break the connection. Idempotent; never blocks for long."""
        self._aborted = True
        self._link.abort()

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call back once no operation touches a buffer: at once, or when the last one has ended."""
        if self._in_flight:
            self._on_idle.append(callback)
        else:
            callback()

    async def _run(self, operation: Coroutine[Any, Any, None], timeout_s: float | None) -> None:
        if not self.alive:
            operation.close()
            raise PeerLost(f"{self.name}: the connection is broken")
        task = asyncio.ensure_future(operation)
        self._in_flight.add(task)
        task.add_done_callback(self._ended)
        try:
            await asyncio.wait({task}, timeout=timeout_s)
            if not task.done():
                raise PeerLost(f"{self.name}: no progress within {timeout_s} s")
            task.result()
        except BaseException:
            self.abort()
            raise

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            # Take the exception even if nobody waits for it any more.
            task.exception()
        self._in_flight.discard(task)
        if not self._in_flight:
            callbacks, self._on_idle = self._on_idle, []
            for callback in callbacks:
                callback()


class Transport(Protocol):
    """Opens connections and accepts them."""

    async def listen(self, handler: Callable[[Connection], None]) -> str:
        """Accept connections and pass each to ``handler``, which must not block.

        Returns the address to give to peers. At most one listener per transport.
        """
        ...

    async def connect(self, address: str, timeout_s: float) -> Connection:
        """Raises PeerLost when nobody answers within ``timeout_s``."""
        ...

    async def close(self) -> None:
        """Stop listening, break every connection and free what the transport holds."""
        ...
