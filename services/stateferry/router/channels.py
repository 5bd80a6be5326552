"""One gRPC channel per life of a worker, kept while the worker is there or a call uses it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stateferry.core.ids import WorkerKey
from stateferry.core.worker import WorkerDescription


@dataclass(slots=True)
class _Entry:
    channel: grpc.aio.Channel
    num_users: int = 0
    is_retired: bool = False


class WorkerChannels:
    """Channels by worker life; the key makes a restarted worker on an old address a new one."""

    def __init__(self, open_channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._open_channel = open_channel
        self._entries: dict[WorkerKey, _Entry] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        return len(self._entries)

    @property
    def num_users(self) -> int:
        return sum(entry.num_users for entry in self._entries.values())

    @contextlib.contextmanager
    def use(self, worker: WorkerDescription) -> Iterator[grpc.aio.Channel]:
        """The worker's channel, which stays open at least until the block ends."""
        entry = self._entries.get(worker.key)
        if entry is None:
            entry = _Entry(self._open_channel(worker.grpc_address))
            self._entries[worker.key] = entry
        entry.num_users += 1
        try:
            yield entry.channel
        finally:
            entry.num_users -= 1
            self._close_if_done(worker.key, entry)

    def restore(self, key: WorkerKey) -> None:
        """The worker is back: keep its channel."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.is_retired = False

    def retire(self, key: WorkerKey) -> None:
        """The worker is gone: close its channel once nobody uses it."""
        entry = self._entries.get(key)
        if entry is not None:
            entry.is_retired = True
            self._close_if_done(key, entry)

    async def close(self) -> None:
        """Close everything, calls in progress included."""
        entries, self._entries = list(self._entries.values()), {}
        for entry in entries:
            await entry.channel.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _close_if_done(self, key: WorkerKey, entry: _Entry) -> None:
        if entry.is_retired and entry.num_users == 0 and self._entries.get(key) is entry:
            del self._entries[key]
            task = asyncio.get_running_loop().create_task(_close(entry.channel))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


async def answers(channel: grpc.aio.Channel, timeout_s: float) -> bool:
    """Whether the process behind a channel still answers a health check, well or not."""
    # The stub's type annotations leave its methods out.
    stub: Any = health_pb2_grpc.HealthStub(channel)
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code() not in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        )
    return True


async def _close(channel: grpc.aio.Channel) -> None:
    await channel.close()
