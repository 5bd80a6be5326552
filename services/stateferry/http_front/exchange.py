"""One HTTP exchange below Starlette: a bounded body in, one response or a stream of events out, and
the client's leaving noticed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine, Mapping
from typing import Any

from starlette.types import Message, Receive, Send

from stateferry.core.errors import DeadlineExceeded, Overloaded, StateferryError

# A client that sends, or reads, nothing for so long is given up.
BODY_STALL_S = 30.0
CLIENT_STALL_S = 60.0


class ClientLeft(Exception):
    """Nobody is there to answer."""


class BodyTooLarge(StateferryError):
    """More than http.max_body_bytes."""


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """Raises BodyTooLarge, DeadlineExceeded when the client stops in the middle, or ClientLeft."""
    body = bytearray()
    while True:
        try:
            event = await asyncio.wait_for(receive(), BODY_STALL_S)
        except TimeoutError:
            raise DeadlineExceeded("the request's body does not come") from None
        if event["type"] == "http.disconnect":
            raise ClientLeft
        body += event.get("body", b"")
        if len(body) > max_bytes:
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes")
        if not event.get("more_body", False):
            return bytes(body)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work``; cancel it and raise ClientLeft when the client leaves first. The body must have
    been read."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        working.result()
    finally:
        for task in (working, watching):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


class Responder:
    """Writes one response, whole or as server-sent events; one write at a time. Who does not read
    gets no end either: the server then closes the connection."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = dict(headers)
        self._turn = asyncio.Lock()
        self.has_begun = False
        self._has_stalled = False

    def add_headers(self, headers: Mapping[str, str]) -> None:
        """For a response that has not begun."""
        self._headers |= headers

    async def whole(self, status: int, body: Mapping[str, Any]) -> None:
        """A JSON response."""
        payload = to_json(body).encode()
        self.add_headers({"content-length": str(len(payload))})
        async with self._turn:
            await self._begin(status, "application/json")
            await self._write(payload, more=False)

    async def events(self, *bodies: Mapping[str, Any]) -> None:
        """Some events; the first ones bring the status. Raises Overloaded when the client does not
        read."""
        if not bodies:
            return
        payload = "".join(f"data: {to_json(body)}\n\n" for body in bodies).encode()
        async with self._turn:
            if not self.has_begun:
                self._headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
                await self._begin(200, "text/event-stream; charset=utf-8")
            await self._write(payload, more=True)

    async def end_events(self, *, done: bool) -> None:
        """``done``: the answer is complete, and a client may believe it."""
        async with self._turn:
            await self._write(b"data: [DONE]\n\n" if done else b"", more=False)

    async def _begin(self, status: int, content_type: str) -> None:
        self.has_begun = True
        headers = {**self._headers, "content-type": content_type}
        await self._pass_on(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in headers.items()],
            }
        )

    async def _write(self, payload: bytes, *, more: bool) -> None:
        await self._pass_on({"type": "http.response.body", "body": payload, "more_body": more})

    async def _pass_on(self, event: Message) -> None:
        if self._has_stalled:
            raise Overloaded("the client did not read its stream")
        try:
            await asyncio.wait_for(self._send(event), CLIENT_STALL_S)
        except TimeoutError:
            self._has_stalled = True
            raise Overloaded("the client does not read its stream") from None


def to_json(body: Mapping[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
