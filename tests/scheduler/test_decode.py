"""The decode scheduler against a memory that counts: joining, leaving, aborts in every phase."""

from __future__ import annotations

import random
from collections import deque
from typing import Literal

import pytest

from stateferry.core.errors import Overloaded
from stateferry.core.sampling import FinishReason, StopConditions
from stateferry.scheduler.decode import DecodeScheduler
from stateferry.scheduler.decode_step import DecodeRow, DecodeStep
from support.counting_memory import CountingMemory

EOS = 2


def scheduler(
    capacity: int = 4, max_waiting: int = 9, max_in_flight: Literal[1, 2] = 1
) -> tuple[DecodeScheduler, CountingMemory]:
    memory = CountingMemory(capacity)
    return DecodeScheduler(memory, max_waiting=max_waiting, max_in_flight=max_in_flight), memory


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
    decode.complete(step, [[11]])
    step = decode.schedule()
    assert step is not None
    assert step.rows == (DecodeRow("a", 11, 2), DecodeRow("b", 6, 1))
    advances = decode.complete(step, [[EOS], [12]])
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
        reasons.append(decode.complete(step, [[token]])[0].finish_reason)
    assert reasons == [None, None, FinishReason.LENGTH]
    assert decode.schedule() is None


def test_a_failed_row_ends_alone() -> None:
    decode, memory = scheduler()
    start(decode, "a")
    start(decode, "b")
    step = decode.schedule()
    assert step is not None
    advances = decode.complete(step, [[], [5]])
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
    assert decode.complete(step, [[5]]) == ()
    assert not memory.held


def test_a_step_before_its_tokens_are_known() -> None:
    """Two in flight: the second one consumes what the first one samples, and is in vain for the
    sequence that has ended meanwhile."""
    decode, memory = scheduler(max_in_flight=2)
    start(decode, "a", first=5)
    start(decode, "b", first=6)
    first, second = decode.schedule(), decode.schedule()
    assert first is not None and first.rows == (DecodeRow("a", 5, 1), DecodeRow("b", 6, 1))
    assert second is not None and second.rows == (DecodeRow("a", None, 2), DecodeRow("b", None, 2))
    assert decode.schedule() is None
    advances = decode.complete(first, [[EOS], [12]])
    assert [(a.request_id, a.index) for a in advances] == [("a", 1), ("b", 1)]
    assert set(memory.held) == {"a", "b"} and decode.knows("a"), "the second step may still write"
    third = decode.schedule()
    assert third is not None and third.rows == (DecodeRow("b", None, 3),)
    advances = decode.complete(second, [[99], [13]])
    assert [(a.request_id, a.index) for a in advances] == [("b", 2)]
    assert set(memory.held) == {"b"} and not decode.knows("a")
    # The token that ended a was not consumed, as far as anybody is concerned.
    assert memory.tokens == {"a": [5], "b": [6, 12]}
    decode.complete(third, [[14]])
    step = decode.schedule()
    assert step is not None and step.rows == (DecodeRow("b", 14, 4),)


def test_no_step_beyond_the_last_token() -> None:
    """How long a sequence may become is known beforehand, so no step is in vain for that."""
    decode, _ = scheduler(max_in_flight=2)
    start(decode, "a", max_tokens=3)
    first, second = decode.schedule(), decode.schedule()
    assert first is not None and second is not None
    decode.complete(first, [[9]])
    assert decode.schedule() is None
    [last] = decode.complete(second, [[9]])
    assert last.finish_reason is FinishReason.LENGTH and not decode.knows("a")


def test_what_fails_is_spoilt_though_a_step_follows() -> None:
    decode, memory = scheduler(max_in_flight=2)
    start(decode, "a")
    first, second = decode.schedule(), decode.schedule()
    assert first is not None and second is not None
    assert decode.complete(first, [[]]) == ()
    assert memory.spoilt == {"a"} and set(memory.held) == {"a"}
    assert decode.complete(second, [[9]]) == ()
    assert not memory.held


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_random_walk_leaks_nothing_and_leaves_no_gap(seed: int, most: Literal[1, 2]) -> None:
    rng = random.Random(seed)
    decode, memory = scheduler(capacity=3, max_waiting=1000, max_in_flight=most)
    in_flight: deque[DecodeStep] = deque()
    overlapped = num_runs = 0
    most_tokens: dict[str, int] = {}
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
                most_tokens[name] = rng.choice([2, 5, 30])
                decode.activate(name, 7, stop(max_tokens=most_tokens[name]))
                next_index[name] = 1
        if (scheduled := decode.schedule()) is not None:
            in_flight.append(scheduled)
        if rng.random() < 0.15 and names:
            victim = rng.choice(names)
            decode.abort(victim)
            reserved = [r for r in reserved if r != victim]
        overlapped += len(in_flight) > 1
        if in_flight and (len(in_flight) == most or rng.random() < 0.5):
            step = in_flight.popleft()
            runs = [[], [EOS], [5], [5], [5], [5]]
            if most == 1:
                # As drafts do; a stop ends a run, and so does the limit.
                runs += [[5, 5, EOS], [5, 5]]
            given = [
                rng.choice(runs)[: most_tokens[row.request_id] - row.index] for row in step.rows
            ]
            num_runs += sum(len(run) > 1 for run in given)
            for advance in decode.complete(step, given):
                assert advance.index == next_index[advance.request_id]
                next_index[advance.request_id] += 1
        assert len(memory.held) == decode.num_active
    for name in names:
        decode.abort(name)
    for step in in_flight:
        decode.complete(step, [[5]] * len(step.rows))
    assert not memory.held and bool(overlapped) == (most > 1)
    assert bool(num_runs) == (most == 1)
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
