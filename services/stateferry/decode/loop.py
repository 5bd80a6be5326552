"""Runs the decode scheduler's steps, one after the other, off the event loop's thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from dataclasses import dataclass, field

from stateferry.cache.state_cache import StateCache
from stateferry.core.clock import Clock
from stateferry.core.errors import InvariantViolation
from stateferry.core.request import Continuation
from stateferry.core.sampling import FinishReason, SampledToken
from stateferry.engine.rules import why_no_token
from stateferry.engine.runner import ModelRunner
from stateferry.scheduler.decode import DecodeScheduler, DecodeStep
from stateferry.worker.batches import decode_batch
from stateferry.worker.meter import WorkerMeter
from stateferry.worker.waiting import Wakeup, run_to_end

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OutputStep:
    """Output token ``index`` of one request; ``finish_reason`` is set on the last one."""

    index: int
    token: SampledToken
    finish_reason: FinishReason | None


@dataclass(slots=True)
class _Stream:
    request: Continuation
    # Unbounded in form, bounded in fact: at most max_tokens entries of one request.
    outputs: asyncio.Queue[OutputStep | Exception] = field(default_factory=asyncio.Queue)


class DecodeLoop:
    """Owned by one event loop; ``run`` is its only user of the runner."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        cache: StateCache,
        runner: ModelRunner,
        executor: Executor,
        clock: Clock,
        meter: WorkerMeter,
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._runner = runner
        self._executor = executor
        self._clock = clock
        self._meter = meter
        self._reserving: dict[str, asyncio.Future[None]] = {}
        self._streams: dict[str, _Stream] = {}
        self._wakeup = Wakeup()

    def admit(self, request_id: str, held_tokens: int) -> None:
        """Queue for the memory of so many tokens, first come first served. Raises Overloaded when
        too many wait; if not, the caller must ``abort`` the request in the end."""
        self._scheduler.admit(request_id, held_tokens)
        self._reserving[request_id] = asyncio.get_running_loop().create_future()
        self._grant()

    async def reserved(self, request_id: str) -> None:
        """Wait until an admitted request has its memory."""
        await self._reserving[request_id]

    async def decode(self, request: Continuation, first_token_id: int) -> AsyncIterator[OutputStep]:
        """Tokens 1 and up of a reserved request whose state is in place."""
        stream = _Stream(request)
        self._streams[request.request_id] = stream
        self._scheduler.activate(request.request_id, first_token_id, request.stop)
        self._wakeup.set()
        while True:
            output = await stream.outputs.get()
            if isinstance(output, Exception):
                raise output
            yield output
            if output.finish_reason is not None:
                return

    def abort(self, request_id: str) -> None:
        """Forget a request in any phase; its memory is free once no step can touch it."""
        self._scheduler.abort(request_id)
        self._reserving.pop(request_id, None)
        self._drop_if_gone(request_id)
        self._grant()

    async def run(self) -> None:
        """Step for ever; end it by cancelling. A step that fails hurts only its own requests."""
        while True:
            step = self._scheduler.schedule()
            if step is None:
                await self._wakeup.wait()
                continue
            began_s = self._clock.monotonic_s()
            await self._run_step(step)
            took_s = self._clock.monotonic_s() - began_s
            self._meter.observe_step("decode", took_s, len(step.rows), len(step.rows))

    async def _run_step(self, step: DecodeStep) -> None:
        requests = {row.request_id: self._streams[row.request_id].request for row in step.rows}
        copies = self._cache.take_copies()
        tokens: list[SampledToken | None]
        failure: InvariantViolation | None = None
        try:
            batch = decode_batch(step, requests, self._cache, copies)
            tokens = await run_to_end(self._executor, self._runner.decode, batch)
        except Exception:
            log.exception("a decode step failed")
            self._cache.return_copies(copies)
            failure = InvariantViolation("a decode step failed")
            tokens = [None] * len(step.rows)
        sampled = {row.request_id: token for row, token in zip(step.rows, tokens, strict=True)}
        ids = [None if token is None else token.token_id for token in tokens]
        for advance in self._scheduler.complete(step, ids):
            token = sampled[advance.request_id]
            if token is None:
                raise InvariantViolation(f"{advance.request_id} advanced without a token")
            output = OutputStep(advance.index, token, advance.finish_reason)
            self._streams[advance.request_id].outputs.put_nowait(output)
        for request_id, token in sampled.items():
            if token is None:
                stream = self._streams[request_id]
                stream.outputs.put_nowait(failure or why_no_token(stream.request.rules))
            self._drop_if_gone(request_id)
        self._grant()

    def _grant(self) -> None:
        for request_id in self._scheduler.reserve_waiting():
            granted = self._reserving.get(request_id)
            if granted is not None and not granted.done():
                granted.set_result(None)

    def _drop_if_gone(self, request_id: str) -> None:
        # The reader keeps its own reference; only the loop's is dropped.
        if not self._scheduler.knows(request_id):
            self._streams.pop(request_id, None)
