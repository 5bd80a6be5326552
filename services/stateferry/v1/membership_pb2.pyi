from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_ROLE_UNSPECIFIED: _ClassVar[WorkerRole]
    WORKER_ROLE_PREFILL: _ClassVar[WorkerRole]
    WORKER_ROLE_DECODE: _ClassVar[WorkerRole]
WORKER_ROLE_UNSPECIFIED: WorkerRole
WORKER_ROLE_PREFILL: WorkerRole
WORKER_ROLE_DECODE: WorkerRole

class WorkerReport(_message.Message):
    __slots__ = ("description", "load")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    description: SignedDescription
    load: WorkerLoad
    def __init__(self, description: _Optional[_Union[SignedDescription, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ...) -> None: ...

class SignedDescription(_message.Message):
    __slots__ = ("description", "mac")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    description: bytes
    mac: bytes
    def __init__(self, description: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("heartbeat_interval_s",)
    HEARTBEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    heartbeat_interval_s: float
    def __init__(self, heartbeat_interval_s: _Optional[float] = ...) -> None: ...

class WorkerDescription(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "grpc_address", "transfer_address", "metrics_address", "fingerprint", "capacity_requests", "max_context_tokens", "kernels", "vocab_size", "pools", "preempts")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    role: WorkerRole
    grpc_address: str
    transfer_address: str
    metrics_address: str
    fingerprint: WorkerFingerprint
    capacity_requests: int
    max_context_tokens: int
    kernels: str
    vocab_size: int
    pools: PoolSizes
    preempts: bool
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., role: _Optional[_Union[WorkerRole, str]] = ..., grpc_address: _Optional[str] = ..., transfer_address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., fingerprint: _Optional[_Union[WorkerFingerprint, _Mapping]] = ..., capacity_requests: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., kernels: _Optional[str] = ..., vocab_size: _Optional[int] = ..., pools: _Optional[_Union[PoolSizes, _Mapping]] = ..., preempts: _Optional[bool] = ...) -> None: ...

class PoolSizes(_message.Message):
    __slots__ = ("sequences", "state_slots", "tail_pages", "kv_pages", "kv_page_tokens", "state_slot_bytes", "tail_page_bytes", "kv_page_bytes")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    STATE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    TAIL_PAGES_FIELD_NUMBER: _ClassVar[int]
    KV_PAGES_FIELD_NUMBER: _ClassVar[int]
    KV_PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATE_SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TAIL_PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    sequences: int
    state_slots: int
    tail_pages: int
    kv_pages: int
    kv_page_tokens: int
    state_slot_bytes: int
    tail_page_bytes: int
    kv_page_bytes: int
    def __init__(self, sequences: _Optional[int] = ..., state_slots: _Optional[int] = ..., tail_pages: _Optional[int] = ..., kv_pages: _Optional[int] = ..., kv_page_tokens: _Optional[int] = ..., state_slot_bytes: _Optional[int] = ..., tail_page_bytes: _Optional[int] = ..., kv_page_bytes: _Optional[int] = ...) -> None: ...

class WorkerFingerprint(_message.Message):
    __slots__ = ("protocol", "model", "weights", "layout", "grid_tokens", "dtype", "numerics")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    GRID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model: str
    weights: str
    layout: str
    grid_tokens: int
    dtype: str
    numerics: str
    def __init__(self, protocol: _Optional[int] = ..., model: _Optional[str] = ..., weights: _Optional[str] = ..., layout: _Optional[str] = ..., grid_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., numerics: _Optional[str] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("sequence", "active_requests", "queued_requests", "queued_tokens", "state_slots_free", "state_slots_total", "tail_pages_free", "tail_pages_total", "kv_pages_free", "kv_pages_total")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATE_SLOTS_FREE_FIELD_NUMBER: _ClassVar[int]
    STATE_SLOTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TAIL_PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    TAIL_PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    active_requests: int
    queued_requests: int
    queued_tokens: int
    state_slots_free: int
    state_slots_total: int
    tail_pages_free: int
    tail_pages_total: int
    kv_pages_free: int
    kv_pages_total: int
    def __init__(self, sequence: _Optional[int] = ..., active_requests: _Optional[int] = ..., queued_requests: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., state_slots_free: _Optional[int] = ..., state_slots_total: _Optional[int] = ..., tail_pages_free: _Optional[int] = ..., tail_pages_total: _Optional[int] = ..., kv_pages_free: _Optional[int] = ..., kv_pages_total: _Optional[int] = ...) -> None: ...

class ListWorkersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListWorkersResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    def __init__(self, workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("description", "load", "dispatched_requests", "silence_s")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DISPATCHED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SILENCE_S_FIELD_NUMBER: _ClassVar[int]
    description: WorkerDescription
    load: WorkerLoad
    dispatched_requests: int
    silence_s: float
    def __init__(self, description: _Optional[_Union[WorkerDescription, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., dispatched_requests: _Optional[int] = ..., silence_s: _Optional[float] = ...) -> None: ...
