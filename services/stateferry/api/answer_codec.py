"""The public API's answers: results -> messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stateferry.core.sampling import FinishReason, SampledToken
from stateferry.v1 import inference_pb2 as pb

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of one choice; ``index`` is that of the first. ``text`` may trail them."""

    index: int
    text: str
    tokens: tuple[SampledToken, ...]
    choice: int = 0


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Tokens of the prompt; ``index`` is that of the first. ``text`` is all of the prompt's, in
    the first part."""

    index: int
    text: str
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens used and saved."""

    prompt_tokens: int
    completion_tokens: int
    prefix_tokens: int
    resumed_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in seconds; the proto says from where to where. Fields are the
    message's."""

    queue_s: float
    prefill_queue_s: float
    prefill_s: float
    ttft_s: float
    handoff_s: float
    handoff_bytes: int
    transport: str
    decode_s: float
    total_s: float

    @classmethod
    def of(cls, message: pb.Timings) -> Timings:
        """As a client reads them."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: getattr(message, name) for name in names})


@dataclass(frozen=True, slots=True)
class Completion:
    """How a stream ended that went well."""

    request_id: str
    finish_reason: FinishReason
    matched_stop: str
    seed: int
    usage: Usage
    timings: Timings
    prefill_worker: str
    decode_worker: str
    choice: int = 0
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class ModelListing:
    """One served model and the live workers that serve it."""

    name: str
    max_context_tokens: int
    vocab_size: int
    grid_tokens: int
    prefill_workers: int
    decode_workers: int


def delta_to_bytes(delta: Delta) -> bytes:
    """A GenerateResponse with some new tokens."""
    message = pb.Delta(
        index=delta.index,
        text=delta.text,
        token_ids=[t.token_id for t in delta.tokens],
        logprobs=_logprobs(delta.tokens),
        choice=delta.choice,
    )
    return pb.GenerateResponse(delta=message).SerializeToString()


def prompt_part_to_bytes(part: PromptPart) -> bytes:
    """A GenerateResponse with some of the prompt's tokens."""
    message = pb.PromptEcho(
        index=part.index,
        text=part.text,
        token_ids=[t.token_id for t in part.tokens],
        logprobs=_logprobs(part.tokens),
    )
    return pb.GenerateResponse(prompt=message).SerializeToString()


def completion_to_bytes(completion: Completion) -> bytes:
    """The last GenerateResponse of a stream."""
    usage = completion.usage
    message = pb.Completion(
        request_id=completion.request_id,
        finish_reason=_FINISH_REASONS[completion.finish_reason],
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            prefix_tokens=usage.prefix_tokens,
            resumed_tokens=usage.resumed_tokens,
        ),
        timings=pb.Timings(**dataclasses.asdict(completion.timings)),
        seed=completion.seed,
        matched_stop=completion.matched_stop,
        prefill_worker=completion.prefill_worker,
        decode_worker=completion.decode_worker,
        choice=completion.choice,
        attempts=completion.attempts,
    )
    return pb.GenerateResponse(completion=message).SerializeToString()


def models_to_bytes(models: Iterable[ModelListing]) -> bytes:
    """A ListModelsResponse."""
    response = pb.ListModelsResponse()
    for model in models:
        response.models.add(
            name=model.name,
            max_context_tokens=model.max_context_tokens,
            vocab_size=model.vocab_size,
            grid_tokens=model.grid_tokens,
            prefill_workers=model.prefill_workers,
            decode_workers=model.decode_workers,
        )
    return response.SerializeToString()


def _logprobs(tokens: Sequence[SampledToken]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            logprob=token.logprob,
            top=[pb.CandidateLogprob(token_id=t.token_id, logprob=t.logprob) for t in token.top],
        )
        for token in tokens
        if token.logprob is not None
    ]
