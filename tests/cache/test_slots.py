"""The free list keeps its promise: each id once, all of them accounted for."""

from __future__ import annotations

import random

import pytest

from stateferry.cache.slots import SlotPool
from stateferry.core.errors import InvariantViolation


def test_hands_out_each_id_once_then_none() -> None:
    pool = SlotPool("slot", 5, first=1)
    taken = [pool.allocate("a") for _ in range(5)]
    assert sorted(taken) == [1, 2, 3, 4, 5]  # type: ignore[type-var]
    assert pool.allocate("a") is None


def test_double_free_is_a_violation() -> None:
    pool = SlotPool("slot", 2)
    slot = pool.allocate("a")
    assert slot is not None
    pool.free(slot)
    with pytest.raises(InvariantViolation, match=f"slot {slot}"):
        pool.free(slot)


def test_random_walk_conserves() -> None:
    pool, mine, rng = SlotPool("slot", 7), [], random.Random(3)
    for _ in range(2000):
        if rng.random() < 0.5 and mine:
            pool.free(mine.pop(rng.randrange(len(mine))))
        else:
            slot = pool.allocate("a")
            assert (slot is None) == (len(mine) == 7)
            if slot is not None:
                assert slot not in mine
                mine.append(slot)
        pool.check_conserved()
        assert pool.num_free + len(mine) == pool.total


def test_a_lost_id_is_named() -> None:
    pool = SlotPool("slot", 3)
    pool._free.remove(1)
    with pytest.raises(InvariantViolation, match=r"lost \[1\]"):
        pool.check_conserved()
