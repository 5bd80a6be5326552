"""A prompt of which this decode worker has nearly all runs here: nothing has to be handed off.

That is the next turn of a chat: the worker computed the last turn's answer, which no prefill worker
has ever seen.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from stateferry.cache.state_cache import StateCache
from stateferry.core.clock import Clock
from stateferry.core.errors import InvariantViolation
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import SampledToken
from stateferry.decode.loop import DecodeLoop
from stateferry.engine.forward_batch import ExtendBatch, ExtendRow
from stateferry.engine.launch import Launch, Sampled
from stateferry.engine.rules import why_no_token
from stateferry.engine.runner import ModelRunner
from stateferry.worker.launcher import sample_spec
from stateferry.worker.meter import WorkerMeter

log = logging.getLogger(__name__)


class Queue(Protocol):
    """Sequences that wait for memory."""

    def anyone_before(self, priority: int, now_s: float) -> bool:
        """Whether somebody waits who comes before a newcomer of this priority."""


@dataclass(frozen=True, slots=True)
class RanPrompt:
    """Token 0 of a prompt, and how it came about; seconds."""

    token: SampledToken
    resumed_tokens: int
    queue_s: float
    prefill_s: float


class LocalPrefill:
    """``begin`` -> ``run`` -> ``hand_over``, or ``abort`` in any phase. A prompt is one launch
    between those of decode steps; no more than ``limit_tokens`` are to be computed at a time, so
    that decoding sequences are not held up for longer."""

    def __init__(
        self,
        cache: StateCache,
        runner: ModelRunner,
        loop: DecodeLoop,
        queue: Queue,
        clock: Clock,
        meter: WorkerMeter,
        *,
        limit_tokens: int,
    ) -> None:
        self._cache = cache
        self._runner = runner
        self._loop = loop
        self._queue = queue
        self._clock = clock
        self._meter = meter
        self._limit_tokens = limit_tokens
        # Leased and not handed over, with how many tokens are still to be computed.
        self._held: dict[str, int] = {}

    @property
    def num_active(self) -> int:
        """Prompts that hold memory."""
        return len(self._held)

    @property
    def queued_tokens(self) -> int:
        """Tokens that are still to be computed."""
        return sum(self._held.values())

    def begin(self, request: GenerationRequest) -> bool:
        """Lease a prompt's memory if it should run here: at least half of it is known, the rest is
        short, and nobody waits whom it would overtake. False, and nothing taken, if not."""
        known = self._cache.resumable_tokens(request)
        missing = request.prompt_len - known
        allowed = self._limit_tokens - self.queued_tokens
        now_s = self._clock.monotonic_s()
        if missing > min(known, allowed) or self._queue.anyone_before(request.priority, now_s):
            return False
        resumed = self._cache.resume(request, request.total_tokens)
        if resumed is None:
            return False
        if resumed < known:
            # What it was to resume from made room for it.
            self._cache.release(request.request_id)
            return False
        self._held[request.request_id] = missing
        return True

    async def run(self, request: GenerationRequest) -> RanPrompt:
        """Compute what is missing of a prompt that has begun, and token 0; the cache gets it all.
        Raises what kept it from a token; the cache gets nothing then."""
        arrived_s = self._clock.monotonic_s()
        request_id = request.request_id
        known = self._cache.resumed_tokens(request_id)
        row = ExtendRow(
            lease=self._cache.lease(request_id),
            token_ids=request.prompt_ids[known:],
            sample=sample_spec(request.continuation, request.num_output_ids),
        )
        token: SampledToken | None = None
        try:
            began_s, [token] = await self._launch(self._runner.extend(ExtendBatch((row,))))
        except Exception as error:
            log.exception("a local prefill failed")
            raise InvariantViolation(f"a local prefill failed: {error!r}") from error
        finally:
            # Also when nobody waits for it any more: what came of it is not known then.
            if token is None:
                self._cache.spoil(request_id)
        if token is None:
            raise why_no_token(request.rules)
        self._held[request_id] = 0
        self._cache.publish(request_id)
        ended_s = self._clock.monotonic_s()
        self._meter.observe_step("extend", ended_s - began_s, 1, len(row.token_ids))
        return RanPrompt(token, known, began_s - arrived_s, ended_s - began_s)

    def hand_over(self, request_id: str) -> None:
        """Somebody else owns the memory of a computed prompt from now on."""
        del self._held[request_id]

    def abort(self, request_id: str) -> None:
        """Give back what is held for a request, if anything is; its ``run`` is over."""
        if self._held.pop(request_id, None) is not None:
            self._cache.release(request_id)

    async def _launch(self, launch: Launch) -> tuple[float, Sampled]:
        def timed() -> tuple[float, Sampled]:
            return self._clock.monotonic_s(), launch()

        return await self._loop.fill(timed)
