"""Four ways to bring bytes to another process, each timed until that process has said so."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.transfer.links import (
    ACK,
    DECODE,
    FINGERPRINT,
    GRPC_MESSAGE_BYTES,
    GRPC_METHOD,
    PREFILL,
    limits,
)
from bench.transfer.shapes import even_segments
from stateferry.core.clock import SystemClock
from stateferry.transfer.manifest import Segment
from stateferry.transfer.sender import HandoffSender
from stateferry.transfer.ucx import UcxSettings, UcxTransport

OURS, UCX, SHM, GRPC = "hand-off", "bare ucxx", "shared memory", "gRPC bytes"
ARMS = (OURS, UCX, SHM, GRPC)
_TESTS = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one transfer; ``cpu_s`` is of both processes, all threads, 0 where it was not taken."""

    seconds: float
    cpu_s: float = 0.0


class Peer:
    """The other process, and the four ways to it."""

    def __init__(self, process: Any, max_bytes: int, shared: Any, signal: socket.socket) -> None:
        self._process = process
        self._shared = shared
        self._signal = signal
        self._rids = itertools.count()
        self._max_bytes = max_bytes
        # Random, so that nothing can be cheaper than real state.
        self.memory = np.random.default_rng(7).integers(0, 256, max_bytes, dtype=np.uint8)

    async def open(self) -> None:
        """Connect in all ways."""
        hello = await self._answer()
        self._address = hello["address"]
        self._transport = UcxTransport(UcxSettings())
        self._sender = HandoffSender(
            self._transport, PREFILL, FINGERPRINT, limits(self._max_bytes), SystemClock()
        )
        await self._sender.connect(self._address, DECODE)
        # Not before our transport has set UCX's variables: the bare arm has them too.
        import ucxx

        self._bare = await ucxx.create_endpoint(
            "127.0.0.1", hello["bare_port"], endpoint_error_handling=True
        )
        self._ack = np.empty_like(ACK)
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{hello['grpc_port']}")
        self._stub = self._channel.stream_unary(GRPC_METHOD)

    async def close(self) -> None:
        self._signal.send(bytes(8))
        await self._sender.close()
        await self._channel.close()
        self._bare.abort()
        del self._bare
        await self._transport.close()
        self._process.stdin.close()
        await self._process.wait()

    async def send(self, arm: str, size_bytes: int) -> Timing:
        """The first ``size_bytes`` of ``memory``, once."""
        if arm == OURS:
            return await self.hand_off(even_segments(self.memory, size_bytes))
        return await {UCX: self._ucx, SHM: self._shm, GRPC: self._grpc}[arm](size_bytes)

    async def hand_off(self, segments: list[Segment]) -> Timing:
        """Through HandoffSender and HandoffReceiver, until sealed and released."""
        size_bytes = sum(segment.size_bytes for segment in segments)
        rid = f"r{next(self._rids)}"
        await self._order(do="expect", rid=rid, size_bytes=size_bytes)
        cpu_s, started_s = _cpu_s(), time.perf_counter()
        await self._sender.push(self._address, DECODE, rid, 1, b"payload", segments)
        seconds, cpu_s = time.perf_counter() - started_s, _cpu_s() - cpu_s
        arrived = await self._answer()
        assert arrived["size_bytes"] == size_bytes
        return Timing(seconds, cpu_s + arrived["cpu_s"])

    async def sum_there(self, size_bytes: int) -> int:
        """Of the bytes that came by bare ucxx or shared memory."""
        await self._write(do="sum", size_bytes=size_bytes)
        return int((await self._answer())["sum"])

    async def _ucx(self, size_bytes: int) -> Timing:
        await self._order(do="bare", size_bytes=size_bytes)
        cpu_s, started_s = _cpu_s(), time.perf_counter()
        await self._bare.send(self.memory[:size_bytes])
        await self._bare.recv(self._ack)
        seconds, cpu_s = time.perf_counter() - started_s, _cpu_s() - cpu_s
        return Timing(seconds, cpu_s + (await self._answer())["cpu_s"])

    async def _shm(self, size_bytes: int) -> Timing:
        def copy() -> None:
            target = np.frombuffer(self._shared.buf, dtype=np.uint8)
            target[:size_bytes] = self.memory[:size_bytes]
            self._signal.send(size_bytes.to_bytes(8, "little"))
            self._signal.recv(1)

        started_s = time.perf_counter()
        await asyncio.get_running_loop().run_in_executor(None, copy)
        return Timing(time.perf_counter() - started_s)

    async def _grpc(self, size_bytes: int) -> Timing:
        async def messages() -> AsyncIterator[bytes]:
            for start in range(0, size_bytes, GRPC_MESSAGE_BYTES):
                yield self.memory[start : min(size_bytes, start + GRPC_MESSAGE_BYTES)].tobytes()

        started_s = time.perf_counter()
        arrived = await self._stub(messages())
        assert int.from_bytes(arrived, "little") == size_bytes
        return Timing(time.perf_counter() - started_s)

    async def _order(self, **fields: Any) -> None:
        await self._write(**fields)
        await self._answer()

    async def _write(self, **fields: Any) -> None:
        self._process.stdin.write((json.dumps(fields) + "\n").encode())
        await self._process.stdin.drain()

    async def _answer(self) -> dict[str, Any]:
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the other process has ended")
        return json.loads(line)  # type: ignore[no-any-return]


@asynccontextmanager
async def peer(max_bytes: int) -> AsyncIterator[Peer]:
    """A second process that can take in hand-offs of up to ``max_bytes``."""
    ours, theirs = socket.socketpair()
    shared = shared_memory.SharedMemory(create=True, size=max_bytes)
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "bench.transfer.peer"),
            *(str(max_bytes), str(theirs.fileno()), shared.name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": str(_TESTS)},
        )
        theirs.close()
        other = Peer(process, max_bytes, shared, ours)
        try:
            await other.open()
            yield other
            await other.close()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    finally:
        ours.close()
        shared.close()
        shared.unlink()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
