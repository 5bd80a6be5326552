"""The public gRPC door.

::

    client --GenerateRequest--> InferenceServicer --parse, tokenise--> Admission --seats--+
                                                                                          |
    client <--Delta 0, 1, ..--- ClientStream <--+-- Attempt <--ticket, workers------------+
    client <--Completion------- Generation      |
                                                +--Generate(ticket)--> decode worker <==+
                                                +--Run(ticket)-------> prefill worker ==+ UCX

Tokens come back over gRPC, state never touches the router.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from stateferry.api import answer_codec
from stateferry.api import inference_codec as codec
from stateferry.api.status import abort, code_of
from stateferry.core.clock import Clock
from stateferry.core.errors import InvalidRequest, Overloaded
from stateferry.core.ids import Role
from stateferry.router.choices import run_choices
from stateferry.router.generate import Generation
from stateferry.router.intake import Door, make_job
from stateferry.router.membership import WorkerRegistry
from stateferry.router.observer import RouterObserver
from stateferry.telemetry.logs import log_request_id
from stateferry.v1 import inference_pb2

log = logging.getLogger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
# A client that reads nothing for this long gives its workers back.
CLIENT_STALL_S = 60.0

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer:
    """Takes raw request bytes, so that malformed ones are answered by name of field."""

    def __init__(
        self,
        door: Door,
        generation: Generation,
        registry: WorkerRegistry,
        clock: Clock,
        observer: RouterObserver,
    ) -> None:
        self._door = door
        self._generation = generation
        self._registry = registry
        self._clock = clock
        self._observer = observer

    def register(self, server: grpc.aio.Server) -> None:
        """Add the handlers; what generated code would do, but for the request parser."""
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "Generate": grpc.unary_stream_rpc_method_handler(self.Generate),
            "ListModels": grpc.unary_unary_rpc_method_handler(self.ListModels),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),)
        )

    async def Generate(self, payload: bytes, context: Context) -> None:
        """Answers with deltas and one completion, or ends with an error's status."""
        writer = ResponseWriter(context)
        async with self._call(context, writer):
            arrived_s = self._clock.monotonic_s()
            remaining_s = context.time_remaining()
            client = codec.parse_generate(payload, self._door.limits)
            log_request_id(client.request_id)
            num_choices = client.answer.num_choices
            with self._door.admission.enter(client.request_id, num_choices):
                job = await make_job(self._door, client, arrived_s, remaining_s)
                await run_choices(self._generation, job, num_choices, writer.emit, writer.finish)

    async def ListModels(self, payload: bytes, context: Context) -> bytes:
        """The one model this router serves."""
        model = self._door.model
        listing = answer_codec.ModelListing(
            name=model.name,
            max_context_tokens=model.max_context_tokens,
            vocab_size=model.vocab_size,
            grid_tokens=model.grid_tokens,
            prefill_workers=len(self._registry.views(Role.PREFILL)),
            decode_workers=len(self._registry.views(Role.DECODE)),
        )
        return answer_codec.models_to_bytes([listing])

    @contextlib.asynccontextmanager
    async def _call(self, context: Context, writer: ResponseWriter) -> AsyncIterator[None]:
        """Counts a call, and turns its error into a status."""
        began_s = self._clock.monotonic_s()
        self._observer.request_started()
        code = grpc.StatusCode.OK
        try:
            yield
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            writer.abandon()
            raise
        except Exception as error:
            code = code_of(error)
            if context.done():
                # The client has left: a write failed, and nobody would hear of it.
                code = grpc.StatusCode.CANCELLED
                writer.abandon()
                return
            _log_failure(error)
            await writer.settle()
            await abort(context, error)
        finally:
            self._observer.request_finished(code.name, self._clock.monotonic_s() - began_s)


class ResponseWriter:
    """Writes one call's responses, one after the other.

    A write that was handed to gRPC must come to its end before a status can be sent, so cancelling
    whoever waits for it must not cancel it.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._last: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def emit(self, event: answer_codec.Delta | answer_codec.PromptPart) -> None:
        if isinstance(event, answer_codec.Delta):
            await self.write(answer_codec.delta_to_bytes(event))
        else:
            await self.write(answer_codec.prompt_part_to_bytes(event))

    async def finish(self, completion: answer_codec.Completion) -> None:
        await self.write(answer_codec.completion_to_bytes(completion))

    async def write(self, payload: bytes) -> None:
        """Returns when gRPC has taken the response. Raises Overloaded when it does not in time."""
        async with self._turn:
            # A writer that was cancelled, of another choice, may have left its write behind.
            await self.settle()
            self._last = asyncio.ensure_future(self._context.write(payload))
            await asyncio.wait((self._last,), timeout=CLIENT_STALL_S)
            if not self._last.done():
                raise Overloaded("the client does not read its stream")
            self._last.result()

    def abandon(self) -> None:
        """The call is over: nobody waits for the last write any more."""
        if self._last is not None:
            self._last.cancel()

    async def settle(self) -> None:
        """Wait for the last write: for a client that does not read, until it reads or leaves."""
        if self._last is not None:
            with contextlib.suppress(Exception):
                await self._last


def _log_failure(error: Exception) -> None:
    if isinstance(error, InvalidRequest):
        # Its text may tell of the prompt; the field's name does not.
        log.info("refused a request: %s", error.field)
    elif code_of(error) is grpc.StatusCode.INTERNAL:
        log.error("a request failed: %s", type(error).__name__, exc_info=error)
    else:
        log.warning("a request failed: %s: %s", type(error).__name__, error)
