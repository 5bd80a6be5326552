"""How many sequences, slots and pages a memory budget holds."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from stateferry.cache.kv_pool import page_shape, pages_for
from stateferry.cache.state_pool import slot_parts, tail_parts
from stateferry.core.errors import ConfigError
from stateferry.core.worker import PoolSizes
from stateferry_kernels.kv_layer import KvGeometry
from stateferry_kernels.layer_state import StateGeometry

SLOTS_PER_SEQUENCE = 2
TAIL_PAGES_PER_SEQUENCE = 1
# A cached tail saves less than one grid interval, a state all that is before it: tails get as much
# memory as leaves nearly all of it to states.
_STATES_PER_TAIL = 8


def size_pools(
    state_geometry: StateGeometry,
    kv_geometry: KvGeometry,
    *,
    grid: int,
    dtype: torch.dtype,
    max_sequences: int,
    max_context_tokens: int,
    budget_bytes: int,
    cache_bytes: int = 0,
    tokens_per_state: int = 384,
) -> PoolSizes:
    """Pools of at most ``budget_bytes``: recurrent state for as many sequences as wanted, KV pages
    for all of them at full length, or for as many tokens as the rest of the budget holds, and of
    what is left then ``cache_bytes`` for what is cached: a state for every ``tokens_per_state``
    tokens of keys and values, and a tail for every eighth of them.

    One sequence of ``max_context_tokens`` always fits, so that an empty worker can take any request
    that is within the limits. Raises ConfigError naming what it would take.
    """
    # Pages as long as the grid: a snapshot then ends where a page ends.
    page_tokens = grid
    slot_bytes = _size_bytes(slot_parts(state_geometry, dtype))
    tail_page_bytes = tail_bytes(state_geometry, grid, dtype)
    kv_page_bytes = page_bytes(kv_geometry, page_tokens, dtype)
    full_pages = pages_for(kv_geometry, page_tokens, max_context_tokens)
    sequence_bytes = SLOTS_PER_SEQUENCE * slot_bytes + TAIL_PAGES_PER_SEQUENCE * tail_page_bytes
    # Slot 0 is the zero state of everybody.
    for_sequences = budget_bytes - slot_bytes - full_pages * kv_page_bytes
    sequences = min(max_sequences, for_sequences // sequence_bytes)
    if sequences < 1:
        needed = budget_bytes - for_sequences + sequence_bytes
        raise ConfigError(
            "worker.memory_bytes",
            f"{budget_bytes} is less than the {needed} bytes that one request of "
            f"model.max_context_tokens = {max_context_tokens} takes",
        )
    kv_pages = sequences * full_pages
    if kv_page_bytes:
        left = budget_bytes - slot_bytes - sequences * sequence_bytes
        kv_pages = min(kv_pages, left // kv_page_bytes)
    left = budget_bytes - slot_bytes - sequences * sequence_bytes - kv_pages * kv_page_bytes
    for_cache = max(min(left, cache_bytes), 0)
    kv_bytes = (
        pages_for(kv_geometry, page_tokens, _STATES_PER_TAIL * tokens_per_state) * kv_page_bytes
    )
    share_bytes = _STATES_PER_TAIL * slot_bytes + tail_page_bytes + kv_bytes
    # Parts of a share as well: at most a tail and a page too much, for which a state or so goes.
    states = _STATES_PER_TAIL * for_cache // share_bytes
    while True:
        tails = -(-states // _STATES_PER_TAIL)
        cached_pages = pages_for(kv_geometry, page_tokens, states * tokens_per_state)
        if (
            states * slot_bytes + tails * tail_page_bytes + cached_pages * kv_page_bytes
            <= for_cache
        ):
            break
        states -= 1
    return PoolSizes(
        sequences=sequences,
        state_slots=1 + sequences * SLOTS_PER_SEQUENCE + states,
        tail_pages=sequences * TAIL_PAGES_PER_SEQUENCE + tails,
        kv_pages=kv_pages + cached_pages,
        kv_page_tokens=page_tokens,
        state_slot_bytes=slot_bytes,
        tail_page_bytes=tail_page_bytes,
        kv_page_bytes=kv_page_bytes,
    )


def tail_bytes(geometry: StateGeometry, rows: int, dtype: torch.dtype) -> int:
    """Bytes of so many rows of a tail, or of a draft, all layers."""
    return _size_bytes(tail_parts(geometry, rows, dtype))


def page_bytes(geometry: KvGeometry, page_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one page of keys and values, all layers."""
    return math.prod(page_shape(geometry, page_tokens)) * dtype.itemsize


def _size_bytes(parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts.values())
