"""The one place where our errors become gRPC statuses, and a peer's statuses become our errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from functools import wraps
from typing import Any, NoReturn, TypeVar

import grpc

from stateferry.core import errors

_CODES: tuple[tuple[type[errors.StateferryError], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    # Between workers and the router alone: not the one that says so is gone, but who it pushes to.
    (errors.PeerLost, grpc.StatusCode.ABORTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.TicketError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.Refused, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.HandoffError, grpc.StatusCode.DATA_LOSS),
    (errors.GuideBroke, grpc.StatusCode.OUT_OF_RANGE),
    (errors.ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
)

Request = TypeVar("Request")
Response = TypeVar("Response")
Stream = Callable[[Any, Request, Any], AsyncGenerator[Response, None]]


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status of an error. Anything unforeseen is INTERNAL: it never looks like success."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """End the call with the error's status. Details of unforeseen errors stay in our logs."""
    code = code_of(error)
    known = isinstance(error, errors.StateferryError)
    text = str(error) if known else f"internal error: {type(error).__name__}"
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(error, errors.Overloaded):
        trailing = (("retry-after-ms", str(int(error.retry_after_s * 1000))),)
    await context.abort(code, text, trailing)


def streams_errors(
    log: Callable[[Exception], None],
) -> Callable[[Stream[Request, Response]], Stream[Request, Response]]:
    """Decorate a server-streaming handler: errors become statuses, unforeseen ones are logged."""

    def decorate(handler: Stream[Request, Response]) -> Stream[Request, Response]:
        @wraps(handler)
        async def wrapped(
            self: Any, request: Request, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncGenerator[Response, None]:
            try:
                # Closed here and now: what a handler frees must not wait for a collector.
                async with contextlib.aclosing(handler(self, request, context)) as responses:
                    async for response in responses:
                        yield response
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except Exception as error:
                log(error)
                await abort(context, error)

        return wrapped

    return decorate


def error_from_rpc(error: grpc.aio.AioRpcError, who: str) -> errors.StateferryError:
    """What a worker's status means to the router's caller. ``who`` names the worker.

    Refusals between our own processes are never the client's fault and read as a worker that could
    not serve. A worker's bug stays one: trying again would meet it again.
    """
    code, text = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.Overloaded(f"{who}: {text}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(f"{who}: {text}")
    if code is grpc.StatusCode.DATA_LOSS:
        return errors.HandoffError(f"{who}: {text}")
    if code is grpc.StatusCode.OUT_OF_RANGE:
        return errors.GuideBroke(text)
    if code is grpc.StatusCode.INTERNAL:
        return errors.InvariantViolation(f"{who}: {text}")
    if code is grpc.StatusCode.ABORTED:
        return errors.PeerUnreachable(f"{who}: {text}")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return errors.WorkerLost(f"{who} went away: {text}")
    return errors.Unavailable(f"{who}: {code.name}: {text}")
