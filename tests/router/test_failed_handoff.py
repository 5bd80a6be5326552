"""A hand-off that fails is tried again with another decode worker, where there is one."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from router.fakes import (
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
from router.scripts import Events, ask, failure, ids_of
from stateferry.api.server import start_server
from stateferry.core.ids import Role

LETTERS = [65, 66, 67, 68, 69]


async def damaged(me: FakeWorker, request: Any, ticket: Any) -> Events:
    """Takes in bytes whose checksum is wrong, whoever sends them."""
    yield reserved()
    await me.sealed.wait()
    await me.context.abort(grpc.StatusCode.DATA_LOSS, "wrong bytes")


async def goes_on(me: FakeWorker, request: Any, ticket: Any) -> Events:
    """The first token of what is left, which is no more than the client lacks."""
    yield first(65 + ticket.num_output_ids)
    me.sealed.set()
    yield handed_off()


async def decodes_rest(me: FakeWorker, request: Any, ticket: Any) -> Events:
    yield reserved()
    await me.sealed.wait()
    for index in range(ticket.num_output_ids + 1, request.stop.max_tokens):
        yield tokens(index, [65 + index])
    yield finished()


async def cannot_reach(me: FakeWorker, request: Any, ticket: Any) -> Events:
    """The first decode worker, that is."""
    yield first(65 + ticket.num_output_ids)
    if ticket.decode.worker_id == "decode-0":
        await me.context.abort(grpc.StatusCode.ABORTED, "no way there")
    me.sealed.set()
    yield handed_off()


async def waits(me: FakeWorker, request: Any, ticket: Any) -> Events:
    yield reserved()
    await asyncio.sleep(30)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [(goes_on, damaged), (cannot_reach, waits)],
    ids=["damaged", "unreachable"],
)
async def test_another_decode_worker_gets_it(prefill: Script, decode: Script) -> None:
    """Neither is a proof against one end; it is the decode worker that is left out."""
    async with fake_cluster(prefill, decode) as cluster:
        other = FakeWorker(Role.DECODE, decodes_rest, sealed=cluster.prefill.sealed)
        other.server = await start_server("127.0.0.1", 0, other.register)
        try:
            who = description(Role.DECODE, "decode-1", address=other.server.address)
            cluster.router.registry.join(who)
            # The busier one: nobody goes there who need not.
            busy = cluster.router.registry.dispatch(who, 1, 1)
            events = await asyncio.wait_for(cluster.call(ask(max_tokens=5)), 10)
            assert ids_of(events) == LETTERS
            assert [t.epoch for t in cluster.decode.tickets] == [1]
            assert [t.epoch for t in other.tickets] == [2]
            assert len(cluster.prefill.tickets) == 2
            busy.release()
            await cluster.assert_clean()
        finally:
            await other.server.stop(0)


async def test_the_only_decode_worker_is_better_than_none() -> None:
    async with fake_cluster(goes_on, damaged, max_attempts=3) as cluster:
        error = await asyncio.wait_for(failure(cluster, ask(max_tokens=5)), 20)
        assert error.code() is grpc.StatusCode.DATA_LOSS
        assert [t.epoch for t in cluster.decode.tickets] == [1, 2, 3]
        await cluster.assert_clean()
