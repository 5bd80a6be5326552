"""A worker's own check of what the router sends: the router has checked clients, nobody the
router."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from stateferry.core.errors import InvalidRequest
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import StopConditions


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """``max_context_tokens`` counts prompt and generated tokens of one request together."""

    vocab_size: int
    max_context_tokens: int


def check_request(request: GenerationRequest, limits: ModelLimits) -> None:
    """Raises InvalidRequest naming the field that this worker's model cannot serve."""
    if not request.prompt_ids:
        raise InvalidRequest("prompt_ids", "must not be empty")
    check_ids("prompt_ids", request.prompt_ids, limits)
    check_stop_ids(request.stop, limits)
    if not all(1 <= hint <= request.prompt_len for hint in request.snapshot_hints):
        raise InvalidRequest("snapshot_hints", "a position is outside the prompt")
    if not 0 <= request.num_output_ids < min(request.prompt_len, request.stop.max_tokens):
        raise InvalidRequest("num_output_ids", f"{request.num_output_ids} is out of range")
    if request.total_tokens > limits.max_context_tokens:
        raise InvalidRequest("stop.max_tokens", f"exceeds {limits.max_context_tokens} in all")


def check_stop_ids(stop: StopConditions, limits: ModelLimits) -> None:
    """Raises InvalidRequest when a stop id is outside the vocabulary."""
    check_ids("stop.stop_token_ids", stop.stop_token_ids, limits)


def check_ids(field: str, ids: Collection[int], limits: ModelLimits) -> None:
    """Raises InvalidRequest naming ``field`` when an id is outside the vocabulary."""
    if ids and max(ids) >= limits.vocab_size:
        raise InvalidRequest(field, f"an id is not below {limits.vocab_size}")
