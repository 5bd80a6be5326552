"""How much of a hand-off passes while its prompt is still computed: a real prefill worker's parts,
its model's steps and its pushes on one clock."""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.transfer.links import DECODE, PREFILL, limits
from stateferry.config import CacheSection, ModelSection, WorkerSection
from stateferry.core.clock import SystemClock
from stateferry.core.cluster_key import ClusterKey
from stateferry.core.ids import Role
from stateferry.core.ticket import Ticket, TicketDesk, TicketSigner
from stateferry.prefill.loop import PrefillLoop
from stateferry.prefill.servicer import PrefillServicer
from stateferry.scheduler.prefill import PrefillScheduler
from stateferry.transfer.expectation import ReceivedHandoff
from stateferry.transfer.inproc import InprocNetwork, InprocTransport
from stateferry.transfer.receiver import HandoffReceiver
from stateferry.transfer.sender import HandoffSender
from stateferry.v1 import worker_pb2
from stateferry.worker.parts import EngineParts, build_engine
from stateferry.worker.steering import Steering
from support.scripted_runner import NullMeter

Span = tuple[float, float]
_MAX_BYTES = 256 << 20


@dataclass
class Timeline:
    """When the model computed, and when state was handed off; seconds on one clock."""

    computing: list[Span] = field(default_factory=list)
    handing_off: list[Span] = field(default_factory=list)

    def hidden_share(self) -> float:
        """The part of the hand-off seconds that lie inside computing."""
        total = sum(end - start for start, end in self.handing_off)
        overlap = sum(
            max(0.0, min(end, busy_end) - max(start, busy_start))
            for start, end in self.handing_off
            for busy_start, busy_end in self.computing
        )
        return overlap / total


class _TimedExecutor(ThreadPoolExecutor):
    """The thread that runs the model's steps."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__(1)
        self._timeline = timeline

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
        def timed() -> Any:
            started_s = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self._timeline.computing.append((started_s, time.perf_counter()))

        return super().submit(timed)


class _TimedSender(HandoffSender):
    timeline: Timeline

    async def push_part(self, *args: Any, **kwargs: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return await super().push_part(*args, **kwargs)
        finally:
            self.timeline.handing_off.append((started_s, time.perf_counter()))


async def measure_hidden(model_dir: Path, prompt_len: int, requests: int) -> Timeline:
    """One request after the other, so that a push can only overlap with its own prompt."""
    parts = build_engine(
        model_dir,
        ModelSection(max_context_tokens=prompt_len + 64),
        WorkerSection(max_requests=2, threads=1, extend_budget_tokens=256),
        CacheSection(enabled=False),
    )
    timeline, network, clock = Timeline(), InprocNetwork(), SystemClock()
    transport = InprocTransport(network)
    receiver = HandoffReceiver(transport, DECODE, parts.fingerprint, limits(_MAX_BYTES), clock)
    sender = _TimedSender(
        InprocTransport(network), PREFILL, parts.fingerprint, limits(_MAX_BYTES), clock
    )
    sender.timeline = timeline
    address = await receiver.start()
    with _TimedExecutor(timeline) as executor:
        scheduler = PrefillScheduler(
            parts.cache, grid=parts.grid, budget_tokens=256, max_waiting=4, max_in_flight=1
        )
        loop = PrefillLoop(scheduler, parts.cache, parts.runner, executor, clock, NullMeter())
        running = asyncio.ensure_future(loop.run())
        signer, steering = TicketSigner(ClusterKey(bytes(16))), Steering(parts.rules)
        desk = TicketDesk(signer, Role.PREFILL, PREFILL, clock)
        servicer = PrefillServicer(desk, loop, parts, steering, sender, NullMeter())
        for number in range(requests):
            await _one(servicer, signer, receiver, address, parts, number, prompt_len)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        steering.close()
    await sender.close()
    await receiver.close()
    await transport.close()
    return timeline


async def _one(
    servicer: PrefillServicer,
    signer: TicketSigner,
    receiver: HandoffReceiver,
    address: str,
    parts: EngineParts,
    number: int,
    prompt_len: int,
) -> None:
    ticket = Ticket(
        request_id=f"hidden-{number}",
        epoch=1,
        tenant="bench",
        prefill=PREFILL,
        decode=DECODE,
        transfer_address=address,
        prompt_len=prompt_len,
        max_tokens=8,
        expires_at_s=time.time() + 60,
    )
    expectation = receiver.expect(ticket.attempt_id, 1, PREFILL, _MAX_BYTES, _dropped)
    request = worker_pb2.PrefillRequest(
        ticket=signer.sign(ticket),
        prompt_ids=[
            1 + (7 * n + number) % (parts.limits.vocab_size - 1) for n in range(prompt_len)
        ],
        sampling=worker_pb2.WorkerSampling(top_p=1.0),
        stop=worker_pb2.WorkerStop(max_tokens=8),
    )
    context: Any = None
    kinds = [event.WhichOneof("event") async for event in servicer.Run(request, context)]
    assert kinds[-1] == "handed_off", kinds
    with await expectation.sealed(10.0):
        pass


async def _dropped(part: ReceivedHandoff) -> None:
    """Nobody decodes here: a part may go as soon as it has come."""
