"""A sealed hand-off is copied in only if it is exactly the state that was expected."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stateferry.cache.state_cache import StateCache
from stateferry.core.errors import FrameError
from stateferry.core.handoff import HandoffMeta
from stateferry.decode.intake import take_in
from stateferry.transfer.manifest import segment_from_tensor
from support.small_cache import GRID, small_cache


def received(position: int, payload: bytes | None = None) -> tuple[Any, StateCache]:
    """What a prefill worker would push for a sequence of ``position`` tokens, and its cache."""
    source = small_cache()
    source.reserve("r")
    lease = source.lease("r")
    lease.adopt(position, GRID)
    views = source.pool.sequence_views(lease)
    for number, view in enumerate(views):
        view.tensor.copy_(torch.full_like(view.tensor, float(number + 1)))
    segments = [segment_from_tensor(v.kind, v.layer, v.tensor) for v in views]
    meta = HandoffMeta(position, 42).encode() if payload is None else payload
    return SimpleNamespace(manifest=SimpleNamespace(payload=meta), segments=segments), source


@pytest.mark.parametrize("position", [1, GRID - 1, GRID, GRID + 1, 3 * GRID, 3 * GRID + 5])
def test_every_byte_lands_where_it_belongs(position: int) -> None:
    handoff, source = received(position)
    cache = small_cache()
    cache.reserve("r")
    meta = take_in(handoff, "r", position, cache)
    assert meta == HandoffMeta(position, 42) and cache.lease("r").position == position
    sent = source.pool.sequence_views(source.lease("r"))
    landed = cache.pool.sequence_views(cache.lease("r"))
    assert len(sent) == len(landed) > 0
    for a, b in zip(sent, landed, strict=True):
        assert torch.equal(a.tensor, b.tensor)


def poisoned_and_unwritten(cache: StateCache) -> bool:
    return all(bool(v.tensor.isnan().all()) for v in cache.pool.sequence_views(cache.lease("r")))


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


def no_payload(handoff: Any) -> None:
    handoff.manifest.payload = b""


@pytest.mark.parametrize(
    "damage",
    [wrong_position, missing_segment, swapped_segments, other_layer, other_shape, no_payload],
)
def test_anything_else_is_refused_before_a_byte_is_copied(damage: Any) -> None:
    handoff, _ = received(GRID + 3)
    damage(handoff)
    cache = small_cache()
    cache.reserve("r")
    with pytest.raises(FrameError):
        take_in(handoff, "r", GRID + 3, cache)
    assert poisoned_and_unwritten(cache)
