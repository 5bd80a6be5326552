"""The one-process engine: what a cluster must agree with, token for token.

It is the same schedulers, cache and runner as the workers', without gRPC and without a transfer: a
computed prompt's lease simply passes from the prefill to the decode scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import StateferryError
from stateferry.core.request import Continuation, GenerationRequest
from stateferry.core.sampling import FinishReason, SampledToken
from stateferry.engine.prompt_scores import as_scores
from stateferry.engine.rules import RulesMaker, why_no_token
from stateferry.engine.runner import ModelRunner
from stateferry.scheduler.decode import DecodeScheduler
from stateferry.scheduler.prefill import PrefillScheduler
from stateferry.worker.batches import decode_batch, extend_batch
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
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._rules = rules
        self._prefill = PrefillScheduler(
            cache, grid=grid, budget_tokens=budget_tokens, max_waiting=1 << 30
        )
        self._decode = DecodeScheduler(cache, max_waiting=0)
        self._requests: dict[str, GenerationRequest] = {}
        self._running: dict[str, Continuation] = {}
        self.outputs: dict[str, Output] = {}

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; its output grows in ``outputs``. Blocks while a guide is compiled."""
        request = steered(request, self._rules)
        self._prefill.submit(request, request.total_tokens)
        self._requests[request.request_id] = request
        self.outputs[request.request_id] = Output()

    def abort(self, request_id: str) -> None:
        """Forget an unfinished request, between two steps, and its output so far."""
        if self._requests.pop(request_id, None) is not None:
            self._prefill.abort(request_id)
            self._decode.abort(request_id)
            self._running.pop(request_id, None)
            del self.outputs[request_id]

    def preempt(self, request_id: str) -> bool:
        """Take a decoding sequence's memory, between two steps; False if it is not decoding. It
        waits its turn again and goes on from what the cache still has of it then."""
        if request_id not in self._running:
            return False
        self._decode.abort(request_id)
        del self._running[request_id]
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
        failures = [*self._extend(), *self._decode_once()]
        if failures:
            raise failures[0]

    def generate(self, requests: Sequence[GenerationRequest]) -> dict[str, Output]:
        """Run requests to their end and take their outputs."""
        for request in requests:
            self.submit(request)
        while self.num_unfinished:
            self.step()
        return {request.request_id: self.outputs.pop(request.request_id) for request in requests}

    def _extend(self) -> list[StateferryError]:
        step = self._prefill.schedule()
        if step is None:
            return []
        copies = self._cache.take_copies()
        tokens = self._runner.extend(extend_batch(step, self._requests, self._cache, copies))
        failures = []
        for request_id, token in zip(self._prefill.complete(step), tokens, strict=True):
            if token is None:
                self._cache.spoil(request_id)
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
            self._prefill.hand_over(request_id)
            self._decode.take_over(request_id, token.token_id, request.stop, count)
        else:
            self._prefill.release(request_id)

    def _decode_once(self) -> list[StateferryError]:
        step = self._decode.schedule()
        if step is None:
            return []
        copies = self._cache.take_copies()
        sampled = self._runner.decode(decode_batch(step, self._running, self._cache, copies))
        tokens = {row.request_id: t for row, t in zip(step.rows, sampled, strict=True)}
        ids = [None if token is None else token.token_id for token in sampled]
        for request_id, token in tokens.items():
            if token is not None:
                self._cache.track(request_id)
        for advance in self._decode.complete(step, ids):
            token = tokens[advance.request_id]
            assert token is not None
            self._emit(advance.request_id, token, advance.finish_reason)
        return [self._drop(request_id) for request_id, token in tokens.items() if token is None]

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
            self._running.pop(request_id, None)
