"""POST /v1/completions and /v1/chat/completions: from a body to an answer, by the same checks, the
same admission and the same Generation as a gRPC call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from stateferry.api import inference_codec as codec
from stateferry.api.answer_codec import Completion, Delta, PromptPart
from stateferry.api.status import code_of
from stateferry.core.errors import DeadlineExceeded, InvalidRequest
from stateferry.http_front.answers import Answer, Shape, TokenText
from stateferry.http_front.errors import HttpError, http_error
from stateferry.http_front.exchange import (
    BodyTooLarge,
    ClientLeft,
    Responder,
    read_body,
    while_connected,
)
from stateferry.http_front.fields import parse_object
from stateferry.http_front.order import Order
from stateferry.router.choices import run_choices
from stateferry.router.intake import Backend, Door, make_job
from stateferry.telemetry.logs import log_request_id

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
ReadOrder = Callable[[dict[str, Any]], Awaitable[Order]]


class GenerationEndpoint:
    """An ASGI application for one of the two paths."""

    def __init__(
        self,
        backend: Backend,
        shape: Shape,
        read_order: ReadOrder,
        prompt_field: str,
        max_body_bytes: int,
    ) -> None:
        self._backend = backend
        self._shape = shape
        self._read_order = read_order
        self._prompt_field = prompt_field
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        responder = Responder(send, {})
        async with self._call(responder):
            arrived_s = self._backend.clock.monotonic_s()
            _check_content_type(headers)
            content = parse_object(await read_body(receive, self._max_body_bytes))
            order = await self._read_order(content)
            order.message.request_id = headers.get(REQUEST_ID, "")
            timeout_s = order.delivery.timeout_s
            try:
                async with asyncio.timeout(timeout_s):
                    work = self._answer(order, arrived_s, responder)
                    await while_connected(receive, work)
            except TimeoutError:
                raise DeadlineExceeded(f"it took more than {timeout_s:g} s") from None

    async def _answer(self, order: Order, arrived_s: float, responder: Responder) -> None:
        backend, door = self._backend, self._backend.door
        client = codec.parse_generate(order.message.SerializeToString(), door.limits)
        log_request_id(client.request_id)
        responder.add_headers({REQUEST_ID: client.request_id})
        num_choices = client.answer.num_choices
        answer = Answer(
            self._shape,
            client.request_id,
            door.model.name,
            num_choices,
            _token_text(door),
            logprobs=order.logprobs,
            include_usage=order.delivery.include_usage,
        )
        with door.admission.enter(client.request_id, num_choices):
            job = await make_job(door, client, arrived_s, order.delivery.timeout_s)
            if order.delivery.stream:
                writer = _ChunkWriter(answer, responder)
                await run_choices(backend.generation, job, num_choices, writer.emit, writer.finish)
                if (usage := answer.usage_chunk()) is not None:
                    await responder.events(usage)
                await responder.end_events(done=True)
                return
            collector = _Collector(answer)
            await run_choices(
                backend.generation, job, num_choices, collector.emit, collector.finish
            )
        await responder.whole(200, answer.whole())

    @contextlib.asynccontextmanager
    async def _call(self, responder: Responder) -> AsyncIterator[None]:
        """Counts a call as the gRPC door does, and turns its error into a response."""
        backend = self._backend
        began_s = backend.clock.monotonic_s()
        backend.observer.request_started()
        code = grpc.StatusCode.OK
        try:
            yield
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except ClientLeft:
            code = grpc.StatusCode.CANCELLED
        except BodyTooLarge as error:
            code = grpc.StatusCode.INVALID_ARGUMENT
            await _fail(responder, HttpError(413, "invalid_request_error", str(error)))
        except Exception as error:
            code = code_of(error)
            _log_failure(error, code)
            await _fail(responder, http_error(error, self._prompt_field))
        finally:
            backend.observer.request_finished(code.name, backend.clock.monotonic_s() - began_s)


class _ChunkWriter:
    """Sends chunks as events come. Until the first token nothing is sent: an error still has its
    own status then."""

    def __init__(self, answer: Answer, responder: Responder) -> None:
        self._answer = answer
        self._responder = responder
        self._openings = answer.openings()

    async def emit(self, event: Delta | PromptPart) -> None:
        chunk = self._answer.add(event)
        await self._send(*([] if chunk is None else [chunk]))

    async def finish(self, completion: Completion) -> None:
        await self._send(self._answer.finish(completion))

    async def _send(self, *chunks: dict[str, Any]) -> None:
        openings, self._openings = self._openings, []
        await self._responder.events(*openings, *chunks)


class _Collector:
    """Keeps everything for an answer in one piece."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def emit(self, event: Delta | PromptPart) -> None:
        self._answer.add(event)

    async def finish(self, completion: Completion) -> None:
        self._answer.finish(completion)


async def _fail(responder: Responder, failure: HttpError) -> None:
    """A response of its own, or the last event of a stream that has begun and never gets [DONE]."""
    if responder.has_begun:
        with contextlib.suppress(Exception):
            await responder.events(failure.body)
            await responder.end_events(done=False)
        return
    responder.add_headers(failure.headers)
    await responder.whole(failure.status, failure.body)


def _check_content_type(headers: Headers) -> None:
    # Browsers send other types to any address, unasked: a web page must not reach a local router.
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise InvalidRequest("Content-Type", "is not application/json")


def _token_text(door: Door) -> TokenText:
    """Tokens by themselves; parts of characters read U+FFFD. For one answer, whose tokens come
    again and again."""
    texts: dict[int, str] = {}

    def text_of(token_id: int) -> str:
        if token_id not in texts:
            texts[token_id] = door.tokenizer.decode((token_id,), skip_special_tokens=False)
        return texts[token_id]

    return text_of


def _log_failure(error: Exception, code: grpc.StatusCode) -> None:
    if isinstance(error, InvalidRequest):
        # Its text may tell of the prompt; the field's name does not.
        log.info("refused a request: %s", error.field)
    elif code is grpc.StatusCode.INTERNAL:
        log.error("a request failed: %s", type(error).__name__, exc_info=error)
    else:
        log.warning("a request failed: %s: %s", type(error).__name__, error)
