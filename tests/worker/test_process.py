"""A worker process ends when it is told to, and when a part of it that must not end has ended."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from stateferry.core.cluster_key import ClusterKey
from stateferry.core.errors import InvariantViolation
from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import Role, WorkerKey
from stateferry.core.worker import PoolCount, PoolSizes, WorkerDescription, WorkerLoad
from stateferry.worker.process import serve_until_stopped

DESCRIPTION = WorkerDescription(
    key=WorkerKey("decode-0", 1),
    role=Role.DECODE,
    grpc_address="127.0.0.1:1",
    transfer_address="127.0.0.1:2",
    metrics_address="127.0.0.1:3",
    fingerprint=Fingerprint(1, "m", "w", "l", 64, "float32", "cpu"),
    capacity_requests=1,
    max_context_tokens=1,
    vocab_size=1,
    kernels="torch",
    pools=PoolSizes(1, 3, 1, 0, 64, 8, 8, 0),
)
LOAD = WorkerLoad(1, 0, 0, 0, PoolCount(1, 1), PoolCount(1, 1), PoolCount(0, 0))


class Server:
    def __init__(self) -> None:
        self.graces: list[float] = []

    async def stop(self, grace_s: float) -> None:
        self.graces.append(grace_s)


async def forever() -> None:
    await asyncio.Event().wait()


async def serve(server: Server, loop: Any, stop: asyncio.Event, announced: list[Any]) -> None:
    # Nobody listens at that router: the link keeps trying, as it should.
    host = SimpleNamespace(routers=["127.0.0.1:9"], cluster_key=ClusterKey(b"k" * 16))
    await serve_until_stopped(
        server,  # type: ignore[arg-type]
        loop,
        host,  # type: ignore[arg-type]
        DESCRIPTION,
        lambda: LOAD,
        announced.append,
        stop,
    )


async def test_a_stop_lets_calls_finish() -> None:
    server, stop, announced = Server(), asyncio.Event(), []  # type: ignore[var-annotated]
    serving = asyncio.ensure_future(serve(server, forever(), stop, announced))
    await asyncio.sleep(0.05)
    assert not serving.done() and announced[0]["transfer"] == "127.0.0.1:2"
    stop.set()
    await asyncio.wait_for(serving, 5)
    assert server.graces == [5.0]


async def test_a_step_loop_that_dies_ends_the_process() -> None:
    async def die() -> None:
        raise RuntimeError("a bug")

    server = Server()
    with pytest.raises(InvariantViolation, match="a bug"):
        await asyncio.wait_for(serve(server, die(), asyncio.Event(), []), 5)
    assert server.graces == [0.0]
