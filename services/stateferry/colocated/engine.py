"""The one-process engine: what a cluster must agree with, token for token.

It is the same schedulers, cache and runner as the workers', without gRPC and without a transfer: a
computed prompt's lease simply passes from the prefill to the decode scheduler. Prompts and decoding
sequences take turns on one thread, in passes of their own: a pass of both would compute the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import InvariantViolation, StateferryError
from stateferry.core.request import Continuation, GenerationRequest
from stateferry.core.sampling import FinishReason, SampledToken
from stateferry.drafting.speculator import Speculator
from stateferry.engine.launch import Planned, ResultT, Running, Sampled
from stateferry.engine.prompt_scores import as_scores
from stateferry.engine.rules import RulesMaker, why_no_token
from stateferry.engine.runner import ModelRunner
from stateferry.engine.verify_batch import Run
from stateferry.scheduler.decode import DecodeScheduler
from stateferry.scheduler.decode_step import DecodeStep
from stateferry.scheduler.extend import ExtendStep
from stateferry.scheduler.prefill import PrefillScheduler
from stateferry.worker.launcher import Launcher
from stateferry.worker.steering import steered


@dataclass(slots=True)
class Output:
    """Tokens of one request so far; ``finish_reason`` is set when there will be no more.
    ``prompt`` holds the prompt's scored tokens, if they were asked for."""

    tokens: list[SampledToken] = field(default_factory=list)
    prompt: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A pass of either kind."""

    started: Future[Running[Any]]
    land: Callable[[Any], list[StateferryError]]


class ColocatedEngine:
    """Synchronous: ``submit`` requests, call ``step`` until ``num_unfinished`` is 0."""

    def __init__(
        self,
        runner: ModelRunner,
        cache: StateCache,
        rules: RulesMaker,
        *,
        grid: int,
        budget_tokens: int,
        overlap: bool = False,
        speculator: Speculator | None = None,
    ) -> None:
        """overlap: whether steps are planned while the ones before run, on a thread of their own.
        Outputs then come one ``step`` later, and are the same. speculator: drafts; the runner has
        room for them. Decode steps do not overlap then."""
        self._cache = cache
        self._rules = rules
        self._launcher = Launcher(runner, cache, speculator)
        self._overlap = overlap
        self._thread = ThreadPoolExecutor(1, "engine") if overlap else None
        self._in_flight: deque[_InFlight] = deque()
        self._failures: list[StateferryError] = []
        # Steps that were planned while another one was in flight.
        self.num_overlapped = 0
        most: Literal[1, 2] = 2 if overlap else 1
        self._prefill = PrefillScheduler(
            cache,
            grid=grid,
            budget_tokens=budget_tokens,
            max_waiting=1 << 30,
            max_in_flight=most,
        )
        self._decode = DecodeScheduler(
            cache, max_waiting=0, max_in_flight=1 if speculator is not None else most
        )
        self._requests: dict[str, GenerationRequest] = {}
        self._running: dict[str, Continuation] = {}
        self.outputs: dict[str, Output] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; its output grows in ``outputs``. Blocks while a guide is compiled."""
        if request.request_id in self._requests:
            raise InvariantViolation(f"{request.request_id} was submitted twice")
        if self._prefill.knows(request.request_id) or self._decode.knows(request.request_id):
            # Aborted, but not out of the last step yet.
            self.settle()
        request = steered(request, self._rules)
        self._prefill.submit(request, request.total_tokens)
        self._requests[request.request_id] = request
        self.outputs[request.request_id] = Output()

    def abort(self, request_id: str) -> None:
        """Forget an unfinished request, between two steps, and its output so far. What it holds is
        free once no step in flight touches it."""
        if self._requests.pop(request_id, None) is not None:
            self._prefill.abort(request_id)
            self._decode.abort(request_id)
            self._forget(request_id)
            del self.outputs[request_id]

    def preempt(self, request_id: str) -> bool:
        """Take a decoding sequence's memory, between two steps; False if it is not decoding. It
        waits its turn again and goes on from what the cache still has of it then."""
        # A token that is on its way has been counted by the request's guide and penalties.
        self.settle()
        if request_id not in self._running:
            return False
        self._decode.abort(request_id)
        self._forget(request_id)
        request, token_ids = self._requests[request_id], self.outputs[request_id].token_ids
        prompt_ids = request.prompt_ids[: request.prompt_len - request.num_output_ids]
        again = replace(
            request,
            prompt_ids=(*prompt_ids, *token_ids),
            num_output_ids=len(token_ids),
            scores=None,
        )
        self._requests[request_id] = again
        self._prefill.submit(again, again.total_tokens)
        return True

    def step(self) -> None:
        """One extend and one decode pass, of whatever is ready. Raises what kept a request from its
        next token; that request is forgotten by then, and the others may go on."""
        before = len(self._in_flight)
        for launch in (self._launch_extend, self._launch_decode):
            launch()
            if not self._overlap:
                self.settle()
        for _ in range(before):
            self._land_oldest()
        if not self._requests:
            # Steps that were one too many.
            self.settle()
        failures, self._failures = self._failures, []
        if failures:
            raise failures[0]

    def settle(self) -> None:
        """Wait for what is in flight, and take its results."""
        while self._in_flight:
            self._land_oldest()

    def generate(self, requests: Sequence[GenerationRequest]) -> dict[str, Output]:
        """Run requests to their end and take their outputs."""
        for request in requests:
            self.submit(request)
        while self.num_unfinished:
            self.step()
        return {request.request_id: self.outputs.pop(request.request_id) for request in requests}

    def _launch_extend(self) -> None:
        step = self._prefill.schedule()
        if step is not None:
            launch = self._launcher.extend(step, self._requests)
            self._launch(launch, partial(self._land_extend, step))

    def _launch_decode(self) -> None:
        step = self._decode.schedule()
        if isinstance(step, DecodeStep):
            launch = self._launcher.decode(step, self._running)
            self._launch(launch, partial(self._land_decode, step))

    def _launch(
        self, launch: Planned[ResultT], land: Callable[[ResultT], list[StateferryError]]
    ) -> None:
        if self._thread is not None:
            self.num_overlapped += bool(self._in_flight)
            started = self._thread.submit(launch.start)
        else:
            started = Future()
            started.set_result(launch.start())
        self._in_flight.append(_InFlight(started, land))

    def _land_oldest(self) -> None:
        oldest = self._in_flight.popleft()
        self._failures += oldest.land(oldest.started.result().sampled())

    def _land_extend(self, step: ExtendStep, sampled: Sampled) -> list[StateferryError]:
        last = [part.request_id for part in step.slices if part.is_last]
        tokens = dict(zip(last, sampled, strict=True))
        for request_id, token in tokens.items():
            if token is None:
                self._cache.spoil(request_id)
        failures = []
        for request_id in self._prefill.complete(step):
            token = tokens[request_id]
            if token is None:
                failures.append(self._drop(request_id))
            else:
                self._begin(request_id, token)
        return failures

    def _begin(self, request_id: str, token: SampledToken) -> None:
        """The token after a computed prompt."""
        request = self._requests[request_id]
        count = request.num_output_ids + 1
        scores = as_scores(request.scores)
        if scores is not None:
            self.outputs[request_id].prompt = scores.result()
        self._emit(request_id, token, request.stop.check(token.token_id, count))
        if request_id in self._requests:
            self._cache.publish(request_id)
            self._running[request_id] = request.continuation
            self._launcher.begin(request_id, request.prompt_ids)
            self._prefill.hand_over(request_id)
            self._decode.take_over(request_id, token.token_id, request.stop, count)
        else:
            self._prefill.release(request_id)

    def _land_decode(self, step: DecodeStep, runs: list[Run]) -> list[StateferryError]:
        self._launcher.landed(step, runs)
        tokens = {
            (row.request_id, row.index + offset): token
            for row, run in zip(step.rows, runs, strict=True)
            for offset, token in enumerate(run.tokens)
        }
        for advance in self._decode.complete(step, [run.token_ids for run in runs]):
            token = tokens[advance.request_id, advance.index]
            self._emit(advance.request_id, token, advance.finish_reason)
        return [
            self._drop(row.request_id)
            for row, run in zip(step.rows, runs, strict=True)
            if not run.tokens and row.request_id in self._requests
        ]

    def _drop(self, request_id: str) -> StateferryError:
        failure = why_no_token(self._requests[request_id].rules)
        self.abort(request_id)
        return failure

    def _emit(self, request_id: str, token: SampledToken, reason: FinishReason | None) -> None:
        output = self.outputs[request_id]
        output.tokens.append(token)
        if reason is not None:
            output.finish_reason = reason
            del self._requests[request_id]
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._running.pop(request_id, None)
        self._launcher.end(request_id)
