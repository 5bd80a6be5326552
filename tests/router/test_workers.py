"""Channels and losses follow membership."""

from __future__ import annotations

import asyncio
import socket

import grpc
import pytest

from router.fakes import FakeClock, description, fake_cluster
from router.scripts import ask, decode_well, failure, prefill_hangs_before_token
from stateferry.api.server import open_channel
from stateferry.core.errors import WorkerLost
from stateferry.core.ids import Role, WorkerKey
from stateferry.router import workers
from stateferry.router.channels import WorkerChannels
from stateferry.router.loss import LossBoard
from stateferry.router.membership import WorkerRegistry
from stateferry.router.observer import NoObserver
from stateferry.router.workers import WorkerWatch

KEY = WorkerKey("decode-0", 1)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_channel_lives_as_long_as_its_worker_or_its_last_user() -> None:
    opened: list[str] = []

    def opens(address: str) -> grpc.aio.Channel:
        opened.append(address)
        return open_channel(address)

    channels = WorkerChannels(opens)
    worker = description(Role.DECODE)
    with channels.use(worker) as first, channels.use(worker) as second:
        assert first is second and channels.num_users == 2
    assert channels.num_open == 1
    with channels.use(worker):
        channels.retire(KEY)
        assert channels.num_open == 1
    assert channels.num_open == 0
    with channels.use(worker), channels.use(description(Role.DECODE, incarnation=2)):
        assert channels.num_open == 2
        channels.retire(KEY)
        channels.restore(KEY)
    assert channels.num_open == 2
    assert len(opened) == 3
    await channels.close()
    assert channels.num_open == 0


async def test_a_loss_reaches_those_who_watch_and_those_who_come_late() -> None:
    losses = LossBoard()
    watching = [asyncio.create_task(losses.watch([KEY, WorkerKey("p", n)])) for n in range(3)]
    watching[2].cancel()
    await settle()
    assert losses.is_watched(KEY)
    losses.announce(KEY, "gone")
    for watch in watching[:2]:
        with pytest.raises(WorkerLost, match="gone"):
            await watch
    assert not losses.is_watched(KEY) and not losses.is_watched(WorkerKey("p", 0))
    with pytest.raises(WorkerLost):
        await losses.watch([KEY])
    losses.restore(KEY)
    again = asyncio.create_task(losses.watch([KEY]))
    await settle()
    assert not again.done()
    again.cancel()


async def test_a_worker_that_leaves_and_does_not_answer_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "PROBE_TIMEOUT_S", 0.2)

    # Takes connections, never answers: a process that hangs.
    hanging = socket.create_server(("127.0.0.1", 0))
    port = hanging.getsockname()[1]
    registry, losses = WorkerRegistry(FakeClock(), 1.0), LossBoard()
    channels = WorkerChannels(open_channel)
    WorkerWatch(registry, channels, losses, NoObserver())
    registration = registry.join(description(Role.DECODE, address=f"127.0.0.1:{port}"))
    watching = asyncio.create_task(losses.watch([KEY]))
    await settle()
    registry.leave(registration)
    with pytest.raises(WorkerLost, match="does not answer"):
        await asyncio.wait_for(watching, 1)
    await channels.close()
    hanging.close()


async def test_a_worker_that_falls_silent_ends_its_requests() -> None:
    settings = {"heartbeat_interval_s": 0.2, "max_attempts": 1}
    async with fake_cluster(prefill_hangs_before_token, decode_well, **settings) as cluster:
        # Both calls are in good health, but nobody has sent a heartbeat.
        error = await asyncio.wait_for(failure(cluster, ask()), 1.5)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "silent" in error.details()
        await cluster.assert_clean()
