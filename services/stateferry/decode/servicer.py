"""The decode worker's gRPC door.

::

    router --Generate(ticket)--> servicer --> loop: lease memory
    router <--Reserved---------- servicer --> receiver: expect exactly this push
                   prefill worker ==UCX==> receiver --> sealed --> copied into the lease
    router <--Tokens 1, 2, ..--- servicer <-- loop <-- runner (decode rows)
    router <--WorkerFinish------ servicer

or, of a prompt that is nearly all cached here::

    router --Generate(ticket)--> servicer --> local prefill: lease memory
    router <--Reserved---------- servicer
    router <--FirstToken-------- servicer <-- local prefill <-- runner (chunk scan)
    router <--Tokens 1, 2, ..--- servicer <-- loop <-- runner (decode rows)
    router <--WorkerFinish------ servicer
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from stateferry.api import worker_codec as codec
from stateferry.api.sampling_codec import sampling_from_pb
from stateferry.api.status import streams_errors
from stateferry.core.errors import FrameError, InvalidRequest, StateferryError
from stateferry.core.handoff import HandoffMeta
from stateferry.core.request import Continuation, GenerationRequest
from stateferry.core.ticket import Ticket, TicketDesk
from stateferry.decode.intake import PageIntake, take_in
from stateferry.decode.local_prefill import LocalPrefill
from stateferry.decode.loop import DecodeLoop, OutputStep
from stateferry.engine.rules import as_rules
from stateferry.telemetry.logs import log_request_id
from stateferry.transfer.receiver import Expectation, HandoffReceiver
from stateferry.v1 import worker_pb2, worker_pb2_grpc
from stateferry.worker.limits import check_ids, check_request, check_stop_ids
from stateferry.worker.meter import WorkerMeter
from stateferry.worker.parts import EngineParts
from stateferry.worker.steering import Steering

log = logging.getLogger(__name__)


def _log_failure(error: Exception) -> None:
    log.warning("decode request failed: %s: %s", type(error).__name__, error)


class DecodeServicer(worker_pb2_grpc.DecodeServicer):
    """One call is one attempt of one request; its end, however it comes, frees everything."""

    def __init__(
        self,
        desk: TicketDesk,
        loop: DecodeLoop,
        prompts: LocalPrefill,
        parts: EngineParts,
        steering: Steering,
        receiver: HandoffReceiver,
        meter: WorkerMeter,
        seal_timeout_s: float,
    ) -> None:
        self._desk = desk
        self._loop = loop
        self._prompts = prompts
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
        prompt = self._prompt(ticket, request)
        wanted = await self._steering.continuation(self._accept(ticket, request))
        if prompt is not None:
            prompt = replace(prompt, rules=wanted.rules)
        if prompt is not None and self._prompts.begin(prompt):
            events = self._run_here(prompt, wanted)
        elif request.here_only:
            yield worker_pb2.DecodeEvent(reserved=worker_pb2.Reserved(declined=True))
            return
        else:
            held_tokens = ticket.prompt_len + wanted.stop.max_tokens - ticket.num_output_ids
            self._loop.admit(wanted.request_id, held_tokens, ticket.priority)
            events = self._receive_state(ticket, prompt, wanted)
        # Only from here on is there anything of this attempt to give back.
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    yield event
        finally:
            self._prompts.abort(wanted.request_id)
            self._loop.abort(wanted.request_id)

    async def _run_here(
        self, prompt: GenerationRequest, wanted: Continuation
    ) -> AsyncGenerator[worker_pb2.DecodeEvent, None]:
        """All tokens, of a prompt that has begun here."""
        yield worker_pb2.DecodeEvent(reserved=worker_pb2.Reserved(runs_prompt=True))
        ran = await self._prompts.run(prompt)
        finish = wanted.stop.check(ran.token.token_id, prompt.num_output_ids + 1)
        yield worker_pb2.DecodeEvent(
            first_token=codec.first_token_to_pb(
                ran.token,
                finish,
                queue_s=ran.queue_s,
                prefill_s=ran.prefill_s,
                resumed_tokens=ran.resumed_tokens,
            )
        )
        if finish is None:
            self._prompts.hand_over(prompt.request_id)
            async for event in _events(self._loop.take_over(wanted, ran.token.token_id, prompt)):
                yield event

    async def _receive_state(
        self, ticket: Ticket, prompt: GenerationRequest | None, wanted: Continuation
    ) -> AsyncGenerator[worker_pb2.DecodeEvent, None]:
        """Tokens 1 and up, of a prompt that a prefill worker runs."""
        await self._loop.reserved(wanted.request_id)
        pages = PageIntake(ticket.attempt_id, ticket.prompt_len, self._cache)
        expectation = self._receiver.expect(
            ticket.attempt_id,
            ticket.epoch,
            ticket.prefill,
            self._cache.pools.max_sequence_bytes(ticket.prompt_len),
            on_part=lambda received: self._loop.fill(partial(pages.take_in, received)),
        )
        try:
            yield worker_pb2.DecodeEvent(reserved=worker_pb2.Reserved())
            meta = await self._receive(expectation, ticket, pages)
        finally:
            expectation.cancel()
            # The lease may go to somebody else once this returns.
            await expectation.settled()
        if prompt is not None:
            self._cache.adopt(wanted.request_id, prompt)
        rules = as_rules(wanted.rules)
        if rules is not None:
            rules.observe(ticket.num_output_ids, meta.first_token_id)
        async for event in _events(self._loop.decode(wanted, meta.first_token_id, prompt)):
            yield event

    def _prompt(
        self, ticket: Ticket, request: worker_pb2.DecodeRequest
    ) -> GenerationRequest | None:
        """The prompt, of a request that may leave something to the cache; without rules."""
        if not request.prompt_ids:
            return None
        prompt = GenerationRequest(
            request_id=ticket.attempt_id,
            prompt_ids=tuple(request.prompt_ids),
            sampling=sampling_from_pb(request.sampling, self._limits.vocab_size),
            stop=codec.stop_from_pb(request.stop),
            cache_salt=ticket.cache_salt,
            num_output_ids=ticket.num_output_ids,
            priority=ticket.priority,
            session=ticket.session,
        )
        if prompt.prompt_len != ticket.prompt_len:
            raise InvalidRequest("prompt_ids", f"{prompt.prompt_len} ids, not {ticket.prompt_len}")
        check_request(prompt, self._limits)
        return prompt

    def _accept(self, ticket: Ticket, request: worker_pb2.DecodeRequest) -> Continuation:
        so_far, num_prompt_ids = ticket.num_output_ids, len(request.prompt_ids)
        if so_far and num_prompt_ids < so_far:
            raise InvalidRequest("prompt_ids", "lacks the output so far")
        wanted = Continuation(
            request_id=ticket.attempt_id,
            sampling=sampling_from_pb(request.sampling, self._limits.vocab_size),
            stop=codec.stop_from_pb(request.stop),
            seen_prompt_ids=tuple(request.seen_prompt_ids),
            output_ids=tuple(request.prompt_ids[num_prompt_ids - so_far :]),
        )
        check_ids("seen_prompt_ids", wanted.seen_prompt_ids, self._limits)
        check_stop_ids(wanted.stop, self._limits)
        if not so_far + 1 < wanted.stop.max_tokens <= ticket.max_tokens:
            problem = f"not between {so_far + 2} and {ticket.max_tokens}"
            raise InvalidRequest("stop.max_tokens", problem)
        limit = self._limits.max_context_tokens
        if ticket.prompt_len + ticket.max_tokens - so_far > limit:
            raise InvalidRequest("stop.max_tokens", f"exceeds {limit} tokens in all")
        return wanted

    async def _receive(
        self, expectation: Expectation, ticket: Ticket, pages: PageIntake
    ) -> HandoffMeta:
        request_id, prompt_len = ticket.attempt_id, ticket.prompt_len
        try:
            with await expectation.sealed(self._seal_timeout_s) as received:
                last = partial(
                    take_in, received, request_id, prompt_len, self._cache, pages.num_pages
                )
                meta = await self._loop.fill(last)
            if meta.first_token_id >= self._limits.vocab_size:
                raise FrameError(f"token 0 is {meta.first_token_id}, outside the vocabulary")
        except StateferryError:
            self._meter.handoff_failed()
            raise
        self._meter.handoff_sealed(received.size_bytes, received.duration_s)
        return meta


async def _events(steps: AsyncIterator[OutputStep]) -> AsyncGenerator[worker_pb2.DecodeEvent, None]:
    async for step in steps:
        yield codec.tokens_event(step.index, [step.token])
        if step.finish_reason is not None:
            yield worker_pb2.DecodeEvent(finished=codec.finish_to_pb(step.finish_reason))
