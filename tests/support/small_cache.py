"""A state cache with real pools, small enough for a unit test."""

from __future__ import annotations

import torch

from stateferry.cache.pools import build_pools
from stateferry.cache.sizing import size_pools
from stateferry.cache.state_cache import StateCache
from stateferry_kernels.kv_layer import KvGeometry
from stateferry_kernels.layer_state import StateGeometry

GRID = 16
GEOMETRY = StateGeometry(
    num_layers=2, nheads=2, headdim=4, dstate=4, ngroups=1, d_conv=4, conv_dim=16
)
NO_KV = KvGeometry(num_layers=0, kv_heads=1, head_dim=1)
KV = KvGeometry(num_layers=2, kv_heads=2, head_dim=8)


def small_cache(
    max_sequences: int = 2,
    kv: KvGeometry = NO_KV,
    max_context_tokens: int = 4 * GRID,
    budget_bytes: int = 1 << 30,
    dtype: torch.dtype = torch.float32,
    cache_bytes: int = 0,
) -> StateCache:
    """Full of NaN, so that a read of unwritten memory shows. ``cache_bytes`` are for what is
    cached, besides what idle sequences leave."""
    sizes = size_pools(
        GEOMETRY,
        kv,
        grid=GRID,
        dtype=dtype,
        max_sequences=max_sequences,
        max_context_tokens=max_context_tokens,
        budget_bytes=budget_bytes,
        cache_bytes=cache_bytes,
        tokens_per_state=2 * GRID,
    )
    pools = build_pools(GEOMETRY, kv, sizes, grid=GRID, dtype=dtype)
    pools.poison()
    return StateCache(pools, sizes)
