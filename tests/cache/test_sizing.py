"""What a memory budget is cut into."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stateferry.cache.pools import build_pools, layout_fingerprint
from stateferry.cache.sizing import size_pools
from stateferry.core.errors import ConfigError
from stateferry.core.worker import PoolSizes
from stateferry_kernels.kv_layer import KvGeometry
from support.small_cache import GEOMETRY, GRID, KV, NO_KV

CONTEXT = 10 * GRID


def sizes(budget_bytes: int, kv: KvGeometry = KV, **changes: Any) -> PoolSizes:
    wanted = {"grid": GRID, "dtype": torch.float32, "max_sequences": 8} | changes
    wanted.setdefault("max_context_tokens", CONTEXT)
    return size_pools(GEOMETRY, kv, budget_bytes=budget_bytes, **wanted)


@pytest.mark.parametrize("kv", [NO_KV, KV])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pools_take_what_the_sizes_say(kv: KvGeometry, dtype: torch.dtype) -> None:
    planned = sizes(1 << 30, kv, dtype=dtype)
    pools = build_pools(GEOMETRY, kv, planned, grid=GRID, dtype=dtype)
    assert pools.size_bytes == planned.size_bytes
    assert pools.kv.size_bytes == planned.kv_pages * planned.kv_page_bytes
    assert pools.max_sequence_bytes(CONTEXT) == (
        planned.state_slot_bytes + planned.tail_page_bytes + 10 * planned.kv_page_bytes
    )


def test_plenty_holds_every_sequence_at_full_length() -> None:
    planned = sizes(1 << 40)
    assert (planned.sequences, planned.state_slots, planned.tail_pages) == (8, 17, 8)
    assert planned.kv_pages == 8 * 10


def test_pure_models_have_no_pages() -> None:
    planned = sizes(1 << 40, NO_KV)
    assert (planned.kv_pages, planned.kv_page_bytes, planned.kv_pages_for(1000)) == (0, 0, 0)


@pytest.mark.parametrize("kv", [NO_KV, KV])
def test_any_budget_is_kept_and_used(kv: KvGeometry) -> None:
    most = sizes(1 << 40, kv)
    seen = set()
    for budget in range(0, most.size_bytes + 5000, 997):
        try:
            planned = sizes(budget, kv)
        except ConfigError:
            assert not seen, "more memory held less"
            continue
        seen.add((planned.sequences, planned.kv_pages))
        assert planned.size_bytes <= budget
        # One request of full length always fits, and no second page or sequence would have.
        assert planned.kv_pages >= planned.kv_pages_for(CONTEXT)
        if planned.sequences < 8:
            each = 2 * planned.state_slot_bytes + planned.tail_page_bytes
            full = planned.kv_pages_for(CONTEXT) * planned.kv_page_bytes
            fixed = planned.state_slot_bytes + planned.sequences * each
            assert fixed + each + full > budget
        elif planned.kv_pages < most.kv_pages:
            assert planned.size_bytes + planned.kv_page_bytes > budget
    assert (most.sequences, most.kv_pages) in seen and len(seen) > 7


def test_an_error_says_how_much_would_do() -> None:
    with pytest.raises(ConfigError, match=r"worker\.memory_bytes: 1000 is less than the") as caught:
        sizes(1000)
    needed = int(str(caught.value).split(" bytes that")[0].split()[-1])
    assert sizes(needed).sequences == 1
    with pytest.raises(ConfigError):
        sizes(needed - 1)


def test_the_layout_fingerprint_knows_the_kv_geometry() -> None:
    def fingerprint(kv: KvGeometry = KV, page_tokens: int = GRID) -> str:
        return layout_fingerprint(
            GEOMETRY, kv, grid=GRID, page_tokens=page_tokens, dtype=torch.float32
        )

    others = [
        KvGeometry(KV.num_layers + 1, KV.kv_heads, KV.head_dim),
        KvGeometry(KV.num_layers, KV.kv_heads * 2, KV.head_dim // 2),
        NO_KV,
    ]
    different = {fingerprint(), fingerprint(page_tokens=2 * GRID), *map(fingerprint, others)}
    assert len(different) == 5 and fingerprint() == fingerprint()
