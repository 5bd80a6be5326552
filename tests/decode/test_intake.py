"""A sealed hand-off is copied in only if it is exactly the state that was expected."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import FrameError
from stateferry.core.handoff import HandoffMeta
from stateferry.decode.intake import take_in
from stateferry.transfer.blocking import copy_with_crc32c
from stateferry.transfer.manifest import OutgoingSegment, Segment, SegmentKind
from stateferry.worker.segments import outgoing_segments
from stateferry_kernels.kv_layer import KvGeometry
from support.small_cache import GRID, KV, NO_KV, small_cache


def received(position: int, kv: KvGeometry = KV) -> tuple[Any, StateCache]:
    """What a prefill worker would push for a sequence of ``position`` tokens, and its cache."""
    source = small_cache(kv=kv)
    assert source.reserve("r", position)
    lease = source.lease("r")
    lease.adopt(position, GRID)
    views = source.pools.sequence_views(lease)
    values = itertools.count(1)
    for piece in (piece for view in views for piece in view.pieces):
        numbers = itertools.islice(values, piece.numel())
        piece.copy_(torch.tensor([float(n) for n in numbers]).view(piece.shape))
    segments = [arrived(segment) for segment in outgoing_segments(views)]
    meta = HandoffMeta(position, 42).encode()
    return SimpleNamespace(manifest=SimpleNamespace(payload=meta), segments=segments), source


def arrived(segment: OutgoingSegment) -> Segment:
    """The segment as it comes out of a receiver's staging."""
    data = np.empty(segment.size_bytes, dtype=np.uint8)
    copy_with_crc32c(segment.runs, data)
    return Segment(segment.kind, segment.layer, segment.dtype, segment.shape, data)


def receiving_cache(num_tokens: int, kv: KvGeometry = KV) -> StateCache:
    """Its pages have other numbers than the sender's."""
    cache = small_cache(max_sequences=3, kv=kv)
    assert cache.reserve("somebody else", 2 * GRID) and cache.reserve("r", num_tokens)
    return cache


@pytest.mark.parametrize("kv", [NO_KV, KV])
@pytest.mark.parametrize("position", [1, GRID - 1, GRID, GRID + 1, 3 * GRID, 3 * GRID + 5])
def test_every_byte_lands_where_it_belongs(position: int, kv: KvGeometry) -> None:
    handoff, source = received(position, kv)
    cache = receiving_cache(position + 7, kv)
    meta = take_in(handoff, "r", position, cache)
    assert meta == HandoffMeta(position, 42) and cache.lease("r").position == position
    if kv.num_layers:
        assert source.lease("r").kv_pages[0] != cache.lease("r").kv_pages[0]
    sent = source.pools.sequence_views(source.lease("r"))
    landed = cache.pools.sequence_views(cache.lease("r"))
    assert len(sent) == len(landed) > 0
    for a, b in zip(sent, landed, strict=True):
        for ours, theirs in zip(a.pieces, b.pieces, strict=True):
            assert torch.equal(ours, theirs)
    assert sum(view.size_bytes for view in landed if view.kind.startswith("kv")) == (
        kv.num_layers * 2 * kv.kv_heads * kv.head_dim * 4 * position
    )


@pytest.mark.parametrize("position", [GRID - 1, GRID, GRID + 1])
def test_nothing_is_written_beyond_the_position(position: int) -> None:
    handoff, _ = received(position)
    cache = receiving_cache(3 * GRID)
    take_in(handoff, "r", position, cache)
    pages = list(cache.lease("r").kv_pages)
    for layer in cache.pools.kv.layers:
        for places in (layer.keys[pages], layer.values[pages]):
            in_order = places.transpose(1, 2).flatten(0, 1)
            assert not in_order[:position].isnan().any() and in_order[position:].isnan().all()


def poisoned_and_unwritten(cache: StateCache) -> bool:
    views = cache.pools.sequence_views(cache.lease("r"))
    return all(bool(piece.isnan().all()) for view in views for piece in view.pieces)


def wrong_position(handoff: Any) -> None:
    handoff.manifest.payload = HandoffMeta(GRID + 4, 42).encode()


def missing_segment(handoff: Any) -> None:
    del handoff.segments[3]


def swapped_segments(handoff: Any) -> None:
    handoff.segments[0], handoff.segments[-1] = handoff.segments[-1], handoff.segments[0]


def other_layer(handoff: Any) -> None:
    handoff.segments[0] = dataclasses.replace(handoff.segments[0], layer=1)


def other_shape(handoff: Any) -> None:
    shape = (*handoff.segments[0].shape, 1)
    handoff.segments[0] = dataclasses.replace(handoff.segments[0], shape=shape)


def other_kv_heads(handoff: Any) -> None:
    """As from a worker whose model has the same bytes in other heads."""
    for number, segment in enumerate(handoff.segments):
        if segment.kind is SegmentKind.KV_PAGES:
            pages, two, heads, tokens, dim = segment.shape
            shape = (pages, two, heads * 2, tokens, dim // 2)
            handoff.segments[number] = dataclasses.replace(segment, shape=shape)


def without_kv(handoff: Any) -> None:
    handoff.segments = [s for s in handoff.segments if not s.kind.value.startswith("kv")]


def fewer_kv_layers(handoff: Any) -> None:
    handoff.segments = [s for s in handoff.segments if s.kind is not SegmentKind.KV_ROWS]


def no_payload(handoff: Any) -> None:
    handoff.manifest.payload = b""


@pytest.mark.parametrize(
    "damage",
    [
        wrong_position,
        missing_segment,
        swapped_segments,
        other_layer,
        other_shape,
        other_kv_heads,
        without_kv,
        fewer_kv_layers,
        no_payload,
    ],
)
def test_anything_else_is_refused_before_a_byte_is_copied(damage: Any) -> None:
    handoff, _ = received(GRID + 3)
    damage(handoff)
    cache = receiving_cache(2 * GRID)
    with pytest.raises(FrameError):
        take_in(handoff, "r", GRID + 3, cache)
    assert poisoned_and_unwritten(cache)
