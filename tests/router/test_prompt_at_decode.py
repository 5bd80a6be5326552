"""Decode workers that have nearly all of a prompt run it themselves, and the router lets them."""

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
    first_here,
    reserved,
    runs_prompt,
    tokens,
)
from router.scripts import Events, ask, decode_well, failure, ids_of, prefill_well
from stateferry.core.ids import Role
from stateferry.v1 import inference_pb2 as pb


async def decode_runs_it(me: FakeWorker, request: Any, ticket: Any) -> Events:
    yield runs_prompt()
    yield first_here(65)
    for index in range(1, request.stop.max_tokens):
        yield tokens(index, [65 + index])
    yield finished()


async def test_no_prefill_worker_hears_of_it() -> None:
    async with fake_cluster(prefill_well, decode_runs_it) as cluster:
        events = await cluster.call(ask("hello", max_tokens=4))
        assert ids_of(events) == [65, 66, 67, 68]
        completion = events[-1].completion
        assert completion.prefill_worker == completion.decode_worker == "decode-0@1"
        assert (completion.timings.transport, completion.timings.handoff_bytes) == ("", 0)
        assert (completion.timings.prefill_queue_s, completion.timings.prefill_s) == (0.25, 0.5)
        assert completion.usage.prefix_tokens == 2
        assert not cluster.prefill.requests
        await cluster.assert_clean()


async def test_the_prefill_worker_is_free_for_others_meanwhile() -> None:
    async def slow(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield runs_prompt()
        yield first_here(65)
        await asyncio.sleep(30)

    async with fake_cluster(prefill_well, slow) as cluster:
        call = cluster.stub.Generate(ask())
        await call.read()
        [prefill] = cluster.router.registry.views(Role.PREFILL)
        [decode] = cluster.router.registry.views(Role.DECODE)
        assert (prefill.busy_requests, decode.busy_requests) == (0, 1)
        call.cancel()
        await cluster.assert_clean()


async def test_the_loss_of_the_prefill_worker_does_not_matter() -> None:
    gone = asyncio.Event()

    async def waits(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield runs_prompt()
        yield first_here(65)
        await gone.wait()
        yield tokens(1, [66])
        yield finished()

    async with fake_cluster(prefill_well, waits) as cluster:
        call = cluster.stub.Generate(ask(max_tokens=2))
        await call.read()
        cluster.router.registry.leave(cluster.registrations[Role.PREFILL])
        await cluster.prefill.kill()
        gone.set()
        while not (event := await call.read()).HasField("completion"):
            pass
        assert event.completion.usage.completion_tokens == 2


@pytest.mark.parametrize("max_tokens", [2, 9])
async def test_token_0_may_be_the_last(max_tokens: int) -> None:
    async def decode(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield runs_prompt()
        yield first_here(EOS, STOPPED)

    async with fake_cluster(prefill_well, decode) as cluster:
        events = await asyncio.wait_for(cluster.call(ask(max_tokens=max_tokens)), 5)
        completion = events[-1].completion
        assert completion.finish_reason == pb.FINISH_REASON_STOP
        assert (completion.prefill_worker, completion.decode_worker) == ("decode-0@1", "")
        await cluster.assert_clean()


async def test_it_has_to_keep_its_word() -> None:
    async def ends(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield runs_prompt()

    async def decodes(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield runs_prompt()
        yield tokens(1, [66])
        await asyncio.sleep(30)

    async def begins_after_all(me: FakeWorker, request: Any, ticket: Any) -> Events:
        yield reserved()
        yield first_here(66)
        await asyncio.sleep(30)

    for script, code in (
        (ends, grpc.StatusCode.UNAVAILABLE),
        (decodes, grpc.StatusCode.UNAVAILABLE),
        (begins_after_all, grpc.StatusCode.INTERNAL),
    ):
        async with fake_cluster(prefill_well, script) as cluster:
            assert (await failure(cluster, ask())).code() is code
            await cluster.assert_clean()


async def test_the_prompt_is_sent_to_both_but_if_it_is_to_be_scored() -> None:
    async with fake_cluster(prefill_well, decode_well) as cluster:
        await cluster.call(ask("hello", max_tokens=3))
        [request] = cluster.decode.requests
        assert list(request.prompt_ids) == list(cluster.prefill.requests[0].prompt_ids)
        assert bytes(request.prompt_ids) == b"hello"
        scored = ask("hello", max_tokens=3)
        scored.echo, scored.prompt_logprobs = True, 0
        await failure(cluster, scored)  # The script scores nothing.
        assert not cluster.decode.requests[1].prompt_ids
