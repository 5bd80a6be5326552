"""The HTTP door of a real router whose workers follow scripts, and clients without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
from starlette.applications import Starlette

from router.fakes import FakeCluster, Script, fake_cluster
from router.scripts import decode_well, prefill_well
from stateferry.http_front.app import build_app
from stateferry.http_front.chat_template import FALLBACK, ChatTemplate

MAX_BODY_BYTES = 100_000


@dataclass
class Front:
    cluster: FakeCluster
    app: Starlette
    client: httpx2.AsyncClient

    async def complete(self, **body: Any) -> httpx2.Response:
        return await self.client.post("/v1/completions", json={"prompt": "hi", **body})

    async def chat(self, **body: Any) -> httpx2.Response:
        messages = [{"role": "user", "content": "hi"}]
        return await self.client.post("/v1/chat/completions", json={"messages": messages, **body})


@contextlib.asynccontextmanager
async def front(
    prefill: Script = prefill_well, decode: Script = decode_well, **options: Any
) -> AsyncIterator[Front]:
    async with fake_cluster(prefill, decode, **options) as cluster:
        template = ChatTemplate(FALLBACK, {}, is_fallback=True)
        app = build_app(cluster.router.backend, template, MAX_BODY_BYTES)
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=True)
        async with httpx2.AsyncClient(transport=transport, base_url="http://door") as client:
            yield Front(cluster, app, client)


def events_of(response: httpx2.Response) -> list[Any]:
    """Of a stream of events, without [DONE], which must be the last."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def error_of(response: httpx2.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


class RawCall:
    """One ASGI call whose client can leave at any time, and takes ``takes`` messages."""

    def __init__(
        self, app: Starlette, path: str, body: dict[str, Any], takes: int = 1 << 20
    ) -> None:
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[Any] = []
        self._takes = takes
        payload = json.dumps(body).encode()
        self._incoming.put_nowait({"type": "http.request", "body": payload})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.ensure_future(app(scope, self._incoming.get, self._send))

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    @property
    def text(self) -> str:
        return b"".join(e.get("body", b"") for e in self.sent).decode()

    async def _send(self, event: Any) -> None:
        if len(self.sent) == self._takes:
            await asyncio.Event().wait()
        self.sent.append(event)
