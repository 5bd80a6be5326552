"""The free list keeps its promise: each id once, all of them accounted for."""

from __future__ import annotations

import random

import pytest

from stateferry.cache.slots import SlotPool
from stateferry.core.errors import InvariantViolation


def test_hands_out_each_id_once_then_none() -> None:
    pool = SlotPool("slot", 5, first=1)
    taken = [slot for count in (2, 0, 3) for slot in pool.allocate(count, "a") or ()]
    assert sorted(taken) == [1, 2, 3, 4, 5]
    assert pool.allocate(1, "a") is None
    assert pool.allocate(0, "a") == ()


def test_takes_nothing_when_there_are_not_enough() -> None:
    pool = SlotPool("slot", 3)
    assert pool.allocate(4, "a") is None
    assert pool.num_free == 3 and not pool.owners()


def test_double_free_is_a_violation() -> None:
    pool = SlotPool("slot", 2)
    slots = pool.allocate(1, "a")
    assert slots is not None
    pool.free(slots)
    with pytest.raises(InvariantViolation, match=f"slot {slots[0]}"):
        pool.free(slots)


def test_random_walk_conserves() -> None:
    pool, mine, rng = SlotPool("slot", 17), [], random.Random(3)
    for _ in range(2000):
        if rng.random() < 0.5 and mine:
            pool.free(mine.pop(rng.randrange(len(mine))))
        else:
            count = rng.randrange(5)
            slots = pool.allocate(count, "a")
            held = {slot for taken in mine for slot in taken}
            assert (slots is None) == (len(held) + count > 17)
            if slots is not None:
                assert len(slots) == count and held.isdisjoint(slots)
                mine.append(slots)
        pool.check_conserved()
        assert pool.num_free + sum(map(len, mine)) == pool.total


def test_a_lost_id_is_named() -> None:
    pool = SlotPool("slot", 3)
    pool._free.remove(1)
    with pytest.raises(InvariantViolation, match=r"lost \[1\]"):
        pool.check_conserved()
