"""What a worker tells routers about itself."""

from __future__ import annotations

from dataclasses import dataclass

from stateferry.core.fingerprint import Fingerprint
from stateferry.core.ids import Role, WorkerKey


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """How a worker's memory for sequences is cut up. ``state_slots`` counts the zero state, which
    nobody holds; a model without attention has no KV pages, of 0 bytes each."""

    sequences: int
    state_slots: int
    tail_pages: int
    kv_pages: int
    kv_page_tokens: int
    state_slot_bytes: int
    tail_page_bytes: int
    kv_page_bytes: int

    @property
    def size_bytes(self) -> int:
        return (
            self.state_slots * self.state_slot_bytes
            + self.tail_pages * self.tail_page_bytes
            + self.kv_pages * self.kv_page_bytes
        )

    def kv_pages_for(self, num_tokens: int) -> int:
        """KV pages that a sequence of ``num_tokens`` takes."""
        return -(-num_tokens // self.kv_page_tokens) if self.kv_page_bytes else 0


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """Fixed for one incarnation. Addresses are ``host:port``; ``transfer_address`` is what a
    transport's ``connect`` takes, None on a worker that receives no state. One that ``preempts``
    pauses running requests for those of higher priority."""

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
    pools: PoolSizes
    preempts: bool = False


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
    kv_pages: PoolCount
