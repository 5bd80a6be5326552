"""Copies on real pools: all layers, the filled places and no other, and back again to the byte."""

from __future__ import annotations

import pytest
import torch

from stateferry.cache.host_tier import Kind
from stateferry.cache.hybrid_cache import PageCopy
from stateferry.cache.page_copies import TensorCopier, run_copies
from stateferry.cache.pools import SequencePools
from support.small_cache import GRID, KV, small_cache

ROWS = GRID - 5


def filled_pools(dtype: torch.dtype) -> SequencePools:
    """Page and slot 1 hold numbers, all others NaN."""
    pools = small_cache(kv=KV, dtype=dtype).pools
    generator = torch.Generator().manual_seed(1)
    tensors = pools.states.slot_tensors(1) + pools.states.tail_tensors(1, ROWS)
    for tensor in (*tensors, pools.kv.page_tensor(1, ROWS)):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return pools


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_page_has_the_filled_places_of_its_source(dtype: torch.dtype) -> None:
    pools = filled_pools(dtype)
    run_copies(pools, [PageCopy("tail", 1, 0, ROWS), PageCopy("kv", 1, 3, ROWS)])
    states, kv = pools.states, pools.kv
    for ours, theirs in zip(
        states.tail_tensors(0, ROWS), states.tail_tensors(1, ROWS), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(kv.page_tensor(3, ROWS), kv.page_tensor(1, ROWS))
    # What was not filled is not touched.
    assert all(t[:, ROWS:].isnan().all() for t in states.tail_tensors(0, GRID))
    assert kv.page_tensor(3, GRID)[..., ROWS:, :].isnan().all()
    assert kv.page_tensor(2, GRID).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "rows"), [("state", 0), ("tail", ROWS), ("kv", ROWS)])
def test_what_was_saved_survives_its_place(dtype: torch.dtype, kind: Kind, rows: int) -> None:
    pools = filled_pools(dtype)
    copier = TensorCopier(pools)
    parts = [part.clone() for part in copier._parts(kind, 1, rows)]
    blob, size_bytes = copier.save(kind, 1, rows)
    assert size_bytes == sum(part.nbytes for part in parts)
    pools.poison()
    copier.load(kind, 2 if kind == "kv" else 1, rows, blob)
    back = copier._parts(kind, 2 if kind == "kv" else 1, rows)
    assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))
