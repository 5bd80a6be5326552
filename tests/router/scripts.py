"""What scripted workers do, and what tests ask of the router in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from router.fakes import (
    FakeWorker,
    Script,
    finished,
    first,
    handed_off,
    reserved,
    tokens,
)
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


async def prefill_stays(me: FakeWorker, request: Any, ticket: Any) -> Events:
    yield first(65)
    me.sealed.set()
    await asyncio.sleep(30)


async def flood(me: FakeWorker, request: Any, ticket: Any) -> Events:
    """Far more than gRPC buffers for one stream."""
    yield reserved()
    await me.sealed.wait()
    for index in range(1, request.stop.max_tokens):
        event = tokens(index, [97])
        event.tokens.tokens[0].logprob = -1.0
        for top_id in range(299):
            event.tokens.tokens[0].top.add(token_id=top_id, logprob=-1.0)
        me.num_sent = index
        yield event
    yield finished()
