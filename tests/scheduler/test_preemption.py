"""Which decoding sequence makes way, for whom, and how it comes back; over a memory that counts."""

from __future__ import annotations

from collections import deque
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stateferry.core.errors import Overloaded
from stateferry.core.request import GenerationRequest
from stateferry.core.sampling import FinishReason, SamplingParams, StopConditions
from stateferry.scheduler.decode import DecodeScheduler
from stateferry.scheduler.decode_step import DecodeStep
from stateferry.scheduler.extend import ExtendSlice, ExtendStep
from stateferry.scheduler.standing import Preemption
from support.counting_memory import CountingMemory

GRID, BUDGET, STARVATION_S = 4, 8, 10.0
PROMPT_LEN = 6
EOS = 2


def prompt(name: str, priority: int = 0, max_tokens: int = 50) -> GenerationRequest:
    sampling = SamplingParams(0.0, 0, 1.0, 0, None)
    stop = StopConditions(max_tokens, 0, frozenset({EOS}))
    return GenerationRequest(name, (1,) * PROMPT_LEN, sampling, stop, priority=priority)


class Bench:
    """Tokens count up from 100 in each sequence, so that a wrong one shows."""

    def __init__(
        self,
        capacity: int = 2,
        max_in_flight: Literal[1, 2] = 1,
        capacity_tokens: int = 1 << 30,
        max_waiting: int = 99,
    ) -> None:
        self.memory = CountingMemory(capacity, capacity_tokens)
        self.decode = DecodeScheduler(
            self.memory,
            max_waiting=max_waiting,
            max_in_flight=max_in_flight,
            starvation_s=STARVATION_S,
            preemption=Preemption(GRID, BUDGET),
        )
        self.now = 0.0
        self.requests: dict[str, GenerationRequest] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        self.in_flight: deque[DecodeStep | ExtendStep] = deque()

    def ask(
        self, name: str, priority: int = 0, *, known: bool = True, max_tokens: int = 50
    ) -> None:
        self.requests[name] = prompt(name, priority, max_tokens)
        self.known = known
        self.decode.admit(name, self.requests[name].total_tokens, priority, self.now)
        self.grant()

    def grant(self) -> None:
        for name in self.decode.reserve_waiting(self.now):
            request = self.requests[name]
            self.outputs[name] = [100]
            self.decode.activate(name, 100, request.stop, request if self.known else None)
        # Whoever is active now may be the one that can make way.
        if self.decode.reserve_waiting(self.now):
            raise AssertionError("somebody had been left waiting for memory that was there")

    def begin(self) -> DecodeStep | ExtendStep | None:
        step = self.decode.schedule()
        if step is not None:
            self.in_flight.append(step)
        return step

    def land(self, *, broken: bool = False) -> None:
        step = self.in_flight.popleft()
        if isinstance(step, ExtendStep):
            if broken:
                self.decode.fail(step)
                return self.grant()
            names = [part.request_id for part in step.slices if part.is_last]
        else:
            names = [row.request_id for row in step.rows]
        indices = {name: len(self.outputs[name]) for name in names}
        sampled = [[] if broken else [100 + indices[name]] for name in names]
        for advance in self.decode.complete(step, sampled):
            name = advance.request_id
            assert advance.index == indices[name], "a token was lost, or came twice"
            self.outputs[name].append(100 + advance.index)
            if advance.finish_reason is not None:
                self.ended.add(name)
        return self.grant()

    def step(self) -> DecodeStep | ExtendStep | None:
        step = self.begin()
        if step is not None:
            self.land()
        return step

    @property
    def holders(self) -> set[str]:
        return set(self.memory.held)


def test_the_lowest_and_of_those_the_youngest_makes_way() -> None:
    bench = Bench(capacity=4)
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", 3)):
        bench.ask(name, priority)
    for _ in range(3):
        bench.step()
    bench.ask("high", 2)
    assert bench.holders == {"a", "b", "d", "high"} and bench.decode.num_waiting == 1
    bench.ask("higher", 2)
    assert bench.holders == {"a", "d", "high", "higher"}
    bench.ask("last", 2)
    assert bench.holders == {"d", "high", "higher", "last"}
    bench.ask("too late", 2)
    assert bench.decode.num_waiting == 4, "those that run are as high"
    assert bench.decode.counts.preempted == 3


