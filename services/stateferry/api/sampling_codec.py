"""How to choose tokens, between router and workers."""

from __future__ import annotations

import math

from stateferry.core.errors import InvalidRequest
from stateferry.core.guide import MAX_GUIDE_BYTES, Guide, GuideKind
from stateferry.core.sampling import MAX_LOGPROBS, NO_PENALTIES, Penalties, SamplingParams
from stateferry.v1 import worker_pb2


def sampling_to_pb(sampling: SamplingParams) -> worker_pb2.WorkerSampling:
    message = worker_pb2.WorkerSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        logprobs=sampling.logprobs,
        min_p=sampling.min_p,
        logit_bias=[
            worker_pb2.WorkerLogitBias(token_id=token_id, bias=bias)
            for token_id, bias in sampling.logit_bias
        ],
    )
    if sampling.penalties != NO_PENALTIES:
        message.penalties.repetition = sampling.penalties.repetition
        message.penalties.presence = sampling.penalties.presence
        message.penalties.frequency = sampling.penalties.frequency
    if sampling.guide is not None:
        message.guide.kind = sampling.guide.kind.value
        message.guide.source = sampling.guide.source
    return message


def sampling_from_pb(message: worker_pb2.WorkerSampling, vocab_size: int) -> SamplingParams:
    """Raises InvalidRequest for values that no router of ours sends."""
    _check_range("temperature", message.temperature, 0.0, math.inf)
    _check_range("top_p", message.top_p, 0.0, 1.0)
    _check_range("min_p", message.min_p, 0.0, 1.0)
    if message.top_p == 0.0:
        raise InvalidRequest("sampling.top_p", "is 0")
    if message.logprobs > MAX_LOGPROBS:
        raise InvalidRequest("sampling.logprobs", f"{message.logprobs} is above {MAX_LOGPROBS}")
    for entry in message.logit_bias:
        _check_range("logit_bias", entry.bias, -math.inf, math.inf)
        if entry.token_id >= vocab_size:
            raise InvalidRequest("sampling.logit_bias", f"an id is not below {vocab_size}")
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        min_p=message.min_p,
        penalties=_penalties(message.penalties) if message.HasField("penalties") else NO_PENALTIES,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        guide=_guide(message.guide) if message.HasField("guide") else None,
    )


def prompt_logprobs_from_pb(request: worker_pb2.PrefillRequest) -> int | None:
    """Raises InvalidRequest as above."""
    if request.prompt_logprobs > MAX_LOGPROBS:
        raise InvalidRequest("prompt_logprobs", f"is above {MAX_LOGPROBS}")
    return request.prompt_logprobs if request.HasField("prompt_logprobs") else None


def _penalties(message: worker_pb2.WorkerPenalties) -> Penalties:
    _check_range("penalties.repetition", message.repetition, 0.0, math.inf)
    if message.repetition == 0.0:
        raise InvalidRequest("sampling.penalties.repetition", "is 0")
    _check_range("penalties.presence", message.presence, -math.inf, math.inf)
    _check_range("penalties.frequency", message.frequency, -math.inf, math.inf)
    return Penalties(message.repetition, message.presence, message.frequency)


def _guide(message: worker_pb2.WorkerGuide) -> Guide:
    try:
        kind = GuideKind(message.kind)
    except ValueError:
        raise InvalidRequest("sampling.guide.kind", f"unknown kind {message.kind!r}") from None
    if len(message.source.encode()) > MAX_GUIDE_BYTES:
        raise InvalidRequest("sampling.guide.source", f"has more than {MAX_GUIDE_BYTES} bytes")
    return Guide(kind, message.source)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    # Written so that NaN fails it.
    if not (math.isfinite(value) and least <= value <= most):
        raise InvalidRequest(f"sampling.{name}", f"{value} is out of range")
