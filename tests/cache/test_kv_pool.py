"""Pages: what a kernel writes through its layer is what a hand-off reads, and no more."""

from __future__ import annotations

import pytest
import torch

from stateferry.cache.lease import SequenceLease
from support.small_cache import GRID, KV, small_cache


def lease_at(position: int, pages: tuple[int, ...]) -> SequenceLease:
    return SequenceLease(tail_page=0, slots=(1, 2), kv_pages=pages, position=position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [1, GRID - 1, GRID, GRID + 1, 3 * GRID + 2])
def test_views_are_the_positions_in_order(position: int, dtype: torch.dtype) -> None:
    pool = small_cache(kv=KV, dtype=dtype).pools.kv
    pages = (5, 0, 7, 2)
    generator = torch.Generator().manual_seed(position)
    written = {}
    for number, layer in enumerate(pool.layers):
        for name, places in (("keys", layer.keys), ("values", layer.values)):
            rows = torch.randn(position, KV.kv_heads, KV.head_dim, generator=generator).to(dtype)
            for at, row in enumerate(rows):
                places[pages[at // GRID], :, at % GRID] = row
            written[number, name] = rows
    parts: dict[int, list[torch.Tensor]] = {}
    for view in pool.sequence_views(lease_at(position, pages)):
        flat = torch.cat([piece.reshape(-1) for piece in view.pieces])
        assert all(piece.is_contiguous() for piece in view.pieces) and view.dtype is dtype
        whole = flat.view(view.shape)
        for page in whole if view.kind == "kv_pages" else [whole]:
            parts.setdefault(view.layer, []).append(page)
    for number in range(KV.num_layers):
        # (keys or values, kv_heads, position, head_dim)
        both = torch.cat(parts[number], dim=2)
        for index, name in enumerate(("keys", "values")):
            assert torch.equal(both[index].transpose(0, 1), written[number, name])


def test_a_page_of_a_layer_is_one_piece_and_pages_hold_all_layers() -> None:
    pool = small_cache(kv=KV).pools.kv
    first, last = pool.layers[0].keys, pool.layers[-1].values
    page = KV.num_layers * 2 * KV.kv_heads * GRID * KV.head_dim
    assert first.stride() == last.stride() == (page, GRID * KV.head_dim, KV.head_dim, 1)
    [view] = [view for view in pool.sequence_views(lease_at(GRID, (3,))) if view.layer == 0]
    assert view.shape == (1, 2, KV.kv_heads, GRID, KV.head_dim) and len(view.pieces) == 1


def test_bytes_are_those_of_the_positions() -> None:
    pool = small_cache(kv=KV).pools.kv
    for position in (0, 1, GRID, GRID + 1):
        views = pool.sequence_views(lease_at(position, (0, 1)))
        assert sum(view.size_bytes for view in views) == pool.sequence_bytes(position)


def test_poison_reaches_every_place() -> None:
    pool = small_cache(kv=KV).pools.kv
    for layer in pool.layers:
        layer.keys.zero_()
        layer.values.zero_()
    pool.poison()
    for layer in pool.layers:
        assert layer.keys.isnan().all() and layer.values.isnan().all()