def test_it_waits_for_the_steps_in_flight_and_begins_none() -> None:
    bench = Bench(capacity=1, max_in_flight=2)
    bench.ask("low")
    bench.begin()
    bench.begin()
    bench.ask("high", 1)
    bench.land()
    assert bench.holders == {"low"} and bench.begin() is None
    bench.land()
    assert bench.holders == {"high"} and bench.outputs["low"] == [100, 101, 102]


def test_it_comes_back_with_all_of_its_output_and_goes_on() -> None:
    bench = Bench(capacity=1)
    bench.ask("low", max_tokens=9)
    for _ in range(5):
        bench.step()
    bench.ask("high", 1, max_tokens=3)
    bench.memory.known["low"] = PROMPT_LEN + 5
    bench.step()
    bench.step()
    assert bench.ended == {"high"} and bench.holders == {"low"}
    again = bench.decode.preempted("low")
    assert again.prompt_ids == (*(1,) * PROMPT_LEN, 100, 101, 102, 103, 104, 105)
    assert (again.num_output_ids, again.total_tokens) == (6, PROMPT_LEN + 9)
    step = bench.step()
    assert step == ExtendStep((ExtendSlice("low", PROMPT_LEN + 5, 1, is_last=True),))
    while bench.step():
        pass
    assert bench.outputs["low"] == list(range(100, 109)) and bench.ended == {"high", "low"}
    assert bench.decode.counts.recomputed_tokens == 0 and not bench.holders


def test_what_was_lost_is_computed_in_slices_between_the_steps_of_others() -> None:
    bench = Bench(capacity=2)
    bench.ask("low")
    bench.ask("other", 2)
    for _ in range(14):
        bench.step()
    bench.ask("high", 1, max_tokens=2)
    bench.step()
    assert bench.holders == {"low", "other"} and bench.decode.queued_tokens == PROMPT_LEN + 15
    kinds = [type(bench.step()) for _ in range(6)]
    assert kinds == [ExtendStep, DecodeStep] * 3
    assert bench.decode.counts.recomputed_tokens == PROMPT_LEN + 14
    assert len(bench.outputs["low"]) == 17 and not bench.decode.queued_tokens


def test_nobody_makes_way_in_vain() -> None:
    """Not for one that would lack room all the same, nor where a step's end brings room."""
    bench = Bench(capacity=3, capacity_tokens=3 * (PROMPT_LEN + 50))
    bench.ask("low")
    bench.ask("equal", 1)
    bench.decode.admit("giant", 2 * (PROMPT_LEN + 50) + 1, 1, 0.0)
    bench.grant()
    assert bench.holders == {"low", "equal"} and bench.decode.counts.preempted == 0
    bench.decode.abort("giant")

    bench = Bench(capacity=2)
    bench.ask("low")
    bench.ask("leaves", 0)
    bench.begin()
    bench.decode.abort("leaves")
    bench.ask("high", 1)
    assert bench.decode.num_waiting == 1
    bench.land()
    assert bench.holders == {"low", "high"} and bench.decode.counts.preempted == 0


def test_of_unknown_prompts_nobody_makes_way() -> None:
    bench = Bench(capacity=1)
    bench.ask("low", known=False)
    bench.ask("high", 9)
    bench.step()
    assert bench.holders == {"low"} and bench.decode.num_waiting == 1


def test_whoever_has_paused_too_long_is_next_and_safe_from_then_on() -> None:
    bench = Bench(capacity=1)
    bench.ask("low", -5)
    bench.ask("first", 5)
    assert bench.holders == {"first"}
    for name in ("second", "third"):
        bench.ask(name, 5)
    # Twice four seconds of pause, in between a turn of its own.
    bench.now += 4
    for name in ("first", "second", "third"):
        bench.decode.abort(name)
        bench.grant()
    assert bench.holders == {"low"}
    bench.step()
    bench.ask("fourth", 5)
    assert bench.holders == {"fourth"}
    bench.now += 7
    bench.ask("fifth", 9)
    assert bench.holders == {"low"}, "the fifth has pushed the fourth aside, and was not next"
    bench.ask("sixth", 99)
    assert bench.holders == {"low"}
    assert bench.decode.counts.preempted == 3


def test_a_pause_that_nobody_needs_any_more_does_not_happen() -> None:
    bench = Bench(capacity=1, max_in_flight=2)
    bench.ask("low")
    bench.begin()
    bench.ask("high", 1)
    bench.decode.abort("high")
    bench.grant()
    bench.land()
    assert bench.begin() is not None and bench.holders == {"low"}
    assert bench.decode.counts.preempted == 0


