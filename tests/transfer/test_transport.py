"""A connection with deadlines: broken for good after the first operation that went wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from stateferry.core.errors import FrameError, PeerLost
from stateferry.transfer.inproc import InprocNetwork, InprocTransport
from stateferry.transfer.transport import Connection

pytestmark = pytest.mark.asyncio


async def pair() -> tuple[Connection, Connection]:
    network = InprocNetwork()
    accepted: list[Connection] = []
    address = await InprocTransport(network).listen(accepted.append)
    return await InprocTransport(network).connect(address, 1.0), accepted[0]


def memory(size_bytes: int) -> Any:
    return np.zeros(size_bytes, dtype=np.uint8)


async def test_shorter_messages_leave_the_rest_of_the_buffer_alone() -> None:
    here, there = await pair()
    buffer = memory(4)
    sending = asyncio.ensure_future(here.send(np.full(2, 7, dtype=np.uint8), 1.0))
    await there.recv_into(buffer, 1.0)
    await sending
    assert buffer.tolist() == [7, 7, 0, 0]


async def test_a_late_operation_breaks_the_connection() -> None:
    here, there = await pair()
    with pytest.raises(PeerLost, match="no progress"):
        await here.recv_into(memory(1), 0.01)
    assert not here.alive
    assert not there.alive
    for operation in (here.send, here.recv_into, there.send, there.recv_into):
        with pytest.raises(PeerLost, match="broken"):
            await operation(memory(1), 1.0)


async def test_a_cancelled_operation_breaks_the_connection() -> None:
    here, there = await pair()
    receiving = asyncio.ensure_future(there.recv_into(memory(1), None))
    await asyncio.sleep(0.01)
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    assert not here.alive


async def test_a_message_that_does_not_fit_breaks_the_connection() -> None:
    here, there = await pair()
    sending = asyncio.ensure_future(here.send(memory(2), 1.0))
    with pytest.raises(FrameError):
        await there.recv_into(memory(1), 1.0)
    assert not here.alive
    await sending


async def test_buffers_are_given_back_when_the_last_operation_has_ended() -> None:
    class NeverEnding:
        name = "never"
        alive = True

        def __init__(self) -> None:
            self.end = asyncio.Event()

        async def send(self, data: Any) -> None:
            await self.end.wait()

        recv_into = send

        def abort(self) -> None:
            """UCX may go on for a while."""

    link, given_back = NeverEnding(), []
    connection = Connection(link)
    connection.when_idle(lambda: given_back.append("nothing in flight"))
    with pytest.raises(PeerLost):
        await connection.send(memory(1), 0.01)
    connection.when_idle(lambda: given_back.append("all ended"))
    await asyncio.sleep(0.01)
    assert given_back == ["nothing in flight"]
    link.end.set()
    await asyncio.sleep(0.01)
    assert given_back == ["nothing in flight", "all ended"]
