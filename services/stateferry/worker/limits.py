"""A worker's own check of what the router sends: the router has checked clients, nobody the router."""

from __future__ import annotations

from stateferry.core.errors import InvalidRequest
from stateferry.core.request import GenerationRequest
from stateferry.core.worker import WorkerDescription


def check_request(request: GenerationRequest, worker: WorkerDescription) -> None:
    """Raises InvalidRequest naming the field that this worker's model cannot serve."""
    if not request.prompt_ids:
        raise InvalidRequest("prompt_ids", "must not be empty")
    if max(request.prompt_ids) >= worker.vocab_size:
        raise InvalidRequest("prompt_ids", f"an id is not below {worker.vocab_size}")
    check_stop_ids(request, worker)
    if request.prompt_len + request.stop.max_tokens > worker.max_context_tokens:
        raise InvalidRequest("stop.max_tokens", f"exceeds {worker.max_context_tokens} in all")


def check_stop_ids(request: GenerationRequest, worker: WorkerDescription) -> None:
    """Raises InvalidRequest when a stop id is outside the vocabulary."""
    if request.stop.stop_token_ids and max(request.stop.stop_token_ids) >= worker.vocab_size:
        raise InvalidRequest("stop.stop_token_ids", f"an id is not below {worker.vocab_size}")
