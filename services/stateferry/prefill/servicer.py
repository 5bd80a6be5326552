"""The prefill worker's gRPC door.

::

    router --Run(ticket, prompt)--> servicer --> loop --> runner (chunk scan)
    router <--FirstToken----------- servicer <-- loop
                                    servicer --> sender ==UCX==> decode worker
    router <--HandedOff------------ servicer <-- sealed
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

import grpc

from stateferry.api import worker_codec as codec
from stateferry.api.sampling_codec import prompt_logprobs_from_pb, sampling_from_pb
from stateferry.api.status import streams_errors
from stateferry.core.errors import InvalidRequest, StateferryError
from stateferry.core.request import GenerationRequest
from stateferry.core.ticket import Ticket, TicketDesk
from stateferry.engine.prompt_scores import as_scores
from stateferry.prefill.loop import PrefillLoop
from stateferry.prefill.page_stream import PageStream
from stateferry.prefill.prompt_events import prompt_events
from stateferry.telemetry.logs import log_request_id
from stateferry.transfer.sender import HandoffSender, PushReceipt
from stateferry.v1 import worker_pb2, worker_pb2_grpc
from stateferry.worker.limits import check_request
from stateferry.worker.meter import WorkerMeter
from stateferry.worker.parts import EngineParts
from stateferry.worker.steering import Steering

log = logging.getLogger(__name__)


def _log_failure(error: Exception) -> None:
    log.warning("prefill request failed: %s: %s", type(error).__name__, error)


class PrefillServicer(worker_pb2_grpc.PrefillServicer):
    """One call is one attempt of one request; its end, however it comes, frees everything."""

    def __init__(
        self,
        desk: TicketDesk,
        loop: PrefillLoop,
        parts: EngineParts,
        steering: Steering,
        sender: HandoffSender,
        meter: WorkerMeter,
    ) -> None:
        self._desk = desk
        self._loop = loop
        self._cache = parts.cache
        self._limits = parts.limits
        self._steering = steering
        self._sender = sender
        self._meter = meter

    @streams_errors(_log_failure)
    async def Run(
        self,
        request: worker_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncGenerator[worker_pb2.PrefillEvent, None]:
        ticket = self._desk.admit(request.ticket)
        log_request_id(ticket.request_id)
        wanted = await self._steering.prompt(self._accept(ticket, request))
        self._loop.submit(wanted)
        # Only from here on is there anything of this attempt to give back.
        stream: PageStream | None = None
        try:
            if ticket.decode is not None:
                stream = PageStream(ticket, self._loop, self._cache, self._sender)
            computed = await self._loop.computed(wanted.request_id)
            finish = wanted.stop.check(computed.token.token_id, wanted.num_output_ids + 1)
            for event in prompt_events(as_scores(wanted.scores)):
                yield event
            yield worker_pb2.PrefillEvent(
                first_token=codec.first_token_to_pb(
                    computed.token,
                    finish,
                    queue_s=computed.queue_s,
                    prefill_s=computed.prefill_s,
                    resumed_tokens=computed.resumed_tokens,
                )
            )
            if finish is None:
                receipt = await self._hand_off(stream, computed.token.token_id)
                yield worker_pb2.PrefillEvent(
                    handed_off=worker_pb2.HandedOff(
                        size_bytes=receipt.size_bytes,
                        duration_s=receipt.duration_s,
                        transport=receipt.transport,
                    )
                )
        finally:
            if stream is not None:
                await stream.stop()
            self._loop.abort(wanted.request_id)

    def _accept(self, ticket: Ticket, request: worker_pb2.PrefillRequest) -> GenerationRequest:
        wanted = GenerationRequest(
            request_id=ticket.attempt_id,
            prompt_ids=tuple(request.prompt_ids),
            sampling=sampling_from_pb(request.sampling, self._limits.vocab_size),
            stop=codec.stop_from_pb(request.stop),
            prompt_logprobs=prompt_logprobs_from_pb(request),
            cache_salt=ticket.cache_salt,
            num_output_ids=ticket.num_output_ids,
            priority=ticket.priority,
            session=ticket.session,
            snapshot_hints=tuple(request.snapshot_hints),
        )
        if wanted.prompt_len != ticket.prompt_len:
            raise InvalidRequest("prompt_ids", f"{wanted.prompt_len} ids, not {ticket.prompt_len}")
        if wanted.stop.max_tokens > ticket.max_tokens:
            raise InvalidRequest("stop.max_tokens", "more than the ticket allows")
        if wanted.stop.max_tokens - wanted.num_output_ids > 1 and ticket.decode is None:
            raise InvalidRequest("ticket", "names no decode worker though tokens are to follow")
        check_request(wanted, self._limits)
        return wanted

    async def _hand_off(self, stream: PageStream | None, first_token_id: int) -> PushReceipt:
        if stream is None:
            raise InvalidRequest("ticket", "names no decode worker")
        try:
            receipt = await stream.finish(first_token_id)
        except StateferryError:
            self._meter.handoff_failed()
            raise
        self._meter.handoff_sealed(receipt.size_bytes, receipt.duration_s)
        return receipt
