"""From a scheduler's step to a batch for the runner."""

from __future__ import annotations

from collections.abc import Mapping

from stateferry.cache.hybrid_cache import PageCopy
from stateferry.cache.state_cache import StateCache
from stateferry.core.request import Continuation, GenerationRequest
from stateferry.engine.forward_batch import (
    DecodeBatch,
    DecodeInput,
    ExtendBatch,
    ExtendRow,
    SampleSpec,
)
from stateferry.engine.prompt_scores import as_scores
from stateferry.engine.rules import as_rules
from stateferry.scheduler.decode import DecodeStep
from stateferry.scheduler.prefill import ExtendStep


def extend_batch(
    step: ExtendStep,
    requests: Mapping[str, GenerationRequest],
    cache: StateCache,
    copies: tuple[PageCopy, ...],
) -> ExtendBatch:
    """Prompt slices; a prompt's last slice samples the token after it."""
    rows = []
    for part in step.slices:
        request = requests[part.request_id]
        rows.append(
            ExtendRow(
                lease=cache.lease(part.request_id),
                token_ids=request.prompt_ids[part.start : part.start + part.length],
                sample=_next_token(request) if part.is_last else None,
                scores=as_scores(request.scores),
            )
        )
    return ExtendBatch(tuple(rows), copies)


def _next_token(request: GenerationRequest) -> SampleSpec:
    return sample_spec(request.continuation, request.num_output_ids)


def decode_batch(
    step: DecodeStep,
    running: Mapping[str, Continuation],
    cache: StateCache,
    copies: tuple[PageCopy, ...],
) -> DecodeBatch:
    """One row per active sequence."""
    return DecodeBatch(
        tuple(
            DecodeInput(
                lease=cache.lease(row.request_id),
                token_id=row.token_id,
                sample=sample_spec(running[row.request_id], row.index),
            )
            for row in step.rows
        ),
        copies,
    )


def sample_spec(request: Continuation, index: int) -> SampleSpec:
    """How output token ``index`` is chosen; stop ids are out of reach before ``min_tokens``."""
    too_early = index + 1 < request.stop.min_tokens
    return SampleSpec(
        params=request.sampling,
        index=index,
        banned_ids=request.stop.stop_token_ids if too_early else frozenset(),
        rules=as_rules(request.rules),
    )
