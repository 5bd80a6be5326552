"""From a scheduler's step to a launch: the copies that are due, then the forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import InvariantViolation
from stateferry.core.request import Continuation, GenerationRequest
from stateferry.drafting.speculator import Speculating, Speculator
from stateferry.drafting.tree import DraftTree
from stateferry.engine.forward_batch import (
    DecodeBatch,
    DecodeInput,
    ExtendBatch,
    ExtendRow,
    PendingToken,
    SampleSpec,
)
from stateferry.engine.launch import Launch, Over, Planned, Running, Sampled
from stateferry.engine.prompt_scores import as_scores
from stateferry.engine.rules import as_rules
from stateferry.engine.runner import ModelRunner
from stateferry.engine.verify_batch import Run, VerifyBatch, VerifyInput
from stateferry.scheduler.decode_step import DecodeRow, DecodeStep
from stateferry.scheduler.extend import ExtendStep

T = TypeVar("T")


class Launcher:
    """Plans the launches of one engine. They are to run in the order in which they were planned,
    one at a time; whatever else touches the pools goes through ``in_order``."""

    def __init__(
        self, runner: ModelRunner, cache: StateCache, speculator: Speculator | None = None
    ) -> None:
        """speculator: drafts for decode steps, which are then planned one at a time."""
        self._runner = runner
        self._cache = cache
        self._speculator = speculator
        # What the step in flight verifies, where it does.
        self._verifying: VerifyBatch | None = None
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

    def decode(self, step: DecodeStep, running: Mapping[str, Continuation]) -> Planned[list[Run]]:
        """One row per sequence, or its draft as well. ``landed`` gets what comes of it."""
        drafts = None if self._speculator is None else self._drafts(self._speculator, step, running)
        if drafts is None:
            return self._rows(step, running)
        return self._verification(step, running, drafts)

    def begin(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Decode steps of a sequence will follow, which has consumed these tokens."""
        if self._speculator is not None:
            self._speculator.begin(request_id, token_ids)

    def end(self, request_id: str) -> None:
        """None will follow any more. Of sequences that never began as well."""
        if self._speculator is not None:
            self._speculator.end(request_id)

    def landed(self, step: DecodeStep, runs: Sequence[Run]) -> None:
        """A decode step is over; before anything else is done about it. Moves leases."""
        batch, self._verifying = self._verifying, None
        if batch is not None:
            batch.advance(runs, self._cache.pools.grid)
        if self._speculator is not None:
            for row, run in zip(step.rows, runs, strict=True):
                self._speculator.observe(row.request_id, run.token_ids)

    def _rows(self, step: DecodeStep, running: Mapping[str, Continuation]) -> Planned[list[Run]]:
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
        timed = self._timed(launch.then(one_each), len(rows), len(rows), is_plain=True)
        return timed.behind(self._copies())

    def _verification(
        self, step: DecodeStep, running: Mapping[str, Continuation], drafts: Sequence[DraftTree]
    ) -> Planned[list[Run]]:
        rows = tuple(
            VerifyInput(
                lease=self._cache.lease(row.request_id),
                token_id=_known(row),
                index=row.index,
                draft=draft,
                spec_of=partial(sample_spec, running[row.request_id]),
                stop=running[row.request_id].stop,
            )
            for row, draft in zip(step.rows, drafts, strict=True)
        )
        batch = self._verifying = VerifyBatch(rows)
        launch = self._runner.verify(batch)
        num_rows = sum(row.num_rows for row in rows)
        timed = self._timed(launch, len(rows), num_rows, is_plain=False)
        return timed.behind(self._copies())

    def _drafts(
        self, speculator: Speculator, step: DecodeStep, running: Mapping[str, Continuation]
    ) -> list[DraftTree] | None:
        rows = []
        for row in step.rows:
            left = running[row.request_id].stop.max_tokens - row.index - 1
            rows.append(Speculating(row.request_id, _known(row), left))
        return speculator.drafts(rows)

    def _timed(
        self, launch: Planned[list[Run]], sequences: int, rows: int, *, is_plain: bool
    ) -> Planned[list[Run]]:
        speculator = self._speculator
        if speculator is None:
            return launch

        def start() -> Running[list[Run]]:
            began_s = time.perf_counter()
            running = launch.start()

            def noted(runs: list[Run]) -> list[Run]:
                took_s = time.perf_counter() - began_s
                if is_plain:
                    speculator.plain_ran(sequences, took_s)
                else:
                    speculator.verify_ran(sequences, rows, took_s)
                return runs

            # Only one step is in flight where drafts are made: it is waited for at once.
            return Over(noted(running.sampled()))

        return Planned(start)

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


def one_each(sampled: Sampled) -> list[Run]:
    """What a step without drafts gave."""
    return [Run() if token is None else Run((token,), (0,)) for token in sampled]


def _known(row: DecodeRow) -> int:
    if row.token_id is None:
        raise InvariantViolation(f"{row.request_id} steps ahead of its tokens, and has drafts")
    return row.token_id


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
