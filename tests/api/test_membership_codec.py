"""What a worker says of itself arrives as it was said."""

from __future__ import annotations

import dataclasses

import pytest

from router.fakes import description
from stateferry.api import worker_codec as codec
from stateferry.core.errors import InvalidRequest
from stateferry.core.ids import Role
from stateferry.core.worker import PoolCount, PoolSizes, WorkerLoad

POOLS = PoolSizes(
    sequences=4,
    state_slots=9,
    tail_pages=4,
    kv_pages=1 << 31,
    kv_page_tokens=64,
    state_slot_bytes=1 << 40,
    tail_page_bytes=500,
    kv_page_bytes=1 << 33,
)


def test_a_description_with_its_pools() -> None:
    worker = dataclasses.replace(description(Role.DECODE), pools=POOLS)
    assert codec.description_from_pb(codec.description_to_pb(worker)) == worker


def test_pages_without_a_length_are_refused() -> None:
    worker = description(Role.DECODE)
    pools = dataclasses.replace(POOLS, kv_page_tokens=0)
    message = codec.description_to_pb(dataclasses.replace(worker, pools=pools))
    with pytest.raises(InvalidRequest, match="kv_page_tokens"):
        codec.description_from_pb(message)


def test_a_load() -> None:
    load = WorkerLoad(7, 1, 2, 3, PoolCount(4, 5), PoolCount(6, 7), PoolCount(8, 9))
    assert codec.load_from_pb(codec.load_to_pb(load)) == load
