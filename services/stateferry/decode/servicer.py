"""The decode worker's gRPC door.

::

    router --Generate(ticket)--> servicer --> loop: lease memory
    router <--Reserved---------- servicer --> receiver: expect exactly this push
                   prefill worker ==UCX==> receiver --> sealed --> copied into the lease
    router <--Tokens 1, 2, ..--- servicer <-- loop <-- runner (decode rows)
    router <--WorkerFinish------ servicer
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from stateferry.api import worker_codec as codec
from stateferry.api.sampling_codec import sampling_from_pb
from stateferry.api.status import streams_errors
from stateferry.core.errors import FrameError, InvalidRequest, StateferryError
from stateferry.core.handoff import HandoffMeta
from stateferry.core.request import Continuation
from stateferry.core.ticket import Ticket, TicketDesk
from stateferry.decode.intake import take_in
from stateferry.decode.loop import DecodeLoop
from stateferry.engine.rules import as_rules
from stateferry.telemetry.logs import log_request_id
from stateferry.transfer.receiver import Expectation, HandoffReceiver
from stateferry.v1 import worker_pb2, worker_pb2_grpc
from stateferry.worker.limits import check_ids, check_stop_ids
from stateferry.worker.meter import WorkerMeter
from stateferry.worker.parts import EngineParts
from stateferry.worker.steering import Steering
from stateferry.worker.waiting import run_to_end

log = logging.getLogger(__name__)


def _log_failure(error: Exception) -> None:
    log.warning("decode request failed: %s: %s", type(error).__name__, error)


class DecodeServicer(worker_pb2_grpc.DecodeServicer):
    """One call is one attempt of one request; its end, however it comes, frees everything."""

    def __init__(
        self,
        desk: TicketDesk,
        loop: DecodeLoop,
        parts: EngineParts,
        steering: Steering,
        receiver: HandoffReceiver,
        meter: WorkerMeter,
        seal_timeout_s: float,
    ) -> None:
        self._desk = desk
        self._loop = loop
        self._cache = parts.cache
        self._limits = parts.limits
        self._steering = steering
        self._receiver = receiver
        self._meter = meter
        self._seal_timeout_s = seal_timeout_s

    @streams_errors(_log_failure)
    async def Generate(
        self,
        request: worker_pb2.DecodeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncGenerator[worker_pb2.DecodeEvent, None]:
        ticket = self._desk.admit(request.ticket)
        log_request_id(ticket.request_id)
        wanted = await self._steering.continuation(self._accept(ticket, request))
        self._loop.admit(wanted.request_id, ticket.prompt_len + wanted.stop.max_tokens)
        # Only from here on is there anything of this attempt to give back.
        try:
            await self._loop.reserved(wanted.request_id)
            expectation = self._receiver.expect(
                ticket.attempt_id,
                ticket.epoch,
                ticket.prefill,
                self._cache.pools.max_sequence_bytes(ticket.prompt_len),
            )
            try:
                yield worker_pb2.DecodeEvent(reserved=worker_pb2.Reserved())
                meta = await self._receive(expectation, ticket)
            finally:
                expectation.cancel()
            rules = as_rules(wanted.rules)
            if rules is not None:
                rules.observe(0, meta.first_token_id)
            async for step in self._loop.decode(wanted, meta.first_token_id):
                yield codec.tokens_event(step.index, [step.token])
                if step.finish_reason is not None:
                    yield worker_pb2.DecodeEvent(finished=codec.finish_to_pb(step.finish_reason))
        finally:
            self._loop.abort(wanted.request_id)

    def _accept(self, ticket: Ticket, request: worker_pb2.DecodeRequest) -> Continuation:
        wanted = Continuation(
            request_id=ticket.attempt_id,
            sampling=sampling_from_pb(request.sampling, self._limits.vocab_size),
            stop=codec.stop_from_pb(request.stop),
            seen_prompt_ids=tuple(request.seen_prompt_ids),
        )
        check_ids("seen_prompt_ids", wanted.seen_prompt_ids, self._limits)
        check_stop_ids(wanted.stop, self._limits)
        if not 1 < wanted.stop.max_tokens <= ticket.max_tokens:
            raise InvalidRequest("stop.max_tokens", f"not between 2 and {ticket.max_tokens}")
        limit = self._limits.max_context_tokens
        if ticket.prompt_len + ticket.max_tokens > limit:
            raise InvalidRequest("stop.max_tokens", f"exceeds {limit} tokens in all")
        return wanted

    async def _receive(self, expectation: Expectation, ticket: Ticket) -> HandoffMeta:
        try:
            with await expectation.sealed(self._seal_timeout_s) as received:
                meta = await run_to_end(
                    None, take_in, received, ticket.attempt_id, ticket.prompt_len, self._cache
                )
            if meta.first_token_id >= self._limits.vocab_size:
                raise FrameError(f"token 0 is {meta.first_token_id}, outside the vocabulary")
        except StateferryError:
            self._meter.handoff_failed()
            raise
        self._meter.handoff_sealed(received.size_bytes, received.duration_s)
        return meta
