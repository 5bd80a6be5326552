"""The public API's requests: bytes -> validated request.

Together with its neighbours sampling_fields and answer_codec the only place where public pb2 fields
are read; the HTTP door writes requests. Requests arrive as raw bytes, because a parser
that runs inside gRPC answers INTERNAL without naming a field. Checks go from cheap to dear, and all
of them come before tokenising or allocating anything; none of their messages repeats the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError, Message

from stateferry.api.sampling_fields import num_logprobs, sampling_fields
from stateferry.api.wire_fault import largest_field, locate_fault, locate_unknown
from stateferry.core.errors import InvalidRequest
from stateferry.core.ids import is_request_id, new_request_id
from stateferry.core.request import (
    MAX_CACHE_SALT_BYTES,
    MAX_PRIORITY,
    MAX_SNAPSHOT_HINTS,
    MIN_PRIORITY,
    GenerationRequest,
    cache_salt_of,
)
from stateferry.core.sampling import (
    MAX_CHOICES,
    SamplingParams,
    StopConditions,
)
from stateferry.v1 import inference_pb2 as pb

DEFAULT_MAX_TOKENS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
# Most bytes that a token id takes on the wire, its tag included.
_ID_BYTES = 6
# Room in a message for everything that is not the prompt.
_OTHER_FIELDS_BYTES = 64 << 10


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
class AnswerOptions:
    """What the client wants to see: ``num_choices`` continuations of one prompt, that prompt
    (``echo``), perhaps with log-probabilities (None: without), and special or stopping tokens'
    texts."""

    num_choices: int = 1
    echo: bool = False
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class ReuseOptions:
    """With whom cached state is shared, where it is wanted, and by which conversation."""

    cache_salt: str = ""
    snapshot_hints: tuple[int, ...] = ()
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """Passed every check that needs no tokeniser. ``prompt`` is text or token ids."""

    request_id: str
    tenant: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    stop: ClientStop
    answer: AnswerOptions
    reuse: ReuseOptions = ReuseOptions()
    priority: int = 0


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
    if message.session_id and not is_request_id(message.session_id):
        raise InvalidRequest("session_id", "is not 1 to 128 of [A-Za-z0-9._:-]")
    if not MIN_PRIORITY <= message.priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", f"is not in [{MIN_PRIORITY}, {MAX_PRIORITY}]")
    if message.model and message.model != limits.model:
        raise InvalidRequest("model", f"is not served here; {limits.model} is")
    stop = _stop(message.stop, limits)
    sampling = sampling_fields(message, limits.vocab_size)
    if sampling.guide is not None:
        _check_guide(message, limits)
    answer = AnswerOptions(
        num_choices=_num_choices(message, sampling),
        echo=message.echo,
        prompt_logprobs=_prompt_logprobs(message),
        skip_special_tokens=(
            message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        ),
        include_stop=message.stop.include_stop,
    )
    reuse = _reuse(message)
    prompt = _prompt(message, limits)
    return ClientRequest(
        request_id, message.tenant, prompt, sampling, stop, answer, reuse, message.priority
    )


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
    for index, hint in enumerate(client.reuse.snapshot_hints):
        if not 1 <= hint <= len(prompt_ids):
            problem = f"is not from 1 to the prompt's {len(prompt_ids)} tokens"
            raise InvalidRequest(f"snapshot_hints[{index}]", problem)
    return GenerationRequest(
        client.request_id,
        prompt_ids,
        client.sampling,
        StopConditions(max_tokens, client.stop.min_tokens, client.stop.token_ids),
        client.answer.prompt_logprobs,
        cache_salt=cache_salt_of(client.tenant, client.reuse.cache_salt),
        snapshot_hints=client.reuse.snapshot_hints,
        priority=client.priority,
        session=client.reuse.session_id,
    )


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


def _num_choices(message: pb.GenerateRequest, sampling: SamplingParams) -> int:
    count = message.n if message.HasField("n") else 1
    if not 1 <= count <= MAX_CHOICES:
        raise InvalidRequest("n", f"is not in [1, {MAX_CHOICES}]")
    if count > 1 and not sampling.temperature:
        raise InvalidRequest("n", "choices of a greedy request would all be the same")
    return count


def _prompt_logprobs(message: pb.GenerateRequest) -> int | None:
    if not message.HasField("prompt_logprobs"):
        return None
    if not message.echo:
        raise InvalidRequest("prompt_logprobs", "needs echo")
    return num_logprobs("prompt_logprobs", message.prompt_logprobs)


def _reuse(message: pb.GenerateRequest) -> ReuseOptions:
    if len(message.cache_salt.encode()) > MAX_CACHE_SALT_BYTES:
        raise InvalidRequest("cache_salt", f"has more than {MAX_CACHE_SALT_BYTES} bytes")
    if len(message.snapshot_hints) > MAX_SNAPSHOT_HINTS:
        raise InvalidRequest("snapshot_hints", f"has more than {MAX_SNAPSHOT_HINTS} positions")
    return ReuseOptions(message.cache_salt, tuple(message.snapshot_hints), message.session_id)


def _check_guide(message: pb.GenerateRequest, limits: RequestLimits) -> None:
    """A guide must always leave a token to choose."""
    if message.stop.min_tokens:
        raise InvalidRequest("stop.min_tokens", "cannot be combined with a guide")
    if message.stop.ignore_eos:
        raise InvalidRequest("stop.ignore_eos", "cannot be combined with a guide")
    if not limits.eos_token_ids:
        raise InvalidRequest("guide", "this model has no end-of-sequence token to end it with")


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
