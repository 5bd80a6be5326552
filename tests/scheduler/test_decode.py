"""The decode scheduler against a memory that counts: joining, leaving, aborts in every phase."""

from __future__ import annotations

import random

import pytest

from stateferry.core.errors import Overloaded
from stateferry.core.sampling import FinishReason, StopConditions
from stateferry.scheduler.decode import DecodeRow, DecodeScheduler
from support.counting_memory import CountingMemory

EOS = 2


def scheduler(capacity: int = 4, max_waiting: int = 9) -> tuple[DecodeScheduler, CountingMemory]:
    memory = CountingMemory(capacity)
    return DecodeScheduler(memory, max_waiting=max_waiting), memory


def stop(max_tokens: int = 10, min_tokens: int = 0) -> StopConditions:
    return StopConditions(max_tokens, min_tokens, frozenset({EOS}))


def start(decode: DecodeScheduler, name: str, first: int = 7, **kwargs: int) -> None:
    decode.admit(name, 10)
    assert name in decode.reserve_waiting()
    decode.activate(name, first, stop(**kwargs))


def test_sequences_join_and_leave_between_steps() -> None:
    decode, memory = scheduler()
    start(decode, "a", first=5)
    step = decode.schedule()
    assert step is not None and step.rows == (DecodeRow("a", 5, 1),)
    start(decode, "b", first=6)
    decode.complete(step, [11])
    step = decode.schedule()
    assert step is not None
    assert step.rows == (DecodeRow("a", 11, 2), DecodeRow("b", 6, 1))
    advances = decode.complete(step, [EOS, 12])
    assert [(a.request_id, a.index, a.finish_reason) for a in advances] == [
        ("a", 2, FinishReason.STOP),
        ("b", 1, None),
    ]
    assert set(memory.held) == {"b"}


def test_length_and_min_tokens() -> None:
    decode, _ = scheduler()
    start(decode, "a", max_tokens=4, min_tokens=3)
    reasons = []
    for token in (EOS, 9, 9):
        step = decode.schedule()
        assert step is not None
        reasons.append(decode.complete(step, [token])[0].finish_reason)
    assert reasons == [None, None, FinishReason.LENGTH]
    assert decode.schedule() is None


def test_a_failed_row_ends_alone() -> None:
    decode, memory = scheduler()
    start(decode, "a")
    start(decode, "b")
    step = decode.schedule()
    assert step is not None
    advances = decode.complete(step, [None, 5])
    assert [a.request_id for a in advances] == ["b"]
    assert set(memory.held) == {"b"} and not decode.knows("a")


def test_memory_is_given_in_order_of_arrival() -> None:
    decode, _ = scheduler(capacity=1)
    for name in "abc":
        decode.admit(name, 10)
    assert decode.reserve_waiting() == ("a",)
    decode.abort("b")
    decode.abort("a")
    assert decode.reserve_waiting() == ("c",)


def test_the_queue_is_bounded() -> None:
    decode, _ = scheduler(max_waiting=1)
    decode.admit("a", 10)
    with pytest.raises(Overloaded):
        decode.admit("b", 10)


def test_abort_in_flight_keeps_the_memory_until_the_step_is_done() -> None:
    decode, memory = scheduler()
    start(decode, "a")
    step = decode.schedule()
    assert step is not None
    decode.abort("a")
    assert set(memory.held) == {"a"}
    assert decode.complete(step, [5]) == ()
    assert not memory.held


@pytest.mark.parametrize("seed", range(20))
def test_random_walk_leaks_nothing_and_leaves_no_gap(seed: int) -> None:
    rng = random.Random(seed)
    decode, memory = scheduler(capacity=3, max_waiting=1000)
    next_index: dict[str, int] = {}
    names: list[str] = []
    reserved: list[str] = []
    for number in range(400):
        if rng.random() < 0.3:
            decode.admit(f"r{number}", 10)
            names.append(f"r{number}")
        reserved += decode.reserve_waiting()
        if reserved and rng.random() < 0.7:
            name = reserved.pop(0)
            if decode.knows(name):
                decode.activate(name, 7, stop(max_tokens=rng.choice([2, 5, 30])))
                next_index[name] = 1
        step = decode.schedule()
        if rng.random() < 0.15 and names:
            victim = rng.choice(names)
            decode.abort(victim)
            reserved = [r for r in reserved if r != victim]
        if step is not None:
            tokens = [rng.choice([None, EOS, 5, 5, 5, 5]) for _ in step.rows]
            for advance in decode.complete(step, tokens):
                assert advance.index == next_index[advance.request_id]
                next_index[advance.request_id] += 1
        assert len(memory.held) == decode.num_active
    for name in names:
        decode.abort(name)
    assert not memory.held
    assert max(next_index.values()) > 3


def test_asks_for_the_memory_of_all_that_will_be_held() -> None:
    memory = CountingMemory(capacity=4, capacity_tokens=100)
    decode = DecodeScheduler(memory, max_waiting=9)
    for name, tokens in (("a", 60), ("b", 50), ("c", 10)):
        decode.admit(name, tokens)
    # First come, first served: c would fit, but b must not starve.
    assert decode.reserve_waiting() == ("a",)
    assert memory.held == {"a": 60} and decode.num_waiting == 2
    decode.abort("b")
    assert decode.reserve_waiting() == ("c",)
    assert memory.held == {"a": 60, "c": 10}
