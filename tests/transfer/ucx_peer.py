"""One end of a UCX hand-off in a process of its own, driven over pipes by test_ucx.py.

Reads commands as JSON lines, writes events as JSON lines.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import os
import random
import resource
import sys
import time
from typing import Any

import numpy as np
import uvloop

from stateferry.core.clock import SystemClock
from stateferry.core.errors import PeerLost, StateferryError
from stateferry.core.fingerprint import PROTOCOL_VERSION, Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.transfer.channel import Channel
from stateferry.transfer.frames import (
    CONTROL_MAX_BYTES,
    Frame,
    FrameType,
    Hello,
    encode_frame,
    encode_hello,
)
from stateferry.transfer.limits import TransferLimits
from stateferry.transfer.manifest import Segment, SegmentKind
from stateferry.transfer.receiver import HandoffReceiver
from stateferry.transfer.sender import HandoffSender
from stateferry.transfer.transport import Connection
from stateferry.transfer.ucx import UcxLink, UcxSettings, UcxTransport

FINGERPRINT = Fingerprint(PROTOCOL_VERSION, "tiny", "w", "l", 64, "bfloat16", "cpu")
DECODE = WorkerKey("decode-0", 1)
LIMITS = TransferLimits(staging_bytes=512 << 20, progress_timeout_s=2.0)


# Libraries may print; events have a pipe of their own.
EVENTS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def write(**event: Any) -> None:
    EVENTS.write(json.dumps(event) + "\n")
    EVENTS.flush()


def digest(segments: Any) -> str:
    whole = hashlib.sha256()
    for segment in segments:
        whole.update(segment.data)
    return whole.hexdigest()


def make_segments(size_bytes: int) -> list[Segment]:
    """24 layers of random bytes, ``size_bytes`` in all."""
    data = np.random.default_rng(size_bytes).integers(0, 256, size_bytes, dtype=np.uint8)
    cuts = np.linspace(0, size_bytes, 25).astype(int)
    return [
        Segment(SegmentKind.SSM_STATE, n, "uint8", (int(b - a),), data[a:b])
        for n, (a, b) in enumerate(itertools.pairwise(cuts))
    ]


async def commands() -> Any:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def receive(receiver: HandoffReceiver, rid: str, sender: WorkerKey, size: int) -> None:
    expectation = receiver.expect(rid, 1, sender, size)
    write(expecting=rid)
    try:
        with await expectation.sealed(20.0) as received:
            write(
                sealed=rid,
                digest=digest(received.segments),
                payload=received.manifest.payload.decode(),
                size_bytes=received.size_bytes,
                transport=received.transport,
            )
    except StateferryError as error:
        write(failed=rid, error=type(error).__name__, at_s=time.time(), text=str(error))


async def run_receiver(transport: UcxTransport) -> None:
    receiver = HandoffReceiver(transport, DECODE, FINGERPRINT, LIMITS, SystemClock())
    write(address=await receiver.start(), describe=transport.describe())
    tasks = set()
    async for command in commands():
        if command["do"] == "expect":
            sender = WorkerKey(command["sender"], 1)
            tasks.add(
                asyncio.ensure_future(
                    receive(receiver, command["rid"], sender, command["max_bytes"])
                )
            )
        elif command["do"] == "snapshot":
            snapshot = receiver.snapshot()
            gc.collect()
            write(
                staging_in_use_bytes=snapshot.staging_in_use_bytes,
                connections=snapshot.connections,
                links=sum(isinstance(thing, UcxLink) for thing in gc.get_objects()),
            )
        elif command["do"] == "totals":
            write(frames_refused=receiver.snapshot().totals.frames_refused)
        elif command["do"] == "idle":
            before_s = cpu_s()
            await asyncio.sleep(command["seconds"])
            write(cpu_share=(cpu_s() - before_s) / command["seconds"])
    await receiver.close()


async def run_sender(transport: UcxTransport, name: str) -> None:
    me = WorkerKey(name, 1)
    sender = HandoffSender(transport, me, FINGERPRINT, LIMITS, SystemClock())
    write(ready=name)
    async for command in commands():
        if command["do"] == "crash":
            raise SystemExit(3)
        if command["do"] == "storm":
            await storm(transport, command["address"], command["connects"])
        elif command["do"] == "garbage":
            await garbage(transport, command["address"], me)
        else:
            await push(sender, command)
    await sender.close()


async def push(sender: HandoffSender, command: dict[str, Any]) -> None:
    segments = make_segments(command["size_bytes"])
    if "stall_at" in command:
        _stall_at(command["stall_at"])
    durations_s = []
    try:
        for rid in command["rids"]:
            receipt = await sender.push(command["address"], DECODE, rid, 1, b"payload", segments)
            durations_s.append(receipt.duration_s)
    except StateferryError as error:
        write(failed=rid, error=type(error).__name__, at_s=time.time(), text=str(error))
        return
    write(
        pushed=command["rids"],
        digest=digest(segments),
        durations_s=durations_s,
        size_bytes=receipt.size_bytes,
        transport=receipt.transport,
    )


async def garbage(transport: UcxTransport, address: str, me: WorkerKey) -> None:
    """Messages of a real UCX peer that are none of the protocol's, before and after a greeting."""
    rng = random.Random(2)
    hello = encode_frame(Frame(FrameType.HELLO, 0, encode_hello(Hello(me, DECODE, FINGERPRINT))))
    push = encode_frame(Frame(FrameType.PUSH, 1, bytes(400)))
    bad = [message[:cut] for message in (hello, push) for cut in (1, 19, 20, len(message) - 1)]
    bad += [rng.randbytes(size) for size in (1, 64, 4096, CONTROL_MAX_BYTES, CONTROL_MAX_BYTES + 1)]
    # Its checksum holds; what it says is no manifest.
    bad.append(push)
    sent = 0
    for greeted in (False, True):
        for message in bad:
            connection = await transport.connect(address, 5.0)
            channel = Channel(connection)
            if greeted:
                await connection.send(np.frombuffer(hello, np.uint8), 5.0)
                assert (await channel.read(5.0)).type is FrameType.WELCOME
            sent += 1
            try:
                # The receiver may hang up before the send has ended.
                await connection.send(np.frombuffer(message, np.uint8), 5.0)
                await channel.read(5.0)
            except PeerLost as error:
                assert "no progress" not in str(error)
            else:
                raise AssertionError("garbage was answered")
    write(garbage=sent)


