"""From a scheduler's step to a launch: the copies that are due, then the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import InvariantViolation
from stateferry.core.request import Continuation, GenerationRequest
from stateferry.engine.forward_batch import (
    DecodeBatch,
    DecodeInput,
    ExtendBatch,
    ExtendRow,
    PendingToken,
    SampleSpec,
)
from stateferry.engine.launch import Launch
from stateferry.engine.prompt_scores import as_scores
from stateferry.engine.rules import as_rules
from stateferry.engine.runner import ModelRunner
from stateferry.scheduler.decode import DecodeRow, DecodeStep
from stateferry.scheduler.prefill import ExtendStep

T = TypeVar("T")


class Launcher:
    """Plans the launches of one engine. They are to run in the order in which they were planned,
    one at a time; whatever else touches the pools goes through ``in_order``."""

    def __init__(self, runner: ModelRunner, cache: StateCache) -> None:
        self._runner = runner
        self._cache = cache
        # Where tokens are to come from that nobody knows yet.
        self._pending: dict[str, PendingToken] = {}

    def extend(self, step: ExtendStep, requests: Mapping[str, GenerationRequest]) -> Launch:
        """Prompt slices; a prompt's last slice samples the token after it."""
        rows = []
        for part in step.slices:
            request = requests[part.request_id]
            rows.append(
                ExtendRow(
                    lease=self._cache.lease(part.request_id),
                    token_ids=request.prompt_ids[part.start : part.start + part.length],
                    sample=_next_token(request) if part.is_last else None,
                    scores=as_scores(request.scores),
                )
            )
        return self._runner.extend(ExtendBatch(tuple(rows))).behind(self._copies())

    def decode(self, step: DecodeStep, running: Mapping[str, Continuation]) -> Launch:
        """One row per sequence."""
        rows = tuple(
            DecodeInput(
                lease=self._cache.lease(row.request_id),
                token_id=self._consumed(row),
                sample=sample_spec(running[row.request_id], row.index),
            )
            for row in step.rows
        )
        launch = self._runner.decode(DecodeBatch(rows))
        # Of this step alone: the next one is the only one that can be waiting for it.
        self._pending = {
            row.request_id: planned.sampled for row, planned in zip(step.rows, rows, strict=True)
        }
        return launch.behind(self._copies())

    def in_order(self, work: Callable[[], T]) -> Callable[[], T]:
        """``work``, behind the copies that are due. Of memory that is free now, it may write to
        all."""
        copy = self._copies()

        def done() -> T:
            copy()
            return work()

        return done

    def _copies(self) -> Callable[[], None]:
        return partial(self._runner.copy, self._cache.take_copies())

    def _consumed(self, row: DecodeRow) -> int | PendingToken:
        if row.token_id is not None:
            return row.token_id
        try:
            return self._pending[row.request_id]
        except KeyError:
            raise InvariantViolation(f"{row.request_id} had no row in the step before") from None


def _next_token(request: GenerationRequest) -> SampleSpec:
    return sample_spec(request.continuation, request.num_output_ids)


def sample_spec(request: Continuation, index: int) -> SampleSpec:
    """How output token ``index`` is chosen; stop ids are out of reach before ``min_tokens``."""
    too_early = index + 1 < request.stop.min_tokens
    return SampleSpec(
        params=request.sampling,
        index=index,
        banned_ids=request.stop.stop_token_ids if too_early else frozenset(),
        rules=as_rules(request.rules),
    )
