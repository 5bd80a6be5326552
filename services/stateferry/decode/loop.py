"""Runs the decode scheduler's steps off the event loop's thread, and streams what they sample."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from stateferry.cache.state_cache import StateCache
from stateferry.core.clock import Clock
from stateferry.core.errors import InvariantViolation
from stateferry.core.request import Continuation, GenerationRequest
from stateferry.core.sampling import FinishReason, SampledToken
from stateferry.drafting.speculator import Speculator
from stateferry.engine.launch import Planned
from stateferry.engine.rules import why_no_token
from stateferry.engine.runner import ModelRunner
from stateferry.engine.verify_batch import Run
from stateferry.scheduler.decode import DecodeScheduler
from stateferry.scheduler.decode_step import DecodeStep
from stateferry.scheduler.extend import ExtendStep
from stateferry.scheduler.standing import PreemptionCounts
from stateferry.worker.launcher import Launcher, one_each
from stateferry.worker.meter import WorkerMeter
from stateferry.worker.pipeline import Pipeline

T = TypeVar("T")


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
        speculator: Speculator | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._launcher = Launcher(runner, cache, speculator)
        self._clock = clock
        self._meter = meter
        # What the meter knows of them.
        self._told = PreemptionCounts()
        self._reserving: dict[str, asyncio.Future[None]] = {}
        self._streams: dict[str, _Stream] = {}
        self._pipeline: Pipeline[DecodeStep | ExtendStep, list[Run]] = Pipeline(
            "decode",
            executor,
            clock,
            meter,
            schedule=scheduler.schedule,
            plan=self._plan,
            land=self._land,
        )

    def admit(self, request_id: str, held_tokens: int, priority: int = 0) -> None:
        """Queue for the memory of so many tokens, by priority, then first come first served.
        Raises Overloaded when too many wait; if not, the caller must ``abort`` the request in the
        end."""
        self._scheduler.admit(request_id, held_tokens, priority, self._clock.monotonic_s())
        self._reserving[request_id] = asyncio.get_running_loop().create_future()
        self._grant()

    async def reserved(self, request_id: str) -> None:
        """Wait until an admitted request has its memory."""
        await self._reserving[request_id]

    async def decode(
        self,
        request: Continuation,
        first_token_id: int,
        prompt: GenerationRequest | None = None,
    ) -> AsyncIterator[OutputStep]:
        """Tokens 1 and up of a reserved request whose state is in place. With its ``prompt`` it may
        be preempted, which only takes time: the tokens are the same."""
        self._begin_drafts(request, prompt)
        self._scheduler.activate(
            request.request_id,
            first_token_id,
            request.stop,
            prompt,
            num_output_tokens=len(request.output_ids) + 1,
        )
        async for output in self._outputs(request):
            yield output

    async def take_over(
        self,
        request: Continuation,
        first_token_id: int,
        prompt: GenerationRequest | None = None,
    ) -> AsyncIterator[OutputStep]:
        """Tokens 1 and up of a request whose prompt was computed in memory of this very cache,
        which is the loop's from now on."""
        self._begin_drafts(request, prompt)
        self._scheduler.take_over(
            request.request_id,
            first_token_id,
            request.stop,
            len(request.output_ids) + 1,
            prompt=prompt,
        )
        async for output in self._outputs(request):
            yield output

    def abort(self, request_id: str) -> None:
        """Forget a request in any phase; its memory is free once no step can touch it."""
        self._scheduler.abort(request_id)
        self._reserving.pop(request_id, None)
        self._drop_if_gone(request_id)
        self._grant()

    async def fill(self, work: Callable[[], T]) -> T:
        """Let ``work`` write to the memory of a reserved request, between two steps: an earlier one
        may still read what was there before."""
        return await self._pipeline.in_order(self._launcher.in_order(work))

    async def run(self) -> None:
        """Step for ever; end it by cancelling. A step that fails hurts only its own requests."""
        await self._pipeline.run()

    async def _outputs(self, request: Continuation) -> AsyncIterator[OutputStep]:
        stream = self._streams[request.request_id] = _Stream(request)
        # Whoever waits may have waited for one that can be preempted.
        self._grant()
        self._pipeline.wake()
        while True:
            output = await stream.outputs.get()
            if isinstance(output, Exception):
                raise output
            yield output
            if output.finish_reason is not None:
                return

    def _begin_drafts(self, request: Continuation, prompt: GenerationRequest | None) -> None:
        """They go by the prompt, too, where it is known."""
        self._launcher.begin(request.request_id, () if prompt is None else prompt.prompt_ids)

    def _plan(self, step: DecodeStep | ExtendStep) -> Planned[list[Run]]:
        if isinstance(step, ExtendStep):
            again = {p.request_id: self._scheduler.preempted(p.request_id) for p in step.slices}
            for request_id, request in again.items():
                self._launcher.end(request_id)
                self._launcher.begin(request_id, request.prompt_ids)
            return self._launcher.extend(step, again).then(one_each)
        requests = {row.request_id: self._streams[row.request_id].request for row in step.rows}
        return self._launcher.decode(step, requests)

    def _land(self, step: DecodeStep | ExtendStep, sampled: list[Run] | Exception) -> None:
        if isinstance(step, DecodeStep):
            self._land_decode(step, sampled)
        else:
            self._land_extend(step, sampled)
        self._grant()

    def _land_decode(self, step: DecodeStep, sampled: list[Run] | Exception) -> None:
        failure: InvariantViolation | None = None
        if isinstance(sampled, Exception):
            failure = InvariantViolation("a decode step failed")
            sampled = [Run()] * len(step.rows)
        self._launcher.landed(step, sampled)
        tokens = {
            (row.request_id, row.index + offset): token
            for row, run in zip(step.rows, sampled, strict=True)
            for offset, token in enumerate(run.tokens)
        }
        for advance in self._scheduler.complete(step, [run.token_ids for run in sampled]):
            token = tokens[advance.request_id, advance.index]
            output = OutputStep(advance.index, token, advance.finish_reason)
            self._streams[advance.request_id].outputs.put_nowait(output)
        for row, run in zip(step.rows, sampled, strict=True):
            if not run.tokens:
                stream = self._streams[row.request_id]
                stream.outputs.put_nowait(failure or why_no_token(stream.request.rules))
            self._drop_if_gone(row.request_id)

    def _land_extend(self, step: ExtendStep, sampled: list[Run] | Exception) -> None:
        """Of sequences that were preempted, and are on their way back."""
        if isinstance(sampled, Exception):
            self._scheduler.fail(step)
            failure = InvariantViolation("a preempted sequence could not be resumed")
            for part in step.slices:
                self._streams[part.request_id].outputs.put_nowait(failure)
                self._drop_if_gone(part.request_id)
            return
        last = [part.request_id for part in step.slices if part.is_last]
        runs = dict(zip(last, sampled, strict=True))
        for advance in self._scheduler.complete(step, [run.token_ids for run in sampled]):
            [token] = runs[advance.request_id].tokens
            output = OutputStep(advance.index, token, advance.finish_reason)
            self._streams[advance.request_id].outputs.put_nowait(output)
        for request_id, run in runs.items():
            if not run.tokens:
                stream = self._streams[request_id]
                stream.outputs.put_nowait(why_no_token(stream.request.rules))
        for part in step.slices:
            self._drop_if_gone(part.request_id)

    def _grant(self) -> None:
        for request_id in self._scheduler.reserve_waiting(self._clock.monotonic_s()):
            granted = self._reserving.get(request_id)
            if granted is not None and not granted.done():
                granted.set_result(None)
        if self._scheduler.is_resuming:
            self._pipeline.wake()
        counts, told = self._scheduler.counts, self._told
        if counts != told:
            self._told = replace(counts)
            self._meter.preempted(
                counts.preempted - told.preempted,
                counts.recomputed_tokens - told.recomputed_tokens,
            )

    def _drop_if_gone(self, request_id: str) -> None:
        # The reader keeps its own reference; only the loop's is dropped.
        if not self._scheduler.knows(request_id):
            self._launcher.end(request_id)
            self._streams.pop(request_id, None)
