from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerFinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_FINISH_REASON_UNSPECIFIED: _ClassVar[WorkerFinishReason]
    WORKER_FINISH_REASON_STOP: _ClassVar[WorkerFinishReason]
    WORKER_FINISH_REASON_LENGTH: _ClassVar[WorkerFinishReason]
WORKER_FINISH_REASON_UNSPECIFIED: WorkerFinishReason
WORKER_FINISH_REASON_STOP: WorkerFinishReason
WORKER_FINISH_REASON_LENGTH: WorkerFinishReason

class PrefillRequest(_message.Message):
    __slots__ = ("ticket", "prompt_ids", "sampling", "stop", "prompt_logprobs", "snapshot_hints")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_HINTS_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: WorkerSampling
    stop: WorkerStop
    prompt_logprobs: int
    snapshot_hints: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ticket: _Optional[bytes] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[WorkerSampling, _Mapping]] = ..., stop: _Optional[_Union[WorkerStop, _Mapping]] = ..., prompt_logprobs: _Optional[int] = ..., snapshot_hints: _Optional[_Iterable[int]] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("first_token", "handed_off", "prompt_tokens")
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HANDED_OFF_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    first_token: FirstToken
    handed_off: HandedOff
    prompt_tokens: PromptTokens
    def __init__(self, first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., handed_off: _Optional[_Union[HandedOff, _Mapping]] = ..., prompt_tokens: _Optional[_Union[PromptTokens, _Mapping]] = ...) -> None: ...

class PromptTokens(_message.Message):
    __slots__ = ("index", "tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    tokens: _containers.RepeatedCompositeFieldContainer[OutputToken]
    def __init__(self, index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[OutputToken, _Mapping]]] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token", "finish", "queue_s", "prefill_s", "prefix_tokens", "resumed_tokens")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token: OutputToken
    finish: WorkerFinish
    queue_s: float
    prefill_s: float
    prefix_tokens: int
    resumed_tokens: int
    def __init__(self, token: _Optional[_Union[OutputToken, _Mapping]] = ..., finish: _Optional[_Union[WorkerFinish, _Mapping]] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., prefix_tokens: _Optional[int] = ..., resumed_tokens: _Optional[int] = ...) -> None: ...

class HandedOff(_message.Message):
    __slots__ = ("size_bytes", "duration_s", "transport")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    duration_s: float
    transport: str
    def __init__(self, size_bytes: _Optional[int] = ..., duration_s: _Optional[float] = ..., transport: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("ticket", "sampling", "stop", "seen_prompt_ids", "prompt_ids", "here_only")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    SEEN_PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    HERE_ONLY_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    sampling: WorkerSampling
    stop: WorkerStop
    seen_prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    here_only: bool
    def __init__(self, ticket: _Optional[bytes] = ..., sampling: _Optional[_Union[WorkerSampling, _Mapping]] = ..., stop: _Optional[_Union[WorkerStop, _Mapping]] = ..., seen_prompt_ids: _Optional[_Iterable[int]] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., here_only: _Optional[bool] = ...) -> None: ...

class DecodeEvent(_message.Message):
    __slots__ = ("reserved", "tokens", "finished", "first_token")
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    reserved: Reserved
    tokens: Tokens
    finished: WorkerFinish
    first_token: FirstToken
    def __init__(self, reserved: _Optional[_Union[Reserved, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., finished: _Optional[_Union[WorkerFinish, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("runs_prompt", "declined")
    RUNS_PROMPT_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    runs_prompt: bool
    declined: bool
    def __init__(self, runs_prompt: _Optional[bool] = ..., declined: _Optional[bool] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("index", "tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    tokens: _containers.RepeatedCompositeFieldContainer[OutputToken]
    def __init__(self, index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[OutputToken, _Mapping]]] = ...) -> None: ...

class OutputToken(_message.Message):
    __slots__ = ("token_id", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class WorkerFinish(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: WorkerFinishReason
    def __init__(self, reason: _Optional[_Union[WorkerFinishReason, str]] = ...) -> None: ...

class WorkerSampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "seed", "logprobs", "min_p", "penalties", "logit_bias", "guide")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PENALTIES_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    GUIDE_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    logprobs: int
    min_p: float
    penalties: WorkerPenalties
    logit_bias: _containers.RepeatedCompositeFieldContainer[WorkerLogitBias]
    guide: WorkerGuide
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ..., min_p: _Optional[float] = ..., penalties: _Optional[_Union[WorkerPenalties, _Mapping]] = ..., logit_bias: _Optional[_Iterable[_Union[WorkerLogitBias, _Mapping]]] = ..., guide: _Optional[_Union[WorkerGuide, _Mapping]] = ...) -> None: ...

class WorkerPenalties(_message.Message):
    __slots__ = ("repetition", "presence", "frequency")
    REPETITION_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_FIELD_NUMBER: _ClassVar[int]
    repetition: float
    presence: float
    frequency: float
    def __init__(self, repetition: _Optional[float] = ..., presence: _Optional[float] = ..., frequency: _Optional[float] = ...) -> None: ...

class WorkerLogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class WorkerGuide(_message.Message):
    __slots__ = ("kind", "source")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    source: str
    def __init__(self, kind: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class WorkerStop(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "stop_token_ids")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...
