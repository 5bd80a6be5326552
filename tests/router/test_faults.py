"""Workers and clients that die, hang, leave or misbehave: nothing ends well by mistake. Each
request has one attempt here, so that its end shows."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import grpc
import pytest

from router import fakes
from router.fakes import (
    STOPPED,
    FakeWorker,
    description,
    finished,
    first,
    handed_off,
    reserved,
    tokens,
)
from router.scripts import (
    Events,
    ask,
    decode_hangs_after_some,
    decode_well,
    failure,
    flood,
    ids_of,
    prefill_hangs_after_token,
    prefill_hangs_before_token,
    prefill_stays,
    prefill_well,
    text_of,
    then,
)
from stateferry.core.ids import Role
from stateferry.router.servicer import ResponseWriter

fake_cluster = partial(fakes.fake_cluster, max_attempts=1)


async def test_a_worker_that_dies_before_the_first_token() -> None:
    async with fake_cluster(prefill_hangs_before_token, decode_well) as cluster:
        call = asyncio.create_task(failure(cluster, ask()))
        await cluster.until(lambda: cluster.prefill.num_active == 1)
        await cluster.prefill.kill()
        error = await asyncio.wait_for(call, 2)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        await cluster.assert_clean()
        assert cluster.decode.num_cancelled == 1


async def test_prefill_dies_between_token_0_and_the_hand_off() -> None:
    async with fake_cluster(prefill_hangs_after_token, decode_well) as cluster:
        call = asyncio.create_task(failure(cluster, ask()))
        await cluster.until(lambda: cluster.prefill.num_active == 1)
        await asyncio.sleep(0.05)
        await cluster.prefill.kill()
        error = await asyncio.wait_for(call, 2)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "prefill-0" in error.details()
        await cluster.assert_clean()
        assert cluster.decode.num_cancelled == 1


async def test_an_error_right_behind_the_first_token_still_arrives() -> None:
    async def prefill(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield first(65)

    # Ends without handing off, often while the first delta is being written.
    async with fake_cluster(prefill, decode_well, capacity=64) as cluster:
        failures = [asyncio.wait_for(failure(cluster, ask()), 20) for _ in range(40)]
        for error in await asyncio.gather(*failures):
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        await cluster.assert_clean()


async def test_prefill_dying_after_the_hand_off_hurts_nobody() -> None:
    async def prefill(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield first(65)
        yield handed_off()
        me.sealed.set()
        await me.context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    async def decode(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield reserved()
        await me.sealed.wait()
        await asyncio.sleep(0.2)
        yield tokens(1, [66, 67])
        yield finished()

    async with fake_cluster(prefill, decode) as cluster:
        assert text_of(await cluster.call(ask(max_tokens=3))) == "ABC"
        await cluster.assert_clean()


async def test_tokens_from_decode_prove_the_hand_off() -> None:
    async def prefill(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield first(65)
        me.sealed.set()
        # The report of the hand-off is lost with the worker.
        await asyncio.sleep(0.2)
        await me.context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    async def decode(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield reserved()
        await me.sealed.wait()
        yield tokens(1, [66])
        await asyncio.sleep(0.4)
        yield tokens(2, [67])
        yield finished()

    async with fake_cluster(prefill, decode) as cluster:
        assert text_of(await cluster.call(ask(max_tokens=3))) == "ABC"


async def test_decode_dies_in_mid_stream() -> None:
    async with fake_cluster(prefill_well, decode_hangs_after_some) as cluster:
        call = cluster.stub.Generate(ask(max_tokens=50))
        received = [await call.read(), await call.read()]
        await cluster.decode.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), 2)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ids_of(received) == [65, 66, 67]
        await cluster.assert_clean()


async def test_decode_dies_before_the_hand_off() -> None:
    async with fake_cluster(prefill_hangs_after_token, decode_well) as cluster:
        call = asyncio.create_task(failure(cluster, ask()))
        await cluster.until(lambda: cluster.prefill.num_active == 1)
        await asyncio.sleep(0.05)
        await cluster.decode.kill()
        error = await asyncio.wait_for(call, 2)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "decode-0" in error.details()
        await cluster.assert_clean()
        assert cluster.prefill.num_cancelled == 1


async def test_decode_dies_while_the_prompt_is_computed() -> None:
    async with fake_cluster(prefill_hangs_before_token, decode_well) as cluster:
        call = asyncio.create_task(failure(cluster, ask()))
        await cluster.until(lambda: cluster.prefill.num_active == 1)
        await cluster.decode.kill()
        error = await asyncio.wait_for(call, 2)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "decode-0" in error.details()
        await cluster.assert_clean()


@pytest.mark.parametrize("role", Role)
async def test_a_loss_known_from_membership_ends_the_request(role: Role) -> None:
    async with fake_cluster(prefill_hangs_before_token, decode_well) as cluster:
        call = asyncio.create_task(failure(cluster, ask()))
        await cluster.until(lambda: cluster.prefill.num_active == 1)
        # The worker still answers, but a newer life of it has come.
        newer = description(role, incarnation=2)
        cluster.router.registry.join(newer)
        error = await asyncio.wait_for(call, 1)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert f"{role.value}-0@1 is lost" in error.details()
        await cluster.assert_clean()


async def test_losing_prefill_after_the_hand_off_hurts_nobody() -> None:
    async def prefill(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield first(65)
        yield handed_off()
        me.sealed.set()

    async def decode(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield reserved()
        await me.sealed.wait()
        yield tokens(1, [66])
        await asyncio.sleep(0.3)
        yield tokens(2, [67])
        yield finished()

    async with fake_cluster(prefill, decode) as cluster:
        call = cluster.stub.Generate(ask(max_tokens=3))
        assert ids_of([await call.read(), await call.read()]) == [65, 66]
        cluster.router.registry.join(description(Role.PREFILL, incarnation=2))
        assert ids_of([await call.read()]) == [67]
        assert (await call.read()).HasField("completion")
        await cluster.assert_clean()


async def test_a_worker_that_leaves_and_answers_may_finish_its_calls() -> None:
    async def slow(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield reserved()
        await me.sealed.wait()
        await asyncio.sleep(0.5)
        yield tokens(1, [66])
        yield finished()

    async with fake_cluster(prefill_well, slow) as cluster:
        call = asyncio.create_task(cluster.call(ask(max_tokens=2)))
        await cluster.until(lambda: cluster.decode.num_active == 1)
        cluster.router.registry.leave(cluster.registrations[Role.DECODE])
        assert text_of(await call) == "AB"
        await cluster.assert_clean()
        # Prefill is still there, decode's channel is closed.
        await cluster.until(lambda: cluster.router.channels.num_open == 1)


BROKEN = {
    "gap": then(tokens(2, [66]), finished()),
    "repeat": then(tokens(1, [66]), tokens(1, [66]), finished()),
    "token_0_again": then(tokens(0, [66]), finished()),
    "no_tokens": then(tokens(1, []), finished()),
    "too_many": then(tokens(1, [66] * 50), finished()),
    "bad_id": then(tokens(1, [300]), finished()),
    "reserved_twice": then(reserved(), finished()),
    "no_reason": then(tokens(1, [66]), finished(type(STOPPED)())),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_stream_never_ends_well(name: str) -> None:
    async with fake_cluster(prefill_well, BROKEN[name]) as cluster:
        error = await failure(cluster, ask())
        assert error.code() is grpc.StatusCode.INTERNAL
        await cluster.assert_clean()


async def test_a_stream_without_its_end_is_not_taken_for_complete() -> None:
    async with fake_cluster(prefill_well, then(tokens(1, [66]))) as cluster:
        error = await failure(cluster, ask())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "without finishing" in error.details()
        await cluster.assert_clean()


async def test_missing_logprobs_are_an_error() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        request = ask()
        request.logprobs = 0
        assert (await failure(cluster, request)).code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE),
        (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.DATA_LOSS),
        (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE),
        (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.OUT_OF_RANGE),
        (grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL),
    ],
)
async def test_workers_statuses_are_mapped(code: Any, expected: Any) -> None:
    async def refuse(me: FakeWorker, request: Any, ticket: Any) -> Events:
        await me.context.abort(code, "no")
        yield reserved()

    async with fake_cluster(prefill_well, refuse) as cluster:
        assert (await failure(cluster, ask())).code() is expected
        assert cluster.prefill.tickets == []
        await cluster.assert_clean()


@pytest.mark.parametrize("num_read", [0, 2])
async def test_a_clients_cancel_reaches_both_workers(num_read: int) -> None:
    prefill = prefill_hangs_before_token if num_read == 0 else prefill_stays
    async with fake_cluster(prefill, decode_hangs_after_some) as cluster:
        call = cluster.stub.Generate(ask(max_tokens=50))
        for _ in range(num_read):
            await call.read()
        await cluster.until(lambda: cluster.prefill.num_active == cluster.decode.num_active == 1)
        call.cancel()
        await cluster.assert_clean(within_s=1.0)
        assert (cluster.prefill.num_cancelled, cluster.decode.num_cancelled) == (1, 1)


async def test_a_deadline_ends_the_request_on_both_workers() -> None:
    async with fake_cluster(prefill_stays, decode_hangs_after_some) as cluster:
        error = await failure(cluster, ask(max_tokens=50), timeout=0.3)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await cluster.assert_clean()
        assert (cluster.prefill.num_cancelled, cluster.decode.num_cancelled) == (1, 1)


async def test_a_client_that_never_reads_gives_its_workers_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stateferry.router.servicer.CLIENT_STALL_S", 0.3)
    # Few enough that decode cannot finish before its client's buffers are full.
    monkeypatch.setattr("stateferry.router.attempt._MAX_EVENTS_AHEAD", 8)
    async with fake_cluster(prefill_well, flood) as cluster:
        call = cluster.stub.Generate(ask(max_tokens=4000))
        await call.read()
        # What flows is what gRPC buffers; then decode is slowed down, and at last let go.
        await cluster.until(lambda: cluster.decode.num_active == 0, within_s=10)
        assert cluster.decode.num_sent < 3999
        # A late reader is told.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(10):
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await cluster.assert_clean()


async def test_a_slow_client_hears_of_a_lost_worker_when_it_reads_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("stateferry.router.attempt._MAX_EVENTS_AHEAD", 8)
    async with fake_cluster(prefill_stays, flood) as cluster:
        call = cluster.stub.Generate(ask(max_tokens=4000))
        await call.read()
        await asyncio.sleep(0.5)
        cluster.router.registry.join(description(Role.DECODE, incarnation=2))
        # Both workers are free at once, though the client still does not read.
        await cluster.until(lambda: cluster.decode.num_active == cluster.prefill.num_active == 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(10):
                while await call.read() is not grpc.aio.EOF:
                    pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await cluster.assert_clean()


async def test_a_write_outlives_whoever_waited_for_it() -> None:
    """gRPC refuses a status while it still holds a write that we would have cancelled."""

    class Context:
        is_writing = False
        may_end = asyncio.Event()

        async def write(self, payload: bytes) -> None:
            self.is_writing = True
            await self.may_end.wait()
            self.is_writing = False

    context = Context()
    writer = ResponseWriter(context)  # type: ignore[arg-type]
    waiting = asyncio.create_task(writer.write(b"x"))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    settling = asyncio.create_task(writer.settle())
    await asyncio.sleep(0.01)
    assert context.is_writing and not settling.done()
    context.may_end.set()
    await settling
    assert not context.is_writing
