"""A small cluster over the inproc transport, with faults on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from stateferry.core.clock import SystemClock
from stateferry.core.fingerprint import PROTOCOL_VERSION, Fingerprint
from stateferry.core.ids import WorkerKey
from stateferry.transfer.blocking import Bytes
from stateferry.transfer.inproc import InprocNetwork, InprocTransport
from stateferry.transfer.limits import TransferLimits
from stateferry.transfer.manifest import Segment, segment_from_tensor
from stateferry.transfer.receiver import HandoffReceiver
from stateferry.transfer.sender import HandoffSender
from stateferry.transfer.transport import Connection, Link

FINGERPRINT = Fingerprint(PROTOCOL_VERSION, "tiny", "w" * 16, "l" * 16, 64, "bfloat16", "cpu")
DECODE = WorkerKey("decode-0", 7)
PREFILL = WorkerKey("prefill-0", 3)
LIMITS = TransferLimits(
    staging_bytes=64 << 20,
    handshake_timeout_s=0.5,
    progress_timeout_s=0.5,
    credit_timeout_s=0.5,
    push_timeout_s=5.0,
)


@dataclass
class Faults:
    """What goes wrong on a sender's connections. ``on_send`` gets the message's number and bytes;
    it returns what to send instead, and may wait for ever or raise."""

    on_send: Callable[[int, Bytes], Any] | None = None
    links: list[Link] = field(default_factory=list)

    @staticmethod
    def stall_at(number: int) -> Callable[[int, Bytes], Any]:
        async def on_send(n: int, data: Bytes) -> Bytes:
            if n == number:
                await asyncio.sleep(3600)
            return data

        return on_send


class FaultyLink:
    name = "inproc"

    def __init__(self, link: Link, faults: Faults) -> None:
        self._link = link
        self._faults = faults
        self._number = 0

    @property
    def alive(self) -> bool:
        return self._link.alive

    async def send(self, data: Bytes) -> None:
        number, self._number = self._number, self._number + 1
        if self._faults.on_send is not None:
            data = await self._faults.on_send(number, data)
        await self._link.send(data)

    async def recv_into(self, buffer: Bytes) -> None:
        await self._link.recv_into(buffer)

    def abort(self) -> None:
        self._link.abort()


class FaultyTransport(InprocTransport):
    def __init__(self, network: InprocNetwork, faults: Faults) -> None:
        super().__init__(network)
        self.faults = faults

    async def connect(self, address: str, timeout_s: float) -> Connection:
        connection = await super().connect(address, timeout_s)
        self.faults.links.append(connection._link)
        return Connection(FaultyLink(connection._link, self.faults))


class Cluster:
    """One receiver and any number of senders; ``close`` checks that nothing leaked."""

    decode = DECODE
    prefill = PREFILL
    fingerprint = FINGERPRINT

    def __init__(self, limits: TransferLimits) -> None:
        self.limits = limits
        self.network = InprocNetwork()
        self.receiver = HandoffReceiver(
            InprocTransport(self.network), DECODE, FINGERPRINT, limits, SystemClock()
        )
        self.senders: list[HandoffSender] = []
        self.address = ""

    def sender(
        self,
        me: WorkerKey = PREFILL,
        faults: Faults | None = None,
        limits: TransferLimits | None = None,
        **fingerprint: Any,
    ) -> HandoffSender:
        sender = HandoffSender(
            FaultyTransport(self.network, faults or Faults()),
            me,
            replace(FINGERPRINT, **fingerprint),
            limits or self.limits,
            SystemClock(),
        )
        self.senders.append(sender)
        return sender

    async def push(self, sender: HandoffSender, request_id: str, **changes: Any) -> Any:
        order = {
            "address": self.address,
            "receiver": DECODE,
            "request_id": request_id,
            "epoch": 1,
            "payload": b"payload",
            "segments": self.segments(),
        } | changes
        return await sender.push(**order)

    def expect(self, request_id: str, **changes: Any) -> Any:
        wanted = {"epoch": 1, "sender": PREFILL, "max_bytes": 32 << 20} | changes
        return self.receiver.expect(request_id, **wanted)

    async def serves(self, request_id: str, sender: HandoffSender | None = None) -> None:
        """A whole hand-off works."""
        expectation = self.expect(request_id)
        pushing = asyncio.ensure_future(self.push(sender or self.sender(), request_id))
        with await expectation.sealed(3.0) as received:
            assert_same(received.segments, self.segments())
        await pushing

    @staticmethod
    def segments(seed: int = 0, scale: int = 1) -> list[Segment]:
        """As a Mamba-2 sequence has them, in fp32 and bf16; 23 kB times ``scale``."""
        generator = torch.Generator().manual_seed(seed)
        segments = []
        for layer in range(2):
            state = torch.randn(scale, 8, 16, 16, generator=generator)
            conv = torch.randn(160, 3, generator=generator).bfloat16()
            tail = torch.randn(5, 4, 3, generator=generator).bfloat16()
            segments += [
                segment_from_tensor("ssm_state", layer, state),
                segment_from_tensor("conv_state", layer, conv),
                segment_from_tensor("tail_x", layer, tail),
            ]
        return segments

    @contextlib.contextmanager
    def changed_limits(self, **values: Any) -> Iterator[None]:
        """Other limits for a while; the dataclass is frozen for everybody but tests."""
        before = {name: getattr(self.limits, name) for name in values}
        for name, value in values.items():
            object.__setattr__(self.limits, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                object.__setattr__(self.limits, name, value)

    @staticmethod
    async def wait_for(condition: Callable[[], bool], timeout_s: float = 3.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    @staticmethod
    def end_stalled_operations() -> None:
        for task in asyncio.all_tasks():
            if "FaultyLink.send" in repr(task.get_coro()):
                task.cancel()

    async def staging_is_free(self) -> None:
        """Everything comes back, at the latest when the last deadline has passed."""
        for _ in range(200):
            if self._staging_in_use() == 0:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{self._staging_in_use()} bytes of staging leaked")

    def _staging_in_use(self) -> int:
        snapshots = [self.receiver.snapshot(), *(s.snapshot() for s in self.senders)]
        return sum(snapshot.staging_in_use_bytes for snapshot in snapshots)

    async def close(self) -> None:
        await self.staging_is_free()
        for sender in self.senders:
            await sender.close()
        await self.receiver.close()
        assert self.receiver.snapshot().connections == 0
        assert self.receiver.snapshot().expectations == 0
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not [task for task in left if "stateferry" in repr(task.get_coro())]


def assert_same(received: Any, sent: Any) -> None:
    """Equal to the byte, with the same labels in the same order."""

    def labels(segments: Any) -> list[Any]:
        return [(s.kind, s.layer, s.dtype, s.shape) for s in segments]

    assert labels(received) == labels(sent)
    for ours, theirs in zip(received, sent, strict=True):
        assert np.array_equal(ours.data, theirs.data)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def same_segments() -> Callable[[Any, Any], None]:
    return assert_same


@pytest.fixture
def limits() -> TransferLimits:
    """Override in a test module to change the cluster's limits."""
    return LIMITS


@pytest_asyncio.fixture
async def cluster(limits: TransferLimits) -> AsyncIterator[Cluster]:
    cluster = Cluster(limits)
    cluster.address = await cluster.receiver.start()
    yield cluster
    await cluster.close()
