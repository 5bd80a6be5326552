"""Runs the prefill scheduler's steps off the event loop's thread, and says what became of them."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass, field

from stateferry.cache.state_cache import StateCache
from stateferry.core.clock import Clock
from stateferry.core.errors import InvariantViolation, StateferryError
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SampledToken
from stateferry.engine.launch import Launch, Sampled
from stateferry.engine.rules import why_no_token
from stateferry.engine.runner import ModelRunner
from stateferry.scheduler.extend import ExtendStep
from stateferry.scheduler.prefill import PrefillScheduler
from stateferry.worker.launcher import Launcher
from stateferry.worker.meter import WorkerMeter
from stateferry.worker.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class ComputedPrompt:
    """A prompt whose state is complete; its lease is held until ``abort``."""

    token: SampledToken
    resumed_tokens: int
    queue_s: float
    prefill_s: float


@dataclass(slots=True)
class _Pending:
    request: GenerationRequest
    done: asyncio.Future[ComputedPrompt]
    arrived_s: float
    started_s: float | None = None
    # Of the prompt, by steps that have come back; those who wait for more of it.
    landed_tokens: int = 0
    landed: asyncio.Event = field(default_factory=asyncio.Event)


class PrefillLoop:
    """Owned by one event loop; ``run`` is its only user of the runner."""

    def __init__(
        self,
        scheduler: PrefillScheduler,
        cache: StateCache,
        runner: ModelRunner,
        executor: Executor,
        clock: Clock,
        meter: WorkerMeter,
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._launcher = Launcher(runner, cache)
        self._clock = clock
        self._pending: dict[str, _Pending] = {}
        self._pipeline: Pipeline[ExtendStep, Sampled] = Pipeline(
            "extend",
            executor,
            clock,
            meter,
            schedule=lambda: scheduler.schedule(clock.monotonic_s()),
            plan=self._plan,
            land=self._land,
        )

    def submit(self, request: GenerationRequest) -> None:
        """Queue a prompt. Raises Overloaded; if not, the caller must ``abort`` it in the end."""
        # Token 0 is consumed where it is decoded: only the prompt has to be held here.
        now_s = self._clock.monotonic_s()
        self._scheduler.submit(request, request.prompt_len, now_s)
        done: asyncio.Future[ComputedPrompt] = asyncio.get_running_loop().create_future()
        self._pending[request.request_id] = _Pending(request, done, now_s)
        self._pipeline.wake()

    async def computed(self, request_id: str) -> ComputedPrompt:
        """Token 0 of a submitted prompt, once its state is complete. The lease stays."""
        return await self._pending[request_id].done

    async def advanced(self, request_id: str, beyond: int) -> int:
        """Waits until more than ``beyond`` tokens of a submitted prompt are computed but not yet
        all; returns their number. What is known of those in pages does not change any more."""
        pending = self._pending[request_id]
        while pending.landed_tokens <= beyond:
            pending.landed.clear()
            await pending.landed.wait()
        return pending.landed_tokens

    def abort(self, request_id: str) -> None:
        """Forget a request in any phase; its memory is free once no step can touch it."""
        self._scheduler.abort(request_id)
        if not self._scheduler.knows(request_id):
            self._pending.pop(request_id, None)
        self._pipeline.wake()

    async def run(self) -> None:
        """Step for ever; end it by cancelling. A step that fails hurts only its own requests."""
        await self._pipeline.run()

    def _plan(self, step: ExtendStep) -> Launch:
        now_s = self._clock.monotonic_s()
        requests = {}
        for part in step.slices:
            pending = self._pending[part.request_id]
            pending.started_s = pending.started_s or now_s
            requests[part.request_id] = pending.request
        return self._launcher.extend(step, requests)

    def _land(self, step: ExtendStep, sampled: Sampled | Exception) -> None:
        if isinstance(sampled, Exception):
            self._scheduler.fail(step)
            for part in step.slices:
                self._fail(part.request_id, sampled)
        else:
            self._complete(step, sampled)
        for part in step.slices:
            if not self._scheduler.knows(part.request_id):
                self._pending.pop(part.request_id, None)

    def _complete(self, step: ExtendStep, sampled: Sampled) -> None:
        for part in step.slices:
            pending = self._pending.get(part.request_id)
            if pending is not None and not part.is_last:
                pending.landed_tokens = part.start + part.length
                pending.landed.set()
        last = [part.request_id for part in step.slices if part.is_last]
        tokens = dict(zip(last, sampled, strict=True))
        for request_id, token in tokens.items():
            if token is None:
                # Before it is released, which may be now if it was aborted meanwhile.
                self._cache.spoil(request_id)
        for request_id in self._scheduler.complete(step):
            self._finish(request_id, tokens[request_id])

    def _finish(self, request_id: str, token: SampledToken | None) -> None:
        pending = self._pending[request_id]
        if token is None:
            self._fail(request_id, why_no_token(pending.request.rules))
            return
        if pending.started_s is None:
            raise InvariantViolation(f"{request_id} finished without having started")
        computed = ComputedPrompt(
            token=token,
            resumed_tokens=self._cache.resumed_tokens(request_id),
            queue_s=pending.started_s - pending.arrived_s,
            prefill_s=self._clock.monotonic_s() - pending.started_s,
        )
        if not pending.done.done():
            pending.done.set_result(computed)

    def _fail(self, request_id: str, error: Exception) -> None:
        pending = self._pending.get(request_id)
        if pending is None or pending.done.done():
            return
        known = isinstance(error, StateferryError)
        pending.done.set_exception(
            error if known else InvariantViolation(f"a prefill step failed: {error!r}")
        )
