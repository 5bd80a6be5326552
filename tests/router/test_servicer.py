"""The life of a request through a real router, with scripted workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from router.fakes import (
    EOS,
    STOPPED,
    FakeWorker,
    Script,
    description,
    fake_cluster,
    finished,
    first,
    handed_off,
    reserved,
    tokens,
)
from stateferry.core.ids import Role
from stateferry.v1 import inference_pb2 as pb

Events = AsyncIterator[Any]


async def prefill_well(me: FakeWorker, request: Any, ticket: Any) -> Events:
    yield first(ord("A"))
    me.sealed.set()
    yield handed_off()


async def prefill_hangs_before_token(me: FakeWorker, request: Any, ticket: Any) -> Events:
    await asyncio.sleep(30)
    yield first(0)


async def prefill_hangs_after_token(me: FakeWorker, request: Any, ticket: Any) -> Events:
    yield first(ord("A"))
    await asyncio.sleep(30)


async def decode_well(me: FakeWorker, request: Any, ticket: Any) -> Events:
    yield reserved()
    await me.sealed.wait()
    for index in range(1, request.stop.max_tokens):
        yield tokens(index, [ord("A") + index % 26])
    yield finished()


async def decode_hangs_after_some(me: FakeWorker, request: Any, ticket: Any) -> Events:
    yield reserved()
    await me.sealed.wait()
    yield tokens(1, [66, 67])
    await asyncio.sleep(30)


def then(*events: Any) -> Script:
    """A decode worker that sends exactly this after the hand-off."""

    async def script(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield reserved()
        await me.sealed.wait()
        for event in events:
            yield event

    return script


def ask(text: str = "hi", max_tokens: int = 5, **stop: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, stop=pb.StopConditions(max_tokens=max_tokens, **stop))


def text_of(events: list[Any]) -> str:
    return "".join(e.delta.text for e in events if e.HasField("delta"))


def ids_of(events: list[Any]) -> list[int]:
    return [i for e in events if e.HasField("delta") for i in e.delta.token_ids]


async def failure(cluster: Any, request: pb.GenerateRequest, **options: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.call(request, **options)
    return caught.value


async def test_tokens_come_in_order_and_end_with_one_completion() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        request = ask(max_tokens=20)
        request.sampling.seed = 7
        events = await cluster.call(request)
        deltas, completion = events[:-1], events[-1].completion
        assert [e.delta.index for e in deltas] == list(range(20))
        assert text_of(events) == "ABCDEFGHIJKLMNOPQRST"
        assert completion.finish_reason == pb.FINISH_REASON_LENGTH
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 20)
        assert completion.usage.prefix_tokens == 2
        assert completion.seed == 7
        assert completion.prefill_worker == "prefill-0@1"
        assert completion.decode_worker == "decode-0@1"
        timings = completion.timings
        assert (timings.prefill_queue_s, timings.prefill_s) == (0.25, 0.5)
        assert (timings.handoff_s, timings.handoff_bytes, timings.transport) == (0.125, 1234, "ucx")
        assert 0 < timings.ttft_s <= timings.total_s
        await cluster.assert_clean()


async def test_the_ticket_names_both_workers_and_sizes() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        await cluster.call(ask("hello", max_tokens=9))
        [ticket] = cluster.decode.tickets
        assert [ticket] == cluster.prefill.tickets
        assert ticket.epoch == 1
        assert str(ticket.prefill) == "prefill-0@1"
        assert str(ticket.decode) == "decode-0@1"
        assert ticket.transfer_address == "ucx://peer:1"
        assert (ticket.prompt_len, ticket.max_tokens) == (5, 9)


async def test_the_first_token_does_not_wait_for_the_hand_off() -> None:
    async with fake_cluster(prefill_hangs_after_token, decode_well) as cluster:
        call = cluster.stub.Generate(ask())
        event = await asyncio.wait_for(call.read(), 2)
        assert (event.delta.index, list(event.delta.token_ids)) == (0, [65])
        call.cancel()
        await cluster.assert_clean()


async def test_end_of_sequence_at_token_0_needs_no_decode() -> None:
    async def prefill(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield first(EOS, STOPPED)

    async with fake_cluster(prefill, decode_well) as cluster:
        began_s = asyncio.get_running_loop().time()
        events = await cluster.call(ask())
        assert asyncio.get_running_loop().time() - began_s < 0.2
        assert ids_of(events) == [EOS]
        assert text_of(events) == ""
        assert events[-1].completion.finish_reason == pb.FINISH_REASON_STOP
        assert events[-1].completion.decode_worker == ""
        await cluster.assert_clean()
        assert cluster.decode.num_cancelled == 1


async def test_one_token_does_not_involve_decode() -> None:
    async def prefill(me: FakeWorker, request: Any, ticket: Any) -> Events:
        assert ticket.decode is None
        yield first(65)

    async with fake_cluster(prefill, decode_well) as cluster:
        events = await cluster.call(ask(max_tokens=1))
        assert ids_of(events) == [65]
        assert events[-1].completion.finish_reason == pb.FINISH_REASON_LENGTH
        assert cluster.decode.tickets == []
        await cluster.assert_clean()
        assert cluster.prefill.num_cancelled == 0


async def test_a_stop_string_cuts_the_text_and_frees_decode() -> None:
    async def endless(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield reserved()
        await me.sealed.wait()
        yield tokens(1, list(b"xEN"))
        yield tokens(4, list(b"Dyz"))
        await asyncio.sleep(30)

    async with fake_cluster(prefill_well, endless) as cluster:
        events = await cluster.call(ask(max_tokens=100, strings=["END"]))
        assert text_of(events) == "Ax"
        assert ids_of(events) == list(b"AxEND")
        completion = events[-1].completion
        assert completion.finish_reason == pb.FINISH_REASON_STOP
        assert completion.matched_stop == "END"
        assert completion.usage.completion_tokens == 5
        await cluster.assert_clean()
        assert cluster.decode.num_cancelled == 1


async def test_a_stop_string_at_token_0_ends_both_calls() -> None:
    async with fake_cluster(prefill_hangs_after_token, decode_well) as cluster:
        events = await cluster.call(ask(strings=["A"]))
        assert text_of(events) == ""
        assert events[-1].completion.matched_stop == "A"
        await cluster.assert_clean()
        assert (cluster.prefill.num_cancelled, cluster.decode.num_cancelled) == (1, 1)


async def test_held_back_text_comes_with_the_last_delta() -> None:
    decode = then(tokens(1, list(b"xE")), finished())
    async with fake_cluster(prefill_well, decode) as cluster:
        events = await cluster.call(ask(max_tokens=3, strings=["END"]))
        assert text_of(events) == "AxE"
        assert list(events[-2].delta.token_ids) == []
        assert events[-2].delta.index == 3


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


async def test_prefill_that_ends_without_handing_off_is_an_error() -> None:
    async def prefill(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield first(65)

    async with fake_cluster(prefill, decode_well) as cluster:
        error = await asyncio.wait_for(failure(cluster, ask()), 2)
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


async def prefill_stays(me: FakeWorker, request: Any, ticket: Any) -> Events:
    yield first(65)
    me.sealed.set()
    await asyncio.sleep(30)


async def test_a_deadline_ends_the_request_on_both_workers() -> None:
    async with fake_cluster(prefill_stays, decode_hangs_after_some) as cluster:
        error = await failure(cluster, ask(max_tokens=50), timeout=0.3)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await cluster.assert_clean()
        assert (cluster.prefill.num_cancelled, cluster.decode.num_cancelled) == (1, 1)


async def test_an_id_can_be_in_flight_once() -> None:
    async with fake_cluster(prefill_hangs_before_token, decode_well) as cluster:
        request = ask()
        request.request_id = "same"
        running = cluster.stub.Generate(request)
        await cluster.until(lambda: cluster.router.admission.num_in_flight == 1)
        error = await failure(cluster, request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith("request_id")
        running.cancel()
        await cluster.assert_clean()


async def test_a_full_router_refuses_at_once_with_a_hint() -> None:
    async with fake_cluster(prefill_hangs_before_token, decode_well, max_requests=2) as cluster:
        running = [cluster.stub.Generate(ask()) for _ in range(2)]
        await cluster.until(lambda: cluster.router.admission.num_in_flight == 2)
        error = await failure(cluster, ask())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(error.trailing_metadata())["retry-after-ms"]) > 0
        for call in running:
            call.cancel()
        await cluster.assert_clean()


async def test_waiting_for_a_busy_worker_ends_after_the_queue_time() -> None:
    settings = {"capacity": 1, "max_queue_s": 0.2}
    async with fake_cluster(prefill_hangs_before_token, decode_well, **settings) as cluster:
        running = cluster.stub.Generate(ask())
        await cluster.until(lambda: cluster.prefill.num_active == 1)
        error = await failure(cluster, ask())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(cluster.prefill.tickets) == 1
        running.cancel()
        await cluster.assert_clean()


async def test_waiting_requests_run_when_a_worker_comes_free() -> None:
    async with fake_cluster(prefill_well, decode_well, capacity=1) as cluster:
        answers = await asyncio.gather(*(cluster.call(ask()) for _ in range(6)))
        assert [text_of(a) for a in answers] == ["ABCDE"] * 6
        await cluster.assert_clean()


async def test_no_workers_is_unavailable_within_two_seconds() -> None:
    async with fake_cluster(prefill_well, decode_well, join=False) as cluster:
        error = await asyncio.wait_for(failure(cluster, ask()), 2)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "prefill" in error.details()
        await cluster.assert_clean()


async def test_a_request_that_no_one_can_hold_is_refused_before_any_worker_hears_of_it() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        error = await failure(cluster, ask("x" * 4000, max_tokens=200))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith("stop.max_tokens")
        assert cluster.decode.tickets == []


async def test_bad_bytes_name_the_field_and_empty_ones_the_prompt() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        generate = cluster.channel.unary_stream("/stateferry.v1.Inference/Generate")
        for payload, field in ((b"\x0a\x01\xff", "request_id"), (b"", "prompt"), (b"\x07", "")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(payload).read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details().startswith(field)
        assert text_of(await cluster.call(ask())) == "ABCDE"


async def test_models_are_listed_with_their_workers() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        [model] = (await cluster.stub.ListModels(pb.ListModelsRequest())).models
        assert (model.name, model.vocab_size, model.grid_tokens) == ("tiny", 300, 32)
        assert (model.prefill_workers, model.decode_workers) == (1, 1)


async def test_a_client_that_never_reads_gives_its_workers_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_sent = 0

    async def flood(me: FakeWorker, request: Any, ticket: Any) -> Events:
        nonlocal num_sent
        yield reserved()
        await me.sealed.wait()
        for index in range(1, request.stop.max_tokens):
            num_sent = index
            event = tokens(index, [97])
            for top_id in range(299):
                event.tokens.tokens[0].top.add(token_id=top_id, logprob=-1.0)
            event.tokens.tokens[0].logprob = -1.0
            yield event
        yield finished()

    monkeypatch.setattr("stateferry.router.servicer.CLIENT_STALL_S", 0.3)
    async with fake_cluster(prefill_well, flood) as cluster:
        call = cluster.stub.Generate(ask(max_tokens=4000))
        await call.read()
        # What flows is what gRPC buffers; then decode is slowed down, and at last let go.
        await cluster.until(lambda: cluster.decode.num_cancelled == 1, within_s=10)
        assert num_sent < 4000
        assert cluster.decode.num_active == 0
        call.cancel()
        await cluster.assert_clean()
