"""The public API's messages: bytes -> validated request, results -> messages.

The only place where public pb2 fields are touched. Requests arrive as raw bytes, because a parser
that runs inside gRPC answers INTERNAL without naming a field. Checks go from cheap to dear, and all
of them come before tokenising or allocating anything; none of their messages repeats the prompt.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError, Message

from stateferry.api.wire_fault import largest_field, locate_fault, locate_unknown
from stateferry.core.errors import InvalidRequest
from stateferry.core.ids import is_request_id, new_request_id
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import (
    MAX_LOGPROBS,
    FinishReason,
    SampledToken,
    SamplingParams,
    StopConditions,
)
from stateferry.v1 import inference_pb2 as pb

DEFAULT_MAX_TOKENS = 128
MAX_TEMPERATURE = 100.0
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
# Most bytes that a token id takes on the wire, its tag included.
_ID_BYTES = 6
# Room in a message for everything that is not the prompt.
_OTHER_FIELDS_BYTES = 64 << 10

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the served model and this router accept. ``max_context_tokens`` counts prompt and
    generated tokens together."""

    model: str
    vocab_size: int
    max_context_tokens: int
    max_prompt_bytes: int
    eos_token_ids: frozenset[int]

    @property
    def max_message_bytes(self) -> int:
        """A longer message cannot be valid, whatever it holds."""
        ids_bytes = _ID_BYTES * self.max_context_tokens
        return self.max_prompt_bytes + ids_bytes + _OTHER_FIELDS_BYTES


