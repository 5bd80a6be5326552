"""A state cache with real pools, small enough for a unit test."""

from __future__ import annotations

import torch

from stateferry.cache.state_cache import StateCache, num_pages, num_slots
from stateferry.cache.state_pool import StatePool
from stateferry_kernels.layer_state import StateGeometry

GRID = 16
GEOMETRY = StateGeometry(
    num_layers=2, nheads=2, headdim=4, dstate=4, ngroups=1, d_conv=4, conv_dim=16
)


def small_cache(max_sequences: int = 2) -> StateCache:
    pool = StatePool(
        GEOMETRY,
        grid=GRID,
        dtype=torch.float32,
        num_slots=num_slots(max_sequences),
        num_pages=num_pages(max_sequences),
    )
    pool.poison()
    return StateCache(pool, max_sequences)
