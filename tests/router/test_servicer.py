"""The life of a request through a real router, with scripted workers."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from router.fakes import (
    EOS,
    STOPPED,
    FakeWorker,
    fake_cluster,
    finished,
    first,
    reserved,
    tokens,
)
from router.scripts import (
    Events,
    ask,
    decode_well,
    failure,
    ids_of,
    prefill_hangs_after_token,
    prefill_hangs_before_token,
    prefill_well,
    text_of,
    then,
)
from stateferry.v1 import inference_pb2 as pb


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


async def test_what_may_be_reused_is_signed_and_where_it_is_wanted_is_sent() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        request = ask("hello", max_tokens=9)
        request.tenant, request.cache_salt = "t1", "s1"
        request.snapshot_hints.extend([3, 5])
        await cluster.call(request)
        [ticket] = cluster.decode.tickets
        assert ticket.cache_salt == "t1/s1"
        [order] = cluster.prefill.requests
        assert list(order.snapshot_hints) == [3, 5]
        await cluster.assert_clean()


async def test_the_first_token_does_not_wait_for_the_hand_off() -> None:
    async with fake_cluster(prefill_hangs_after_token, decode_well) as cluster:
        call = cluster.stub.Generate(ask())
        event = await asyncio.wait_for(call.read(), 2)
        assert (event.delta.index, list(event.delta.token_ids)) == (0, [65])
        call.cancel()
        await cluster.assert_clean()


async def test_end_of_sequence_at_token_0_needs_no_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Nobody may wait for a decode call whose state will never come.
    monkeypatch.setattr("stateferry.router.attempt._SETTLE_S", 20.0)

    async def prefill(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield first(EOS, STOPPED)

    async with fake_cluster(prefill, decode_well) as cluster:
        events = await asyncio.wait_for(cluster.call(ask()), 5)
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


async def test_what_ended_the_text_stays_in_it_on_request() -> None:
    decode = then(tokens(1, list(b"xEND")), finished(STOPPED))
    async with fake_cluster(prefill_well, decode) as cluster:
        for include, string, expected in ((False, "END", "Ax"), (True, "END", "AxEND")):
            events = await cluster.call(ask(max_tokens=5, strings=[string], include_stop=include))
            assert text_of(events) == expected
            cluster.prefill.sealed.clear()
        for include, expected in ((False, "AxEN"), (True, "AxEND")):
            events = await cluster.call(
                ask(max_tokens=5, token_ids=[ord("D")], include_stop=include)
            )
            assert text_of(events) == expected
            assert events[-1].completion.finish_reason == pb.FINISH_REASON_STOP
            cluster.prefill.sealed.clear()
        await cluster.assert_clean()


async def test_special_tokens_are_shown_on_request() -> None:
    decode = then(tokens(1, [EOS, ord("B")]), finished())
    for skip, expected in ((None, "AB"), (True, "AB"), (False, "A<eos>B")):
        async with fake_cluster(prefill_well, decode) as cluster:
            request = ask(max_tokens=3, ignore_eos=True)
            if skip is not None:
                request.skip_special_tokens = skip
            assert text_of(await cluster.call(request)) == expected


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
