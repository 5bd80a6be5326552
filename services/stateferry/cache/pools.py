"""All memory that sequences live in, and what its layout means to another worker."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass

import torch

from stateferry.cache.kv_pool import KvPool
from stateferry.cache.lease import SequenceLease
from stateferry.cache.state_pool import StatePool
from stateferry.cache.state_view import StateView
from stateferry.core.worker import PoolSizes
from stateferry_kernels.kv_layer import KvGeometry
from stateferry_kernels.layer_state import StateGeometry

_LAYOUT_VERSION = 2


@dataclass(frozen=True, slots=True)
class SequencePools:
    """Recurrent state, and keys and values."""

    states: StatePool
    kv: KvPool

    @property
    def grid(self) -> int:
        return self.states.grid

    @property
    def size_bytes(self) -> int:
        return self.states.size_bytes + self.kv.size_bytes

    def sequence_views(self, lease: SequenceLease, first_page: int = 0) -> list[StateView]:
        """Everything another worker needs to continue the sequence, in a fixed order, but the KV
        pages before ``first_page``."""
        return self.states.sequence_views(lease) + self.kv.sequence_views(lease, first_page)

    def max_sequence_bytes(self, num_tokens: int) -> int:
        """Most bytes that ``sequence_views`` of a sequence of ``num_tokens`` can have."""
        return self.states.max_sequence_bytes + self.kv.sequence_bytes(num_tokens)

    def poison(self) -> None:
        """Overwrite all but the zero slot with NaN, in use or not. For tests."""
        self.states.poison()
        self.kv.poison()


def build_pools(
    state_geometry: StateGeometry,
    kv_geometry: KvGeometry,
    sizes: PoolSizes,
    *,
    grid: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    draft_pages: int = 0,
) -> SequencePools:
    """Allocate what ``sizes`` says, and KV pages for drafts. Raises ConfigError for a grid that the
    model cannot have."""
    return SequencePools(
        states=StatePool(
            state_geometry,
            grid=grid,
            dtype=dtype,
            num_slots=sizes.state_slots,
            num_pages=sizes.tail_pages,
            device=device,
        ),
        kv=KvPool(
            kv_geometry,
            page_tokens=sizes.kv_page_tokens,
            dtype=dtype,
            num_pages=sizes.kv_pages,
            num_draft_pages=draft_pages,
            device=device,
        ),
    )


def layout_fingerprint(
    state_geometry: StateGeometry,
    kv_geometry: KvGeometry,
    *,
    grid: int,
    page_tokens: int,
    dtype: torch.dtype,
) -> str:
    """Digest of all that decides what the bytes of a hand-off mean."""
    parts = (astuple(state_geometry), astuple(kv_geometry), grid, page_tokens, dtype)
    text = f"{_LAYOUT_VERSION}:{':'.join(map(str, parts))}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
