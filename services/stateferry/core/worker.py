"""What a worker tells routers about itself."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import Role, WorkerKey


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """Fixed for one incarnation. Addresses are ``host:port``; ``transfer_address`` is what a
    transport's ``connect`` takes, None on a worker that receives no state."""

    key: WorkerKey
    role: Role
    grpc_address: str
    transfer_address: str | None
    metrics_address: str
    fingerprint: Fingerprint
    capacity_requests: int
    max_context_tokens: int
    vocab_size: int
    kernels: str


@dataclass(frozen=True, slots=True)
class PoolCount:
    """Occupancy of one pool."""

    free: int
    total: int


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A heartbeat. ``sequence`` counts up by one with each report of one incarnation."""

    sequence: int
    active_requests: int
    queued_requests: int
    queued_tokens: int
    state_slots: PoolCount
    tail_pages: PoolCount