@dataclass(frozen=True, slots=True)
class ClientStop:
    """When the client wants to end. ``max_tokens`` None: the default, as far as context goes."""

    max_tokens: int | None
    min_tokens: int
    strings: tuple[str, ...]
    token_ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """Passed every check that needs no tokeniser. ``prompt`` is text or token ids."""

    request_id: str
    tenant: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    stop: ClientStop


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of a stream; ``index`` is that of the first. ``text`` may trail them."""

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
    """Seconds; the proto says from where to where."""

    queue_s: float
    prefill_queue_s: float
    prefill_s: float
    ttft_s: float
    handoff_s: float
    handoff_bytes: int
    transport: str
    decode_s: float
    total_s: float


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


@dataclass(frozen=True, slots=True)
class ModelListing:
    """One served model and the live workers that serve it."""

    name: str
    max_context_tokens: int
    vocab_size: int
    grid_tokens: int
    prefill_workers: int
    decode_workers: int


def parse_generate(payload: bytes, limits: RequestLimits) -> ClientRequest:
    """Read and check a GenerateRequest. Raises InvalidRequest naming the field; nothing else."""
    if len(payload) > limits.max_message_bytes:
        field, size_bytes = largest_field(payload, pb.GenerateRequest.DESCRIPTOR)
        raise InvalidRequest(field, f"{size_bytes} bytes are more than any request may have")
    message = _parse(payload)
    _check_known_fields(message, payload)
    request_id = message.request_id or new_request_id()
    if not is_request_id(request_id):
        raise InvalidRequest("request_id", "is not 1 to 128 of [A-Za-z0-9._:-]")
    if message.tenant and not is_request_id(message.tenant):
        raise InvalidRequest("tenant", "is not 1 to 128 of [A-Za-z0-9._:-]")
    if message.model and message.model != limits.model:
        raise InvalidRequest("model", f"is not served here; {limits.model} is")
    stop = _stop(message.stop, limits)
    sampling = _sampling(message, limits)
    return ClientRequest(request_id, message.tenant, _prompt(message, limits), sampling, stop)


def complete_request(
    client: ClientRequest, prompt_ids: tuple[int, ...], limits: RequestLimits
) -> GenerationRequest:
    """Add what only the tokenised prompt can tell. Raises InvalidRequest naming the field."""
    prompt_field = "text" if isinstance(client.prompt, str) else "token_ids"
    if not prompt_ids:
        raise InvalidRequest(prompt_field, "holds no tokens")
    room = limits.max_context_tokens - len(prompt_ids)
    if room < 1:
        raise InvalidRequest(
            prompt_field,
            f"{len(prompt_ids)} tokens leave no room in a context of {limits.max_context_tokens}",
        )
    wanted = client.stop.max_tokens
    if wanted is not None and wanted > room:
        raise InvalidRequest("stop.max_tokens", f"the context holds {room} more after the prompt")
    max_tokens = min(DEFAULT_MAX_TOKENS, room) if wanted is None else wanted
    if client.stop.min_tokens > max_tokens:
        raise InvalidRequest("stop.min_tokens", f"is more than max_tokens, {max_tokens}")
    stop = StopConditions(max_tokens, client.stop.min_tokens, client.stop.token_ids)
    return GenerationRequest(client.request_id, prompt_ids, client.sampling, stop)


def delta_to_bytes(delta: Delta) -> bytes:
    """A GenerateResponse with some new tokens."""
    message = pb.Delta(
        index=delta.index, text=delta.text, token_ids=[t.token_id for t in delta.tokens]
    )
    for token in delta.tokens:
        if token.logprob is not None:
            top = [pb.CandidateLogprob(token_id=t.token_id, logprob=t.logprob) for t in token.top]
            message.logprobs.add(logprob=token.logprob, top=top)
    return pb.GenerateResponse(delta=message).SerializeToString()


def completion_to_bytes(completion: Completion) -> bytes:
    """The last GenerateResponse of a stream."""
    usage, timings = completion.usage, completion.timings
    message = pb.Completion(
        request_id=completion.request_id,
        finish_reason=_FINISH_REASONS[completion.finish_reason],
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            prefix_tokens=usage.prefix_tokens,
            resumed_tokens=usage.resumed_tokens,
        ),
        timings=pb.Timings(
            queue_s=timings.queue_s,
            prefill_queue_s=timings.prefill_queue_s,
            prefill_s=timings.prefill_s,
            ttft_s=timings.ttft_s,
            handoff_s=timings.handoff_s,
            handoff_bytes=timings.handoff_bytes,
            transport=timings.transport,
            decode_s=timings.decode_s,
            total_s=timings.total_s,
        ),
        seed=completion.seed,
        matched_stop=completion.matched_stop,
        prefill_worker=completion.prefill_worker,
        decode_worker=completion.decode_worker,
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


def _parse(payload: bytes) -> pb.GenerateRequest:
    try:
        return pb.GenerateRequest.FromString(payload)
    except DecodeError:
        fault = locate_fault(payload, pb.GenerateRequest.DESCRIPTOR)
        raise InvalidRequest(fault.field, fault.problem) from None


def _check_known_fields(message: Message, payload: bytes) -> None:
    """An unknown field is something the client wants and we would silently not do."""
    size_bytes = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != size_bytes:
        # Only now the slow walk, which ends at the first one.
        fault = locate_unknown(payload, message.DESCRIPTOR)
        raise InvalidRequest(fault.field, fault.problem)


def _prompt(message: pb.GenerateRequest, limits: RequestLimits) -> str | tuple[int, ...]:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt", "set text or token_ids")
    if kind == "text":
        size_bytes = len(message.text.encode())
        if size_bytes == 0:
            raise InvalidRequest("text", "must not be empty")
        if size_bytes > limits.max_prompt_bytes:
            raise InvalidRequest(
                "text", f"{size_bytes} bytes are more than {limits.max_prompt_bytes}"
            )
        return message.text
    ids = message.token_ids.ids
    if not ids:
        raise InvalidRequest("token_ids", "must not be empty")
    if len(ids) >= limits.max_context_tokens:
        raise InvalidRequest(
            "token_ids",
            f"{len(ids)} tokens leave no room in a context of {limits.max_context_tokens}",
        )
    _check_ids("token_ids.ids", ids, limits.vocab_size)
    return tuple(ids)


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    if max(ids, default=0) >= vocab_size:
        index = next(i for i, token_id in enumerate(ids) if token_id >= vocab_size)
        raise InvalidRequest(f"{field}[{index}]", f"is not below the vocabulary's {vocab_size}")


def _sampling(message: pb.GenerateRequest, limits: RequestLimits) -> SamplingParams:
    wanted = message.sampling
    temperature = wanted.temperature if wanted.HasField("temperature") else 1.0
    # The comparison is written so that NaN fails it.
    if not 0.0 <= temperature <= MAX_TEMPERATURE:
        raise InvalidRequest("sampling.temperature", f"is not in [0, {MAX_TEMPERATURE:g}]")
    top_p = wanted.top_p if wanted.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidRequest("sampling.top_p", "is not in (0, 1]")
    if wanted.top_k > limits.vocab_size:
        raise InvalidRequest("sampling.top_k", f"is above the vocabulary's {limits.vocab_size}")
    logprobs = message.logprobs if message.HasField("logprobs") else None
    if logprobs is not None and logprobs > MAX_LOGPROBS:
        raise InvalidRequest("logprobs", f"is above {MAX_LOGPROBS}")
    return SamplingParams(
        temperature=math.fabs(temperature),  # -0.0 is greedy like 0.0.
        top_k=wanted.top_k,
        top_p=top_p,
        seed=wanted.seed if wanted.HasField("seed") else secrets.randbits(64),
        logprobs=logprobs,
    )


def _stop(wanted: pb.StopConditions, limits: RequestLimits) -> ClientStop:
    max_tokens = wanted.max_tokens if wanted.HasField("max_tokens") else None
    if max_tokens == 0:
        raise InvalidRequest("stop.max_tokens", "must be at least 1")
    if max_tokens is not None and max_tokens >= limits.max_context_tokens:
        raise InvalidRequest(
            "stop.max_tokens", f"a context of {limits.max_context_tokens} cannot hold so many"
        )
    most = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    if wanted.min_tokens > most:
        raise InvalidRequest("stop.min_tokens", f"is more than max_tokens, {most}")
    if len(wanted.token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest("stop.token_ids", f"has more than {MAX_STOP_TOKEN_IDS} ids")
    _check_ids("stop.token_ids", wanted.token_ids, limits.vocab_size)
    ids = frozenset(wanted.token_ids)
    return ClientStop(
        max_tokens=max_tokens,
        min_tokens=wanted.min_tokens,
        strings=_stop_strings(wanted.strings),
        token_ids=ids if wanted.ignore_eos else ids | limits.eos_token_ids,
    )


def _stop_strings(strings: Sequence[str]) -> tuple[str, ...]:
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest("stop.strings", f"has more than {MAX_STOP_STRINGS} strings")
    for index, string in enumerate(strings):
        if not string:
            raise InvalidRequest(f"stop.strings[{index}]", "must not be empty")
        if len(string.encode()) > MAX_STOP_STRING_BYTES:
            raise InvalidRequest(
                f"stop.strings[{index}]", f"has more than {MAX_STOP_STRING_BYTES} bytes"
            )
    return tuple(strings)
