"""Workers join a real router over gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from router.fakes import CLUSTER_KEY, FINGERPRINT, FakeCluster, description, fake_cluster, load
from stateferry.api import worker_codec
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.ids import Role
from stateferry.core.worker import WorkerDescription
from stateferry.v1 import membership_pb2, membership_pb2_grpc

DECODE = description(Role.DECODE)


async def nothing(*_: Any) -> AsyncIterator[Any]:
    return
    yield


def hello(
    worker: WorkerDescription = DECODE, key: ClusterKey = CLUSTER_KEY
) -> membership_pb2.WorkerReport:
    return worker_codec.join_report(worker, key)


def beat(sequence: int, active: int = 0) -> membership_pb2.WorkerReport:
    return membership_pb2.WorkerReport(load=worker_codec.load_to_pb(load(sequence, active)))


def stub_of(cluster: FakeCluster) -> Any:
    return membership_pb2_grpc.MembershipStub(cluster.channel)


def is_live(cluster: FakeCluster) -> bool:
    return bool(cluster.router.registry.is_live(DECODE.key))


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    return caught.value


async def test_only_holders_of_the_cluster_key_join() -> None:
    async with fake_cluster(nothing, nothing, join=False) as cluster:
        forged = hello(key=ClusterKey(b"another key, 16 bytes or more"))
        tampered = hello()
        tampered.description.description += b"\x52\x05other"
        unsigned = hello()
        unsigned.description.mac = b""
        for report in (forged, tampered, unsigned):
            call = stub_of(cluster).Join()
            await call.write(report)
            error = await failure(call)
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert "cluster.key" in (error.details() or "")
        assert not is_live(cluster)


async def test_join_report_list_leave() -> None:
    async with fake_cluster(nothing, nothing, join=False) as cluster:
        call = stub_of(cluster).Join()
        await call.write(hello())
        assert (await call.read()).heartbeat_interval_s == 60.0
        await call.write(beat(1, active=3))
        registry = cluster.router.registry
        await cluster.until(lambda: registry.views(Role.DECODE)[0].load is not None)
        dispatch = registry.dispatch(DECODE, 5, 5)
        [worker] = (await stub_of(cluster).ListWorkers(membership_pb2.ListWorkersRequest())).workers
        assert worker_codec.description_from_pb(worker.description) == DECODE
        assert worker_codec.load_from_pb(worker.load) == load(1, 3)
        assert worker.dispatched_requests == 1
        assert 0 <= worker.silence_s < 1
        dispatch.release()
        call.cancel()
        await cluster.until(lambda: not is_live(cluster))


async def test_a_half_closed_stream_is_a_leaving() -> None:
    async with fake_cluster(nothing, nothing, join=False) as cluster:
        call = stub_of(cluster).Join()
        await call.write(hello())
        await call.read()
        assert is_live(cluster)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert not is_live(cluster)


@pytest.mark.parametrize(
    ("worker", "field"),
    [
        (dataclasses.replace(DECODE, vocab_size=9), "vocab_size"),
        (
            description(Role.DECODE, fingerprint=dataclasses.replace(FINGERPRINT, model="x")),
            "model",
        ),
        (
            description(Role.DECODE, fingerprint=dataclasses.replace(FINGERPRINT, protocol=7)),
            "protocol",
        ),
        (description(Role.DECODE, fingerprint=dataclasses.replace(FINGERPRINT, grid=64)), "grid"),
        (
            description(
                Role.DECODE, fingerprint=dataclasses.replace(FINGERPRINT, dtype="bfloat16")
            ),
            "dtype",
        ),
    ],
)
async def test_a_worker_that_does_not_fit_is_told_why(
    worker: WorkerDescription, field: str
) -> None:
    async with fake_cluster(nothing, nothing, join=False) as cluster:
        error = await failure(stub_of(cluster).Join(iter([hello(worker)])))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert str(error.details()).startswith(field)
        assert not is_live(cluster)


@pytest.mark.parametrize("field", ["weights", "numerics"])
async def test_workers_of_other_bits_never_serve_side_by_side(field: str) -> None:
    """The router has neither weights nor kernels of its own here, so the first worker decides."""
    changed = dataclasses.replace(FINGERPRINT, **{field: "x"})
    other = description(Role.PREFILL, fingerprint=changed)
    async with fake_cluster(nothing, nothing, join=False) as cluster:
        call = stub_of(cluster).Join()
        await call.write(hello())
        await call.read()
        error = await failure(stub_of(cluster).Join(iter([hello(other)])))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert str(error.details()).startswith(f"{field}: ")
        call.cancel()
        await cluster.until(lambda: not is_live(cluster))
        late = stub_of(cluster).Join()
        await late.write(hello(other))
        assert await late.read() is not grpc.aio.EOF
        late.cancel()


@pytest.mark.parametrize("reports", [[beat(1)], [hello(), hello()], [hello(), None]])
async def test_reports_out_of_turn_end_the_stream(reports: list[Any]) -> None:
    async with fake_cluster(nothing, nothing, join=False) as cluster:
        sent = [r or membership_pb2.WorkerReport() for r in reports]
        error = await failure(stub_of(cluster).Join(iter(sent)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not is_live(cluster)


async def test_silence_removes_a_worker_and_makes_it_join_again() -> None:
    settings = {"heartbeat_interval_s": 0.1}
    async with fake_cluster(nothing, nothing, join=False, **settings) as cluster:
        call = stub_of(cluster).Join()
        await call.write(hello())
        await call.read()
        await cluster.until(lambda: not is_live(cluster))
        # It was only slow: its next report is refused, so that it knows.
        await call.write(beat(1))
        error = await failure(call)
        assert "join again" in str(error.details())
        again = stub_of(cluster).Join()
        await again.write(hello())
        await again.read()
        assert is_live(cluster)
        again.cancel()


async def test_a_router_that_closes_lets_workers_go_at_their_next_report() -> None:
    async with fake_cluster(nothing, nothing, join=False) as cluster:
        call = stub_of(cluster).Join()
        await call.write(hello())
        await call.read()
        cluster.router.membership.close()
        await call.write(beat(1))
        assert await asyncio.wait_for(call.read(), 1) is grpc.aio.EOF