def test_those_that_pause_do_not_count_against_the_queue() -> None:
    bench = Bench(capacity=1, max_waiting=1)
    for number in range(4):
        bench.ask(str(number), number)
    assert bench.decode.num_waiting == 3
    bench.ask("waits", 0)
    with pytest.raises(Overloaded):
        bench.ask("refused", 0)


@pytest.mark.parametrize("phase", ["paused", "in the line", "resuming", "extend in flight"])
def test_aborted_in_every_phase_of_a_pause(phase: str) -> None:
    bench = Bench(capacity=1)
    bench.ask("low")
    bench.begin()
    bench.ask("high", 1)
    if phase != "paused":
        bench.land()
    if phase in ("resuming", "extend in flight"):
        bench.decode.abort("high")
        bench.grant()
    if phase == "extend in flight":
        assert isinstance(bench.begin(), ExtendStep)
    bench.decode.abort("low")
    bench.grant()
    while bench.in_flight:
        bench.land()
    bench.decode.abort("high")
    assert not bench.holders and not bench.memory.parked and not bench.decode.knows("low")


@pytest.mark.parametrize("whole", [True, False])
def test_an_extend_that_fails_loses_its_sequences_alone(whole: bool) -> None:
    bench = Bench(capacity=2, max_in_flight=2)
    bench.ask("low")
    bench.ask("other", 2)
    bench.ask("high", 1, max_tokens=2)
    if whole:
        bench.memory.known["low"] = PROMPT_LEN
    while not any(isinstance(step, ExtendStep) for step in bench.in_flight):
        if bench.begin() is None:
            bench.land()
    while not isinstance(bench.in_flight[0], ExtendStep):
        bench.land()
    bench.land(broken=True)
    while bench.in_flight:
        bench.land()
    assert bench.memory.spoilt == {"low"} and bench.holders == {"other"}
    assert not bench.decode.knows("low")


def test_walk() -> None:
    """Whatever comes: every token once and in order, nothing leaks, and all come to an end."""
    seen: list[int] = []

    @settings(deadline=None, max_examples=80)
    @given(data=st.data(), most=st.sampled_from((1, 2)), capacity=st.integers(1, 3))
    def walk(data: st.DataObject, most: Literal[1, 2], capacity: int) -> None:
        seen.append(walk_once(data, most, capacity))

    walk()
    assert any(seen), "nobody had to pause"


def walk_once(data: st.DataObject, most: Literal[1, 2], capacity: int) -> int:
    """How many sequences had to pause."""
    bench = Bench(capacity, most)
    draw = data.draw
    for number in range(draw(st.integers(20, 60))):
        match draw(
            st.sampled_from(("ask", "begin", "ask", "land", "begin", "land", "abort", "wait"))
        ):
            case "ask":
                name = f"r{number}"
                # As much of it as the cache happens to have when it comes back.
                bench.memory.known[name] = draw(st.integers(0, PROMPT_LEN + 1))
                max_tokens = draw(st.sampled_from((2, 3, 9, 30)))
                bench.ask(name, draw(st.integers(-2, 2)), max_tokens=max_tokens)
            case "begin":
                bench.begin()
            case "land" if bench.in_flight:
                bench.land()
            case "abort" if bench.requests:
                victim = draw(st.sampled_from(sorted(bench.requests)))
                bench.decode.abort(victim)
                bench.ended.add(victim)
                bench.grant()
            case "wait":
                bench.now += draw(st.sampled_from((1.0, 6.0)))
        assert len(bench.holders) == bench.decode.num_active <= capacity
    for _ in range(10_000):
        if not bench.decode.num_waiting and not bench.decode.num_active:
            break
        if bench.begin() is None or len(bench.in_flight) == most:
            bench.land()
    assert not bench.holders and not bench.memory.parked
    for ids in bench.outputs.values():
        assert ids == list(range(100, 100 + len(ids)))
    assert bench.ended == set(bench.requests)
    return bench.decode.counts.preempted


def test_reasons_to_end_hold_for_the_token_that_follows_a_pause() -> None:
    bench = Bench(capacity=1)
    bench.ask("low", max_tokens=3)
    bench.step()
    bench.ask("high", 1, max_tokens=2)
    bench.memory.known["low"] = PROMPT_LEN + 1
    bench.step()
    step = bench.decode.schedule()
    assert isinstance(step, ExtendStep)
    [advance] = bench.decode.complete(step, [[7]])
    assert (advance.index, advance.finish_reason) == (2, FinishReason.LENGTH)
    assert not bench.holders
