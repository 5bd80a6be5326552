"""The receiving process of ``make bench-transfer``: takes in whatever the other one sends.

Reads orders as JSON lines, answers as JSON lines on a pipe of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator
from multiprocessing import resource_tracker, shared_memory
from typing import Any

import grpc
import numpy as np
import uvloop

from bench.transfer.links import ACK, DECODE, FINGERPRINT, GRPC_METHOD, PREFILL, limits
from stateferry.core.clock import SystemClock
from stateferry.transfer.receiver import HandoffReceiver
from stateferry.transfer.ucx import UcxSettings, UcxTransport

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def answer(**fields: Any) -> None:
    ANSWERS.write(json.dumps(fields) + "\n")
    ANSWERS.flush()


def cpu_s() -> float:
    """CPU seconds of this process so far, all threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def orders() -> AsyncIterator[dict[str, Any]]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


class BareUcx:
    """Receives one message into memory that was touched before, and answers with one byte."""

    def __init__(self, max_bytes: int) -> None:
        import ucxx

        self.buffer = np.ones(max_bytes, dtype=np.uint8)
        self._endpoint: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._listener = ucxx.create_listener(
            self._endpoint.set_result, port=0, endpoint_error_handling=True
        )
        self.port = self._listener.port

    async def receive(self, size_bytes: int) -> None:
        endpoint = await self._endpoint
        await endpoint.recv(self.buffer[:size_bytes])
        await endpoint.send(ACK)

    async def close(self) -> None:
        (await self._endpoint).abort()
        self._listener.close()


async def grpc_server() -> tuple[grpc.aio.Server, int]:
    async def take(messages: AsyncIterator[bytes], context: object) -> bytes:
        size_bytes = 0
        async for message in messages:
            size_bytes += len(message)
        return size_bytes.to_bytes(8, "little")

    service, method = GRPC_METHOD.strip("/").split("/")
    handler = grpc.stream_unary_rpc_method_handler(take)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


def shared_copies(name: str, signal: socket.socket, target: Any) -> None:
    """Copy out of the shared memory ``name`` on every signal, and signal back; until 0 comes."""
    memory = shared_memory.SharedMemory(name)
    # The other process owns it.
    resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
    source = np.frombuffer(memory.buf, dtype=np.uint8)
    while size_bytes := int.from_bytes(signal.recv(8), "little"):
        target[:size_bytes] = source[:size_bytes]
        signal.send(b"\1")
    del source
    memory.close()


async def main(max_bytes: int, signal_fd: int, shared_name: str) -> None:
    transport = UcxTransport(UcxSettings())
    receiver = HandoffReceiver(transport, DECODE, FINGERPRINT, limits(max_bytes), SystemClock())
    address = await receiver.start()
    bare = BareUcx(max_bytes)
    server, grpc_port = await grpc_server()
    signal = socket.socket(fileno=signal_fd)
    copying = asyncio.get_running_loop().run_in_executor(
        None, shared_copies, shared_name, signal, bare.buffer
    )
    answer(address=address, bare_port=bare.port, grpc_port=grpc_port)
    async for order in orders():
        started_s = cpu_s()
        if order["do"] == "expect":
            expectation = receiver.expect(order["rid"], 1, PREFILL, order["size_bytes"])
            answer(expecting=True)
            with await expectation.sealed(60.0) as received:
                size_bytes = received.size_bytes
            answer(size_bytes=size_bytes, cpu_s=cpu_s() - started_s)
        elif order["do"] == "bare":
            answer(expecting=True)
            await bare.receive(order["size_bytes"])
            answer(size_bytes=order["size_bytes"], cpu_s=cpu_s() - started_s)
        elif order["do"] == "sum":
            answer(sum=int(bare.buffer[: order["size_bytes"]].sum(dtype=np.uint64)))
    await copying
    await server.stop(None)
    await receiver.close()
    await bare.close()
    del bare
    await transport.close()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