async def storm(transport: UcxTransport, address: str, connects: int) -> None:
    """Give up connects in all their phases, by cancellation and by deadline."""
    rng = random.Random(1)
    outcomes = {"connected": 0, "given_up": 0}
    for n in range(connects):
        timeout_s = rng.uniform(0.0, 0.01)
        connecting = asyncio.ensure_future(transport.connect(address, timeout_s if n % 2 else 5.0))
        await asyncio.wait({connecting}, timeout=timeout_s)
        connecting.cancel()
        try:
            (await connecting).abort()
            outcomes["connected"] += 1
        except (PeerLost, asyncio.CancelledError):
            outcomes["given_up"] += 1
        # Memory that was freed too early is now somebody else's.
        _ = [bytearray(16) for _ in range(1000)]
    write(storm=outcomes)


def _stall_at(number: int) -> None:
    """Stop for ever before the ``number``-th message from now on, and say so."""
    send, count = Connection.send, 0

    async def counting_send(self: Connection, data: Any, timeout_s: float) -> None:
        nonlocal count
        if count == number:
            write(stalled=number)
            await asyncio.sleep(3600)
        count += 1
        await send(self, data, timeout_s)

    Connection.send = counting_send  # type: ignore[method-assign]


async def main(role: str, rest: list[str]) -> None:
    transport = UcxTransport(UcxSettings())
    if role == "receiver":
        await run_receiver(transport)
    else:
        await run_sender(transport, *rest)
    await transport.close()
    write(closed=role)


if __name__ == "__main__":
    run = uvloop.run if sys.argv[1] == "uvloop" else asyncio.run
    run(main(sys.argv[2], sys.argv[3:]))
