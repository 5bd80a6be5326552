"""Copies on real pools: all layers, the filled places and no other, and back again to the byte."""

from __future__ import annotations

import pytest
import torch

from stateferry.cache.page_copies import run_copies
from stateferry.cache.page_copy import HostBlob, Kind, PageCopy
from stateferry.cache.pools import SequencePools
from stateferry.core.errors import InvariantViolation
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


def place(pools: SequencePools, kind: Kind, number: int, rows: int) -> list[torch.Tensor]:
    if kind == "state":
        return pools.states.slot_tensors(number)
    if kind == "tail":
        return pools.states.tail_tensors(number, rows)
    return [pools.kv.page_tensor(number, rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "rows"), [("state", 0), ("tail", ROWS), ("kv", ROWS)])
def test_what_moved_out_survives_its_place(dtype: torch.dtype, kind: Kind, rows: int) -> None:
    pools = filled_pools(dtype)
    before = [part.clone() for part in place(pools, kind, 1, rows)]
    blob, target = HostBlob(), 2 if kind == "kv" else 1
    run_copies(pools, [PageCopy(kind, 1, blob, rows)])
    pools.poison()
    run_copies(pools, [PageCopy(kind, blob, target, rows)])
    after = place(pools, kind, target, rows)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("kind", "rows"), [("state", 0), ("tail", ROWS), ("kv", ROWS)])
def test_host_memory_is_counted_to_the_byte(kind: Kind, rows: int) -> None:
    cache = small_cache(kv=KV)
    held = sum(part.nbytes for part in place(cache.pools, kind, 1, rows))
    assert cache._place_bytes().of(kind, rows) == held


def test_what_was_never_moved_out_cannot_come_back() -> None:
    with pytest.raises(InvariantViolation, match="never copied"):
        run_copies(filled_pools(torch.float32), [PageCopy("tail", HostBlob(), 0, ROWS)])
