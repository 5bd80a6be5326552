"""Early parts of a hand-off: full pages, in order, of a prompt that has so many; nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import FrameError
from stateferry.decode.intake import PageIntake
from stateferry.transfer.manifest import Segment
from stateferry.worker.segments import outgoing_segments
from support.small_cache import GRID, KV, small_cache

PROMPT_LEN = 3 * GRID + 5


def leased() -> StateCache:
    cache = small_cache(max_sequences=3, kv=KV)
    assert cache.reserve("r", PROMPT_LEN)
    return cache


def part(source: StateCache, first: int, end: int) -> Any:
    """Pages [first, end) as they come out of a receiver's staging."""
    segments = []
    for segment in outgoing_segments(source.pools.kv.page_views(source.lease("r"), first, end)):
        data = np.empty(segment.size_bytes, dtype=np.uint8)
        np.concatenate([piece.reshape(-1) for piece in _pieces(segment)], out=data)
        segments.append(
            Segment(segment.kind, segment.layer, segment.dtype, segment.shape, data, segment.start)
        )
    return SimpleNamespace(segments=segments)


def _pieces(segment: Any) -> Any:
    return segment.pieces if hasattr(segment, "pieces") else (segment.data,)


def page_bytes(cache: StateCache) -> list[torch.Tensor]:
    views = cache.pools.kv.page_views(cache.lease("r"), 0, 3)
    return [piece.clone().view(torch.uint8) for view in views for piece in view.pieces]


def test_pages_land_in_order() -> None:
    source, target = leased(), leased()
    source.pools.kv._tensor.normal_()
    target.pools.poison()
    intake = PageIntake("r", PROMPT_LEN, target)
    intake.take_in(part(source, 0, 2))
    intake.take_in(part(source, 2, 3))
    assert intake.num_pages == 3
    for ours, theirs in zip(page_bytes(target), page_bytes(source), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("first", "end"), [(1, 2), (0, 4)], ids=["a gap", "beyond the prompt"])
def test_pages_that_are_not_due_write_nothing(first: int, end: int) -> None:
    source, target = leased(), leased()
    target.pools.poison()
    before = page_bytes(target)
    intake = PageIntake("r", PROMPT_LEN, target)
    with pytest.raises(FrameError):
        intake.take_in(part(source, first, end))
    assert intake.num_pages == 0
    assert all(torch.equal(a, b) for a, b in zip(page_bytes(target), before, strict=True))


def test_a_part_without_pages_is_refused() -> None:
    intake = PageIntake("r", PROMPT_LEN, leased())
    with pytest.raises(FrameError, match="0 pages by now"):
        intake.take_in(SimpleNamespace(segments=[]))
