"""One attempt of one request on two named workers.

::

    decode  Generate(ticket) -> Reserved ............ Tokens 1, 2, ... -> finished
    prefill                     Run(ticket) -> FirstToken -> HandedOff

or, where the decode worker has nearly all of the prompt already::

    decode  Generate(ticket) -> Reserved(runs_prompt) -> FirstToken -> Tokens 1, 2, ... -> finished

Whatever ends an attempt, both calls are cancelled before it returns, which frees both workers.
Nothing is retried here (second_chances.py decides on that); ``epoch`` names the attempt so that a
later one can be told apart. The first token of a later one is not output token 0 but the one after
what the client has already: the end of its prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from stateferry.api import worker_codec as codec
from stateferry.api.status import error_from_rpc
from stateferry.core.errors import (
    HandoffError,
    InvalidRequest,
    InvariantViolation,
    PeerUnreachable,
    StateferryError,
    WorkerLost,
)
from stateferry.core.ids import WorkerKey
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import FinishReason, SampledToken
from stateferry.router.admission import Seats
from stateferry.router.channels import WorkerChannels
from stateferry.router.client_stream import ClientStream
from stateferry.router.echo import PromptEcho
from stateferry.router.loss import LossBoard
from stateferry.router.task_errors import root_cause
from stateferry.v1 import worker_pb2, worker_pb2_grpc

T = TypeVar("T")

# After the last token, how long the hand-off's figures and the calls' own ends may take.
_SETTLE_S = 0.25
# Events of one request that may wait for a client that reads slowly; then decode waits too.
_MAX_EVENTS_AHEAD = 1024


class Declined(Exception):
    """A decode worker that was asked to run the prompt itself has too little of it, or no time. It
    holds nothing of the request, and nothing has been sent to the client."""


@dataclass(slots=True)
class WorkerFigures:
    """What the workers reported about one attempt; seconds, bytes and tokens."""

    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    prefix_tokens: int = 0
    resumed_tokens: int = 0
    handoff_s: float = 0.0
    handoff_bytes: int = 0
    transport: str = ""
    ran_prompt_at_decode: bool = False


@dataclass(frozen=True, slots=True)
class AttemptOrder:
    """What one attempt runs: the request, its permission, and the workers it was given."""

    request: GenerationRequest
    vocab_size: int
    epoch: int
    ticket: bytes
    seats: Seats


class Attempt:
    """Runs one order, feeding one client stream. Used once.

    ``echo`` takes the scored prompt of a request that asks for one.
    """

    def __init__(
        self,
        order: AttemptOrder,
        stream: ClientStream,
        channels: WorkerChannels,
        losses: LossBoard,
        echo: PromptEcho | None = None,
    ) -> None:
        self._order = order
        self._echo = echo
        self._scored_prompt: list[SampledToken] = []
        self._stream = stream
        self._channels = channels
        self._losses = losses
        self._calls: list[Any] = []
        self._first: asyncio.Future[worker_pb2.FirstToken] = (
            asyncio.get_running_loop().create_future()
        )
        self._is_handed_off = False
        self._is_over = False
        self._calls_end_by_themselves = False
        # Workers that failed, or whose calls did.
        self.suspects: set[WorkerKey] = set()
        self.figures = WorkerFigures()
        # What was sampled, as far as it came here.
        self.token_ids: list[int] = []

    async def run(self) -> FinishReason:
        """Stream the whole answer. Raises what ended it early; both calls are over by then."""
        placement = self._order.seats.placement
        workers = [w for w in (placement.prefill, placement.decode) if w is not None]
        guards: list[asyncio.Task[None]] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self._cancel_calls)
            prefill, *decode = [stack.enter_context(self._channels.use(w)) for w in workers]
            try:
                async with asyncio.TaskGroup() as group:
                    losses = [group.create_task(self._watch_loss(w.key)) for w in workers]
                    if decode:
                        reason = await self._run_both(group, guards, prefill, decode[0])
                    else:
                        reason = await self._run_prefill_only(group, guards, prefill)
                    self._is_over = True
                    await self._settle(guards)
                    for task in (*guards, *losses):
                        task.cancel()
            except BaseExceptionGroup as errors:
                raise root_cause(errors) from None
            return reason

    async def _run_both(
        self,
        group: asyncio.TaskGroup,
        guards: list[asyncio.Task[None]],
        prefill: grpc.aio.Channel,
        decode: grpc.aio.Channel,
    ) -> FinishReason:
        order = self._order
        stub = worker_pb2_grpc.DecodeStub(decode)
        here_only = order.seats.prefill is None
        call = stub.Generate(
            codec.decode_request_to_pb(order.ticket, order.request, here_only=here_only)
        )
        self._calls.append(call)
        runs_prompt = await self._reserved(call)
        guards.append(group.create_task(self._watch_decode(call)))
        if runs_prompt:
            await self._read_first_of_decode(call)
        else:
            guards.append(group.create_task(self._read_prefill(prefill)))
        reason = await self._forward_first()
        if reason is not None:
            return reason
        events: asyncio.Queue[Any] = asyncio.Queue(_MAX_EVENTS_AHEAD)
        guards.append(group.create_task(self._read_decode(call, events)))
        return await self._forward_rest(events)

    async def _run_prefill_only(
        self,
        group: asyncio.TaskGroup,
        guards: list[asyncio.Task[None]],
        prefill: grpc.aio.Channel,
    ) -> FinishReason:
        guards.append(group.create_task(self._read_prefill(prefill)))
        reason = await self._forward_first()
        if reason is None:
            raise InvariantViolation("a request for one token did not end with it")
        self._calls_end_by_themselves = self._stream.matched_stop is None
        return reason

    async def _reserved(self, call: Any) -> bool:
        """Whether the decode worker runs the prompt as well."""
        event = await self._from_decode(call)
        if event is grpc.aio.EOF or event.WhichOneof("event") != "reserved":
            raise WorkerLost(f"{self._decode_name} did not reserve room")
        if self._order.seats.prefill is None and not event.reserved.runs_prompt:
            raise Declined(self._decode_name)
        return bool(event.reserved.runs_prompt)

    async def _read_first_of_decode(self, call: Any) -> None:
        """Token 0 of a prompt for which no prefill worker is needed."""
        self.figures.ran_prompt_at_decode = self._is_handed_off = True
        self._order.seats.release_prefill()
        event = await self._from_decode(call)
        if event is grpc.aio.EOF or event.WhichOneof("event") != "first_token":
            raise WorkerLost(f"{self._decode_name} did not run the prompt that it has")
        self._first.set_result(event.first_token)

    async def _read_prefill(self, channel: grpc.aio.Channel) -> None:
        """Until the call's end: the first token, then the hand-off's figures."""
        order = self._order
        stub = worker_pb2_grpc.PrefillStub(channel)
        call = stub.Run(codec.prefill_request_to_pb(order.ticket, order.request))
        self._calls.append(call)
        who = f"prefill worker {self._prefill_key}"
        try:
            while (
                event := await self._from_worker(call.read(), who, self._prefill_key)
            ) is not grpc.aio.EOF:
                self._take_prefill_event(event)
            if not self._first.done() or not (self._is_over or self._needs_no_handoff):
                raise WorkerLost(f"{who} ended before it had handed off")
        except StateferryError:
            # Tokens from decode prove that the state is there: prefill is not needed any more.
            if not (self._is_over or self._is_handed_off):
                raise
        finally:
            order.seats.release_prefill()

    def _take_prefill_event(self, event: worker_pb2.PrefillEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "first_token" and not self._first.done():
            self._first.set_result(event.first_token)
        elif kind == "prompt_tokens" and not self._first.done():
            self._take_scored(event.prompt_tokens)
        elif kind == "handed_off" and self._first.done():
            self._is_handed_off = True
            self.figures.handoff_s = event.handed_off.duration_s
            self.figures.handoff_bytes = event.handed_off.size_bytes
            self.figures.transport = event.handed_off.transport
        else:
            raise InvariantViolation(f"a prefill worker sent {kind} out of turn")

    def _take_scored(self, part: worker_pb2.PromptTokens) -> None:
        scored = self._scored_prompt
        if len(scored) + len(part.tokens) > self._order.request.prompt_len:
            raise InvariantViolation("a prefill worker scored more than the prompt")
        if part.index != len(scored):
            raise InvariantViolation(f"prompt token {part.index} came for {len(scored)}")
        scored += map(codec.token_from_pb, part.tokens)

    async def _forward_first(self) -> FinishReason | None:
        first = await self._first
        self.figures.prefill_queue_s = first.queue_s
        self.figures.prefill_s = first.prefill_s
        self.figures.prefix_tokens = first.prefix_tokens
        self.figures.resumed_tokens = first.resumed_tokens
        token = codec.token_from_pb(first.token)
        if self._echo is not None and self._order.request.prompt_logprobs is not None:
            await self._echo.send_scored(self._scored_prompt)
        index = self._order.request.num_output_ids
        reason = await self._forward(index, [token])
        if reason is None and first.HasField("finish"):
            reason = _finish_reason(first.finish)
        # The worker applies the same rule; a client is never sent past its own limits.
        return reason or self._order.request.stop.check(token.token_id, index + 1)

    async def _read_decode(self, call: Any, events: asyncio.Queue[Any]) -> None:
        """Takes what decode sends as it comes, so that its place is free when it has finished,
        however slowly the client reads. A failure waits its turn behind the tokens before it."""
        order = self._order
        try:
            while True:
                event = await self._from_decode(call)
                await events.put(event)
                if event is grpc.aio.EOF or event.WhichOneof("event") == "finished":
                    return
        except StateferryError as error:
            await events.put(error)
        finally:
            if order.seats.decode is not None:
                order.seats.decode.release()

    async def _forward_rest(self, events: asyncio.Queue[Any]) -> FinishReason:
        while True:
            event = await events.get()
            if isinstance(event, StateferryError):
                raise event
            if event is grpc.aio.EOF:
                raise WorkerLost(f"{self._decode_name} ended its stream without finishing")
            kind = event.WhichOneof("event")
            if kind == "tokens":
                self._is_handed_off = True
                tokens = [codec.token_from_pb(t) for t in event.tokens.tokens]
                reason = await self._forward(event.tokens.index, tokens)
                if reason is not None:
                    return reason
            elif kind == "finished":
                self._calls_end_by_themselves = True
                return _finish_reason(event.finished)
            else:
                raise InvariantViolation(f"a decode worker sent {kind} out of turn")

    async def _forward(self, index: int, tokens: list[SampledToken]) -> FinishReason | None:
        """STOP when a stop string ended the text."""
        request = self._order.request
        if not tokens or index + len(tokens) > request.stop.max_tokens:
            raise InvariantViolation(f"{len(tokens)} tokens at {index} do not fit the request")
        for token in tokens:
            if token.token_id >= self._order.vocab_size:
                raise InvariantViolation("a worker sent a token outside the vocabulary")
            if request.sampling.logprobs is not None and token.logprob is None:
                raise InvariantViolation("a worker sent a token without its log-probability")
        await self._stream.push(index, tokens)
        self.token_ids += (token.token_id for token in tokens)
        return FinishReason.STOP if self._stream.matched_stop is not None else None

    async def _watch_decode(self, call: Any) -> None:
        """Notices that the decode call failed while nobody reads from it."""
        code = await call.code()
        if code is not grpc.StatusCode.OK and not self._is_over:
            nothing = grpc.aio.Metadata()
            failure = grpc.aio.AioRpcError(code, nothing, nothing, await call.details())
            lost = error_from_rpc(failure, self._decode_name)
            decode = self._order.seats.placement.decode
            assert decode is not None
            self._suspect(lost, decode.key)
            raise lost

    async def _watch_loss(self, key: WorkerKey) -> None:
        """Raises WorkerLost when a worker that is still needed goes away."""
        try:
            await self._losses.watch([key])
        except WorkerLost:
            self.suspects.add(key)
            if not self._is_over and not (self._is_handed_off and key == self._prefill_key):
                raise

    async def _from_worker(self, answer: Awaitable[T], who: str, key: WorkerKey) -> T:
        try:
            return await answer
        except grpc.aio.AioRpcError as error:
            failure = error_from_rpc(error, who)
            self._suspect(failure, key)
            raise failure from error

    def _suspect(self, failure: StateferryError, key: WorkerKey) -> None:
        decode = self._order.seats.placement.decode
        if isinstance(failure, WorkerLost):
            self.suspects.add(key)
        elif decode is None:
            return
        elif isinstance(failure, HandoffError):
            # Either end may be to blame; the prefill worker has the prompt's end cached.
            self.suspects.add(decode.key)
        elif isinstance(failure, PeerUnreachable) and key == self._prefill_key:
            self.suspects.add(decode.key)

    async def _from_decode(self, call: Any) -> Any:
        decode = self._order.seats.placement.decode
        assert decode is not None
        return await self._from_worker(call.read(), self._decode_name, decode.key)

    async def _settle(self, guards: list[asyncio.Task[None]]) -> None:
        """Wait for the ends that are about to come: a call that ended needs no cancelling."""
        if self._calls_end_by_themselves:
            await asyncio.wait(guards, timeout=_SETTLE_S)

    def _cancel_calls(self) -> None:
        for call in self._calls:
            call.cancel()

    @property
    def _needs_no_handoff(self) -> bool:
        if self._order.seats.decode is None:
            return True
        return self._is_handed_off or self._first.result().HasField("finish")

    @property
    def _prefill_key(self) -> WorkerKey:
        return self._order.seats.placement.prefill.key

    @property
    def _decode_name(self) -> str:
        decode = self._order.seats.placement.decode
        assert decode is not None
        return f"decode worker {decode.key}"


def _finish_reason(message: worker_pb2.WorkerFinish) -> FinishReason:
    try:
        return codec.finish_from_pb(message)
    except InvalidRequest as error:
        raise InvariantViolation(f"a worker's {error}") from error
