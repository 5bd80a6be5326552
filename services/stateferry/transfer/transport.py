"""What a transport must offer, and the one place that adds deadlines and tracks buffers in use."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol

from stateferry.core.errors import PeerLost
from stateferry.transfer.blocking import Bytes

# Messages of one run that are on their way together.
_UNDER_WAY = 2


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

    async def send_run(self, data: Bytes, message_bytes: int, timeout_s: float) -> None:
        """Send ``data`` in messages, the last one shorter, two of them under way at a time: the
        gap between one message's end and the next one's begin costs more than many a message.

        Raises PeerLost, also when one takes ``timeout_s``.
        """
        async for _ in self._in_messages(self.send, data, message_bytes, timeout_s):
            pass

    def recv_run(
        self, buffer: Bytes, message_bytes: int, timeout_s: float
    ) -> AsyncGenerator[int, None]:
        """Receive what ``send_run`` sends. Yields up to where ``buffer`` has been filled, message
        by message. Mutates ``buffer``; close the generator. Raises as ``recv_into`` does."""
        return self._in_messages(self.recv_into, buffer, message_bytes, timeout_s)

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

    async def _in_messages(
        self,
        operate: Callable[[Bytes, float], Coroutine[Any, Any, None]],
        run: Bytes,
        message_bytes: int,
        timeout_s: float,
    ) -> AsyncGenerator[int, None]:
        under_way: deque[tuple[int, asyncio.Task[None]]] = deque()
        starts = iter(range(0, run.size, message_bytes))
        try:
            while True:
                for start in itertools.islice(starts, _UNDER_WAY - len(under_way)):
                    message = run[start : start + message_bytes]
                    task = asyncio.ensure_future(operate(message, timeout_s))
                    under_way.append((start + message.size, task))
                if not under_way:
                    return
                end, task = under_way[0]
                await asyncio.shield(task)
                under_way.popleft()
                yield end
        finally:
            if under_way:
                self.abort()
                tasks = [task for _, task in under_way]
                for task in tasks:
                    task.add_done_callback(lambda done: done.cancelled() or done.exception())

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
